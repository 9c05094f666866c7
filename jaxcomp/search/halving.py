"""Train many networks side by side in one program, and stop those early that lag behind."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcomp import checks
from jaxcomp import tree as tree_lib
from jaxcomp.model.batches import rereadable
from jaxcomp.model.progress import watched
from jaxcomp.search.forms import (
    FORMS,
    Form,
    Program,
    check_form,
    fastest,
    mesh_axis,
    program,
    seconds_of,
)
from jaxcomp.search.pieces import calls, pieces_of
from jaxcomp.search.stacking import (
    Group,
    as_key,
    data_of,
    groups,
    is_array,
    numbers,
    stack,
    whole,
)
from jaxcomp.search.trials import Direction

Status = Literal["finished", "stopped", "failed"]


class Halved(NamedTuple):
    """What became of candidates that were trained side by side.

    Attributes:
        status: of each candidate: ``"finished"``: trained to the end; ``"stopped"``: given up at a
            rung; ``"failed"``: its score was not finite.
        values: (candidates,); the last score of each; NaN where it failed.
        steps: (candidates,); steps that each was trained for.
        curves: (candidates, rungs); scores at the rungs; NaN where it did not come so far.
        survivors: the finished ones, from best to worst; of equals the first comes first.
        states: of the survivors, in their order, as NumPy arrays.
        forms: that were chosen or given, by group of candidates of one structure.
    """

    status: tuple[Status, ...]
    values: np.ndarray
    steps: np.ndarray
    curves: np.ndarray
    survivors: tuple[int, ...]
    states: tuple[Any, ...]
    forms: tuple[Form, ...]


class _Parts(NamedTuple):
    """What training is made of, and how it is run."""

    init: Callable[..., Any]
    step: Callable[..., Any]
    score: Callable[..., Any]
    key: Any
    form: Form | None
    chunk: int
    mesh: Any
    axis: str | None
    devices: int


class _Runner(NamedTuple):
    """The candidates of one group that are still in training.

    Attributes:
        group: theirs.
        indices: their places in the list.
        carry: their states and numbers, side by side; filled up to a multiple of the devices.
        train: ``(carry, batches, count) -> carry``.
        score: ``(carry) -> scores``.
        form: of both.
    """

    group: Group
    indices: list[int]
    carry: Any
    train: Program
    score: Program
    form: Form


def successive_halving(
    init: Any,
    step: Any,
    score: Any,
    candidates: Sequence[Any],
    batches: Any,
    *,
    rungs: Any,
    direction: Any,
    key: Any,
    keep: Any = 1 / 3,
    static: str | Sequence[str] = (),
    form: Any = None,
    chunk: Any = 1,
    mesh: Any = None,
    axis: str | None = None,
    together: Any = 16,
    progress: bool | None = None,
) -> Halved:
    """Train candidates side by side; at each rung the best go on and the others are stopped.

    All see the same batches in the same order. With one rung it is plain training, side by side.
    Candidates of several structures are trained by several programs and compared with each other.

    The states of all lie on the devices at once, and twice while a program turns old into new.

    It keeps nothing on the disk: a call that is killed begins anew. As the evaluation of a search
    with a file, :func:`jaxcomp.search.halving_evaluator`, it loses one list of candidates at most.

    Args:
        init: ``(candidate, key) -> state``, such as parameters and optimizer state. A candidate's
            key depends on its place in the list alone.
        step: ``(state, candidate, batch) -> state``, one train step; pure.
        score: ``(state, candidate) -> scalar`` by which candidates are compared.
        candidates: a list; their numbers are traced, but for static ones.
        batches: a list of trees of arrays of equal shapes, gone through again and again; or a
            function that returns a new iterator over at least one of them.
        rungs: steps after which candidates are scored, rising; the last is where training ends.
        direction: ``"maximize"`` or ``"minimize"``.
        key: a JAX key.
        keep: fraction of the candidates in training that goes on at a rung, at least one of them;
            what is written as eta is ``1 / keep``. Or a rule for all rungs but the last, such as
            :func:`jaxcomp.search.optuna_pruner`: ``(curves, rungs, direction) -> (candidates,)``
            bools, whether each goes on, by the (candidates, reached rungs) scores so far, which are
            NaN where it did not come so far or failed. It may stop all.
        static: patterns of numbers that decide over shapes: see :func:`jaxcomp.search.groups`.
        form: ``"vmap"``, ``"map"`` or ``"loop"``, as for :func:`jaxcomp.search.population`; None:
            the fastest at training for the first batches, for each structure.
        chunk: candidates at once in the form ``"map"``.
        mesh: devices to spread candidates over.
        axis: of the mesh.
        together: batches that are held on the device, and trained on by one call.
        progress: whether to show a bar on stderr; None: on a terminal, if it takes long.

    Returns:
        What became of each.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument is out of range; there are no candidates, or no batches; ``keep``
            does not say of each candidate whether it goes on.

    Example:
        >>> import jax.numpy as jnp
        >>> found = successive_halving(
        ...     init=lambda candidate, key: jnp.zeros(()),
        ...     step=lambda w, candidate, x: w - candidate["rate"] * (w - x),
        ...     score=lambda w, candidate: (w - 1) ** 2,
        ...     candidates=[{"rate": 0.01}, {"rate": 0.1}, {"rate": 0.5}, {"rate": jnp.inf}],
        ...     batches=[1.0], rungs=(2, 6), keep=0.5, direction="minimize", key=jax.random.key(0),
        ...     form="vmap",
        ... )
        >>> found.status, found.steps.tolist(), found.survivors
        (('stopped', 'finished', 'finished', 'failed'), [2, 6, 6, 2], (2, 1))

    Source: Jamieson & Talwalkar, "Non-stochastic best arm identification and hyperparameter
    optimization", AISTATS 2016, figure 3, with ``1 / keep`` in the place of 2.
    """
    rungs = checked_settings(init, step, score, rungs, direction, keep, key, chunk, together)
    _check_candidates(candidates)
    check_form(form, mesh)
    axis, devices = mesh_axis(mesh, axis)
    parts = _Parts(init, step, score, key, form, chunk, mesh, axis, devices)
    found = groups(candidates, static)
    pieces = pieces_of(rereadable(batches), rungs, together)
    curves, steps = np.full((len(candidates), len(rungs)), np.nan), np.zeros(len(candidates), int)
    runners: list[_Runner] = []
    forms: tuple[Form, ...] = ()
    for _ in watched(range(calls(rungs, together)), "training", progress):
        batch, reached = next(pieces)
        if not forms:
            runners = [_begin(group, candidates, parts, batch) for group in found]
            forms = tuple(runner.form for runner in runners)
        runners = [each._replace(carry=each.train(each.carry, *batch)) for each in runners]
        if reached is None:
            continue
        for each in runners:
            scores = np.asarray(each.score(each.carry), np.float64)[: len(each.indices)]
            curves[each.indices, reached] = np.where(np.isfinite(scores), scores, np.nan)
            steps[each.indices] = rungs[reached]
        training = [index for each in runners for index in each.indices]
        alive = _going_on(keep, training, curves[:, : reached + 1], rungs, direction)
        runners = [
            each for each in (_only(each, alive, devices) for each in runners) if each.indices
        ]
        if not runners:
            break
    return _result(runners, curves, steps, rungs, direction, forms)


def _begin(group: Group, candidates: Sequence[Any], parts: _Parts, batch: Any) -> _Runner:
    """Initialize the candidates of a group, and choose the form that trains them fastest."""
    indices = list(group.indices)
    rows = [
        {"numbers": numbers(candidates[index], group.static), "index": index} for index in indices
    ]
    rows += rows[-1:] * (-len(rows) % parts.devices)  # the index is there where no number is

    def start(row: Any) -> Any:
        one_key = jax.random.fold_in(parts.key, row["index"])
        return parts.init(whole(group, row["numbers"]), one_key), row["numbers"]

    def train(carry: Any, batches: Any, count: Any) -> Any:
        state, found = carry
        candidate = whole(group, found)
        held = len(jax.tree.leaves(batches)[0])

        def turn(i: Any, state: Any) -> Any:
            batch = jax.tree.map(lambda x: x[i], batches)
            return _same_kind(state, parts.step(state, candidate, batch))

        # XLA's CPU backend computes convolutions in loops slowly: a single step is none.
        state = turn(0, state) if held == 1 else lax.fori_loop(0, count, turn, state)
        return state, found

    def score(carry: Any) -> Any:
        return _one_number(parts.score(carry[0], whole(group, carry[1])))

    make = lambda function, form: program(function, form, parts.chunk, parts.mesh, parts.axis)
    carry = make(start, parts.form or "vmap")(stack(rows))
    form = parts.form
    if form is None:
        forms = [name for name in FORMS if name != "loop" or parts.mesh is None]
        programs = {name: make(train, name) for name in forms}
        runs = {name: lambda p=p: p(carry, *batch) for name, p in programs.items()}
        form = fastest(seconds_of(runs)) if len(indices) > 1 else "vmap"
        return _Runner(group, indices, carry, programs[form], make(score, form), form)
    return _Runner(group, indices, carry, make(train, form), make(score, form), form)


def _one_number(value: Any) -> Any:
    """A score, if it is one that candidates can be ordered by."""
    if not is_array(value) or np.shape(value) != () or jnp.iscomplexobj(value):
        shape = f"an array of shape {np.shape(value)}" if is_array(value) else f"{value!r:.60}"
        raise TypeError(f"score must return one real number, not {shape}")
    return value


def _same_kind(before: Any, after: Any) -> Any:
    """The state after a step, if the next step can begin with it."""
    old, new = (jax.tree.map(jax.typeof, tree) for tree in (before, after))
    old, new = tree_lib.flatten(old), tree_lib.flatten(new)
    if list(old) != list(new):
        paths = sorted(old.keys() ^ new.keys())
        raise TypeError(f"step must return a state like the one it was given: {paths[:1]} differs")
    for path, kind in old.items():
        if (kind.shape, kind.dtype) != (new[path].shape, new[path].dtype):
            raise TypeError(
                f"step: {path or 'the state'} is {kind.dtype} {kind.shape} before and "
                f"{new[path].dtype} {new[path].shape} after: it must stay the same"
            )
    return after


def _going_on(
    keep: Any,
    training: Sequence[int],
    curves: np.ndarray,
    rungs: tuple[int, ...],
    direction: Direction,
) -> list[int]:
    """The candidates that go on after the rung of the last column, or that are finished there."""
    last = curves.shape[1] == len(rungs)
    if last or not callable(keep):
        return _best(training, curves[:, -1], 1.0 if last else keep, direction)
    said = np.asarray(keep(curves.copy(), rungs, direction))
    if said.shape != (len(curves),) or said.dtype != bool:
        raise ValueError(
            f"keep returned {said.dtype} {said.shape}: it must return a bool for each of the "
            f"{len(curves)} candidates"
        )
    return [index for index in training if said[index] and np.isfinite(curves[index, -1])]


def _best(
    training: Sequence[int], scores: np.ndarray, fraction: float, direction: Direction
) -> list[int]:
    """The candidates that go on, best first; of equal ones the first; none that is not finite."""
    # A third of 9 is 3, also where a third is a little less.
    most = max(1, math.floor(len(training) * fraction + 1e-9))
    sign = -1 if direction == "maximize" else 1
    finite = [index for index in training if np.isfinite(scores[index])]
    return sorted(finite, key=lambda index: (sign * scores[index], index))[:most]


def _only(runner: _Runner, alive: Sequence[int], devices: int) -> _Runner:
    """A group without the candidates that are given up."""
    places = [place for place, index in enumerate(runner.indices) if index in set(alive)]
    if len(places) == len(runner.indices):
        return runner
    indices = [runner.indices[place] for place in places]
    if not places:
        return runner._replace(indices=[], carry=None)
    places += places[-1:] * (-len(places) % devices)
    carry = jax.tree.map(lambda x: as_key(x, data_of(x)[places]), runner.carry)
    return runner._replace(indices=indices, carry=carry)


def _result(
    runners: list[_Runner],
    curves: np.ndarray,
    steps: np.ndarray,
    rungs: tuple[int, ...],
    direction: Direction,
    forms: tuple[Form, ...],
) -> Halved:
    last = np.array([rungs.index(count) for count in steps])
    values = curves[np.arange(len(curves)), last]
    alive = [index for runner in runners for index in runner.indices]
    survivors = tuple(_best(alive, values, 1.0, direction)) if alive else ()
    states = {}
    for runner in runners:
        held = jax.tree.map(data_of, runner.carry[0])
        for place, index in enumerate(runner.indices):
            states[index] = jax.tree.map(
                lambda like, x, place=place: as_key(like, x[place]), runner.carry[0], held
            )
    status: list[Status] = ["stopped" if np.isfinite(value) else "failed" for value in values]
    for index in survivors:
        status[index] = "finished"
    return Halved(
        tuple(status),
        values,
        steps,
        curves,
        survivors,
        tuple(states[index] for index in survivors),
        forms,
    )


def checked_settings(
    init: Any,
    step: Any,
    score: Any,
    rungs: Any,
    direction: Any,
    keep: Any,
    key: Any,
    chunk: Any,
    together: Any,
) -> tuple[int, ...]:
    """Raise unless training can begin with such arguments of :func:`successive_halving`.

    Returns:
        The rungs.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument is out of range.
    """
    checks.check_function("init", init, "(candidate, key) that returns a state")
    checks.check_function("step", step, "(state, candidate, batch) that returns the next state")
    checks.check_function("score", score, "(state, candidate) that returns one number")
    checks.check_key(key)
    checks.check_count("chunk", chunk)
    checks.check_count("together", together)
    rungs = tuple(rungs) if isinstance(rungs, (list, tuple, range)) else (rungs,)
    for rung in rungs:
        checks.check_count("rungs", rung)
    if not rungs or any(a >= b for a, b in pairwise(rungs)):
        raise ValueError(f"rungs are {rungs}: give steps that rise, such as (30, 90, 270)")
    if direction not in ("maximize", "minimize"):
        raise ValueError(f"direction is {direction!r}: it must be 'maximize' or 'minimize'")
    if not callable(keep) and (not checks.is_number(keep) or not 0 < keep <= 1):
        raise ValueError(
            f"keep is {keep!r}: give the fraction that goes on, above 0, at most 1, or a rule"
        )
    return tuple(int(rung) for rung in rungs)


def _check_candidates(candidates: Any) -> None:
    if not isinstance(candidates, (list, tuple)):
        raise TypeError(f"candidates must be a list of them, not {type(candidates).__name__}")
    if not candidates:
        raise ValueError("candidates is empty: give at least one")
