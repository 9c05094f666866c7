"""Beside what others wrote: pymoo's sorting and volume, Optuna's and pymoo's NSGA-II on ZDT1."""

import jax
import numpy as np
import pytest

from jaxcomp.search import Continuous, Repeat, pareto, run, strategies

pytestmark = pytest.mark.slow
VARIABLES, POPULATION, EVALUATIONS, SEEDS = 10, 40, 2000, 3


def zdt1(x):
    """Zitzler, Deb and Thiele 2000, "Comparison of multiobjective evolutionary algorithms"."""
    g = 1 + 9 * np.mean(x[1:])
    return float(x[0]), float(g * (1 - np.sqrt(x[0] / g)))


def volume(pairs):
    return pareto.hypervolume(np.reshape(pairs, (-1, 2)), [1.1, 1.1])


def ours(seed):
    study = run(
        Repeat(VARIABLES, Continuous(0, 1)),
        lambda found: [dict(zip("ab", zdt1(x), strict=True)) for x in found],
        strategies.nsga2(POPULATION),
        objectives={"a": "minimize", "b": "minimize"},
        key=jax.random.key(seed),
        stop=EVALUATIONS,
        batch=POPULATION,
    )
    return volume([each.values for each in study.front])


def test_sorting_and_volume_are_pymoos():
    nds = pytest.importorskip("pymoo.util.nds.non_dominated_sorting")
    hv = pytest.importorskip("pymoo.indicators.hv")
    rng = np.random.default_rng(0)
    for objectives in (2, 3):
        costs = rng.integers(0, 12, (150, objectives)).astype(float)
        ranks = np.empty(len(costs), int)
        for rank, members in enumerate(nds.NonDominatedSorting().do(costs)):
            ranks[members] = rank
        np.testing.assert_array_equal(pareto.ranks(costs), ranks)
        corner = np.full(objectives, 13.0)
        found = pareto.hypervolume(costs, corner)
        assert found == pytest.approx(hv.HV(ref_point=corner)(costs), rel=1e-12)


def test_nsga2_is_as_good_as_optunas():
    library = pytest.importorskip("optuna")
    library.logging.set_verbosity(library.logging.WARNING)

    def theirs(seed):
        sampler = library.samplers.NSGAIISampler(population_size=POPULATION, seed=seed)
        study = library.create_study(directions=["minimize"] * 2, sampler=sampler)
        study.optimize(
            lambda t: zdt1([t.suggest_float(f"x{i}", 0, 1) for i in range(VARIABLES)]), EVALUATIONS
        )
        return volume([each.values for each in study.best_trials])

    mine, other = (np.mean([f(seed) for seed in range(SEEDS)]) for f in (ours, theirs))
    print(f"ZDT1, hypervolume: ours {mine:.4f}, Optuna's NSGA-II {other:.4f}, the front 0.8767")
    assert mine > 0.95 * other


def test_nsga2_is_near_pymoos():
    pytest.importorskip("pymoo")
    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.core.problem import ElementwiseProblem
    from pymoo.optimize import minimize

    class Problem(ElementwiseProblem):
        def __init__(self):
            super().__init__(n_var=VARIABLES, n_obj=2, xl=0.0, xu=1.0)

        def _evaluate(self, x, out, *args, **kwargs):
            out["F"] = zdt1(x)

    def theirs(seed):
        algorithm = NSGA2(pop_size=POPULATION)
        found = minimize(Problem(), algorithm, ("n_eval", EVALUATIONS), seed=seed)
        return volume(found.F)

    mine, other = (np.mean([f(seed) for seed in range(SEEDS)]) for f in (ours, theirs))
    print(f"ZDT1, hypervolume: ours {mine:.4f}, pymoo's NSGA-II {other:.4f}, the front 0.8767")
    assert mine > 0.95 * other
