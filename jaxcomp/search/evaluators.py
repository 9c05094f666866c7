"""Functions that :func:`jaxcomp.search.run` evaluates its candidates with, made of pure ones."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxcomp import checks
from jaxcomp.model.batches import rereadable
from jaxcomp.search.forms import check_form, mesh_axis
from jaxcomp.search.halving import Halved, checked_settings, successive_halving
from jaxcomp.search.population import Population, check_limits, population
from jaxcomp.search.stacking import Group, groups, numbers, stack, whole

# Stands for the numbers of candidates that have none, so that there is something to count.
_ALIKE = "no numbers"
_TAKEN = ("steps", "curve", "stopped", "error", "violation")


def evaluator(
    function: Any,
    *shared: Any,
    static: str | Sequence[str] = (),
    form: Any = None,
    chunk: Any = None,
    max_bytes: Any = None,
    mesh: Any = None,
    axis: str | None = None,
) -> Callable[[list[Any]], list[Any]]:
    """Evaluate lists of candidates side by side; ``batch`` of a search is how many there are.

    Candidates of one structure and the same static parts are one program. Programs are made for 1,
    2, 4, 8, … candidates, so that few are compiled and at most half of one's work is thrown away.
    The form is measured at the first two or more candidates of a kind and kept; a study whose last
    bits must be the same after a kill gives it.

    Args:
        function: ``(candidate, *shared) -> measures``, one scalar array or a dict of arrays; pure.
            Numbers of the candidate are traced, but for the static ones.
        *shared: what all candidates share, such as data.
        static: patterns of numbers that decide over shapes or Python's branches, such as
            ``"*/width"``: see :func:`jaxcomp.search.groups`. Strings are static anyway.
        form: as for :func:`jaxcomp.search.population`, as are the others.
        chunk: candidates at once on each device.
        max_bytes: of each device's memory.
        mesh: devices to spread candidates over.
        axis: of the mesh.

    Returns:
        A function of a list of candidates: a number or a dict of numbers and lists for each, in
        their order.

    Raises:
        TypeError: ``function`` is none.
        ValueError: an argument is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxcomp import search
        >>> def measures(candidate, x):
        ...     act = {"tanh": jnp.tanh, "relu": jax.nn.relu}[candidate["act"]]
        ...     return {"mean": act(candidate["gain"] * x).mean()}
        >>> evaluate = evaluator(measures, jnp.array([-1.0, 1.0]), form="vmap")
        >>> evaluate([{"act": "relu", "gain": 1}, {"act": "tanh", "gain": 1}])
        [{'mean': 0.5}, {'mean': 0.0}]
    """
    checks.check_function("function", function, "a candidate that returns its measures")
    check_form(form, mesh)
    mesh_axis(mesh, axis)
    check_limits(chunk, max_bytes)
    shared = jax.device_put(shared)
    settings = {"chunk": chunk, "max_bytes": max_bytes, "mesh": mesh, "axis": axis}
    # Programs that were made before, and the form that was the fastest: what they compute is the
    # same without this memory.
    made: dict[Any, Population] = {}
    chosen: dict[Any, Any] = {}

    def of_group(group: Group, stacked: Any, many: int) -> Population:
        # 1, 1.0 and True are equal, and make different programs.
        kind = group.structure, *((path, type(x), x) for path, x in group.static.items())
        shapes = tuple((x.shape[1:], x.dtype) for x in jax.tree.leaves(stacked))
        place = kind, shapes, many
        if place not in made:
            each = lambda found, *shared: function(whole(group, found), *shared)
            made[place] = population(
                each, stacked, *shared, form=form or chosen.get(kind), **settings
            )
            if many > 1:
                chosen[kind] = made[place].form
        return made[place]

    def evaluate(candidates: Any) -> list[Any]:
        results: list[Any] = [None] * len(candidates)
        for group in groups(candidates, static) if candidates else ():
            rows = [numbers(candidates[i], group.static) for i in group.indices]
            many = 1 << (len(rows) - 1).bit_length()
            rows = rows if rows[0] else [{_ALIKE: 0} for _ in rows]
            stacked = stack(rows + rows[-1:] * (many - len(rows)))
            found = of_group(group, stacked, many)(stacked, *shared)
            for place, index in enumerate(group.indices):
                results[index] = jax.tree.map(lambda x, place=place: _plain(x[place]), found)
        return results

    return evaluate


def halving_evaluator(
    init: Any,
    step: Any,
    score: Any,
    batches: Any,
    *,
    measure: Any,
    direction: Any,
    known: Any = None,
    **settings: Any,
) -> Callable[[list[Any]], list[dict[str, Any]]]:
    """Evaluate lists of candidates by :func:`successive_halving`, for :func:`jaxcomp.search.run`.

    Candidates of one list compete; ``batch`` of the search is how many there are. What was given up
    has the value of that time and is recorded as stopped. Every list begins with the same key, so
    that a study that goes on after a kill comes to the same values.

    Args:
        init: as for :func:`successive_halving`, as are the others.
        step: likewise.
        score: likewise.
        batches: likewise; a list, or a function, for each call reads them anew.
        measure: what the score is called.
        direction: ``"maximize"`` or ``"minimize"``.
        known: ``(candidate) -> dict`` of what is known without training, such as its FLOPs.
        **settings: further arguments of :func:`successive_halving`.

    Returns:
        A function of a list of candidates: for each its score, ``"steps"``, ``"curve"``, the scores
        at the rungs that it reached, ``"stopped"`` or ``"error"``, and what is known of it.

    Raises:
        TypeError: an argument is of the wrong kind, unknown or lacking.
        ValueError: an argument is out of range; when it is called, what ``known`` returns has the
            name of something that training tells.

    Example:
        >>> evaluate = halving_evaluator(
        ...     init=lambda candidate, key: 0.0 * candidate["rate"],
        ...     step=lambda w, candidate, x: w - candidate["rate"] * (w - x),
        ...     score=lambda w, candidate: (w - 1) ** 2, batches=[1.0],
        ...     measure="distance", direction="minimize", rungs=(1, 2), keep=0.5,
        ...     key=jax.random.key(0), form="vmap",
        ... )
        >>> evaluate([{"rate": 0.25}, {"rate": 0.5}])[0]
        {'distance': 0.5625, 'steps': 1, 'curve': [0.5625], 'stopped': True}
    """
    if not isinstance(measure, str) or not measure:
        raise TypeError(f"measure must be what the score is called, not {measure!r:.60}")
    if measure in _TAKEN:
        raise ValueError(f"measure='{measure}' means something else in a result: rename it")
    if known is not None:
        checks.check_function("known", known, "a candidate that returns a dict")
    rereadable(batches)
    # A search takes what is raised later for candidates that failed: so all that can be is looked
    # at here.
    call = inspect.signature(successive_halving).bind(
        init, step, score, [], batches, direction=direction, **settings
    )
    call.apply_defaults()
    given = call.arguments
    checked_settings(
        **{name: given[name] for name in inspect.signature(checked_settings).parameters}
    )
    check_form(given["form"], given["mesh"])
    mesh_axis(given["mesh"], given["axis"])

    def evaluate(candidates: list[Any]) -> list[dict[str, Any]]:
        if not candidates:
            return []
        more = [_known(known, candidate, measure) for candidate in candidates]
        found = successive_halving(
            init, step, score, candidates, batches, direction=direction, **settings
        )
        return [{**_told(found, i, measure), **more[i]} for i in range(len(candidates))]

    return evaluate


def _known(known: Any, candidate: Any, measure: str) -> dict[str, Any]:
    more = known(candidate) if known else {}
    if not isinstance(more, Mapping):
        raise TypeError(f"known must return a dict of measures, not {more!r:.60}")
    for name in more:
        if name in (measure, *_TAKEN):
            raise ValueError(f"known returned '{name}', which training tells: rename it")
    return dict(more)


def _told(found: Halved, index: int, measure: str) -> dict[str, Any]:
    curve = found.curves[index]
    told = {"steps": int(found.steps[index]), "curve": curve[np.isfinite(curve)].tolist()}
    match found.status[index]:
        case "failed":
            return {**told, "error": f"{measure} is not finite after {told['steps']} steps"}
        case "stopped":
            return {measure: float(found.values[index]), **told, "stopped": True}
    return {measure: float(found.values[index]), **told}


def _plain(measure: Any) -> Any:
    return measure.tolist()
