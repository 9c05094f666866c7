"""What a channel score is, and what it sees: all that a group of coupled slices holds.

A score takes a :class:`ScoredGroup` and gives one number a unit; the units with the lowest go
first. To try another, write one::

    def smallest_kernel(group):
        return jnp.min(jnp.stack([jnp.sum(w**2, axis=1) for w in group.weights.values()]), axis=0)

A score that reads more than the weights says so, so that it is computed before::

    @needs("gradients")
    def signed_taylor(group):
        return sum(jnp.sum(g * group.weights[s], axis=1) for s, g in group.gradients.items())

A leaf that a group takes along two of its axes, such as the square kernel of a recurrent layer, is
two slices and counts once in each.
"""

import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxcomp.sharding import explicit_axes

Need = Literal["gradients", "squared_gradients", "activations", "key"]
Slices = dict[tuple[str, int], Array]

_STATISTICS = frozenset({"mean", "var", "running_mean", "running_var", "average", "hidden"})
_HOW = {
    "gradients": "pass `loss` and batches, or the gradients themselves",
    "squared_gradients": "pass `loss` and batches, or the squared gradients themselves",
    "activations": "pass batches to observe",
    "key": "pass key=jax.random.key(0)",
}


class ScoredGroup(NamedTuple):
    """What a score sees of a group of coupled slices.

    Attributes:
        name: the group's name, for messages.
        size: how many units it has.
        weights: by (path, axis) of the leaf, (units, elements), floating: each slice with the unit
            axis first and all other axes, and the positions that belong to one unit, behind it.
        gradients: the same of the gradient of the loss, or None.
        squared_gradients: the same of the squared gradients summed over batches, or None.
        activations: by (path, axis) of the weights that read the channels, (units, positions a
            unit): the mean square of what they read; None where nothing was observed.
        key: a PRNG key of the group's own, or None.
        shapes: the whole shape of each leaf, by path.
    """

    name: str
    size: int
    weights: Slices
    gradients: Slices | None = None
    squared_gradients: Slices | None = None
    activations: Slices | None = None
    key: Any = None
    shapes: Mapping[str, tuple[int, ...]] | None = None


class ChannelScore(NamedTuple):
    """A score, and which fields of :class:`ScoredGroup` beside the weights it reads.

    Attributes:
        function: ``function(group) -> (units,)``.
        needs: names of those fields.
    """

    function: Callable[[ScoredGroup], Array]
    needs: frozenset[Need] = frozenset()

    def __call__(self, group: ScoredGroup) -> Array:
        """The scores of a group, checked as in :func:`evaluate`."""
        return evaluate(self, group)


def needs(*names: Need) -> Callable[[Callable[[ScoredGroup], Array]], ChannelScore]:
    """Declare what a score reads beside the weights.

    Args:
        names: ``"gradients"``, ``"squared_gradients"``, ``"activations"`` or ``"key"``.

    Returns:
        A decorator that makes a :class:`ChannelScore` of a function.

    Raises:
        ValueError: a name is not one of these.

    Example:
        >>> @needs("gradients")
        ... def sensitivity(group):
        ...     return sum(jnp.sum(jnp.abs(g), axis=1) for g in group.gradients.values())
        >>> sorted(sensitivity.needs)
        ['gradients']
    """
    for name in names:
        if name not in get_args(Need):
            raise ValueError(f"a score can need {', '.join(get_args(Need))}; not {name!r}")
    return lambda function: ChannelScore(function, frozenset(names))


def needs_of(score: Callable[[ScoredGroup], Array]) -> frozenset[Need]:
    """What a score reads beside the weights; nothing for a plain function.

    Example:
        >>> noise = needs("key")(lambda group: jax.random.uniform(group.key, (group.size,)))
        >>> sorted(needs_of(noise)), sorted(needs_of(lambda group: group.weights["kernel", 1]))
        (['key'], [])
    """
    return score.needs if isinstance(score, ChannelScore) else frozenset()


def evaluate_all(
    score: Callable[[ScoredGroup], Array], groups: Sequence[ScoredGroup]
) -> list[Float[Array, " units"]]:
    """The scores of several groups, compiled as one program where the score can be traced.

    Args:
        score: as for :func:`evaluate`.
        groups: the groups.

    Returns:
        One array a group.

    Raises:
        TypeError: as :func:`evaluate`.
        ValueError: as :func:`evaluate`.

    Example:
        >>> group = ScoredGroup("kernel[1]", 2, {("kernel", 1): jnp.array([[1.0], [-3.0]])})
        >>> evaluate_all(lambda group: jnp.sum(group.weights["kernel", 1] ** 2, axis=1), [group])
        [Array([1., 9.], dtype=float32)]
    """
    fields = ("weights", "gradients", "squared_gradients", "activations", "key")

    @jax.jit
    def compiled(arrays: list[Any]) -> list[Array]:
        parts = (dict(zip(fields, each, strict=True)) for each in arrays)
        return [
            evaluate(score, group._replace(**part))
            for group, part in zip(groups, parts, strict=True)
        ]

    try:
        return compiled([[getattr(group, name) for name in fields] for group in groups])
    except jax.errors.JAXTypeError:
        # A score that looks at values (NumPy, `if`) is as good: it only takes longer.
        return [evaluate(score, group) for group in groups]


def evaluate(score: Callable[[ScoredGroup], Array], group: ScoredGroup) -> Float[Array, " units"]:
    """The scores of one group.

    Args:
        score: a plain function of the group, or a :class:`ChannelScore`.
        group: the group.

    Returns:
        One number a unit.

    Raises:
        TypeError: the score is not a function, or did not return an array of real numbers.
        ValueError: what it needs is not there, or it returned another shape.

    Example:
        >>> group = ScoredGroup("kernel[1]", 2, {("kernel", 1): jnp.array([[1.0], [-3.0]])})
        >>> evaluate(lambda group: jnp.sum(group.weights["kernel", 1] ** 2, axis=1), group)
        Array([1., 9.], dtype=float32)
    """
    if not callable(score):
        raise TypeError(
            f"score must be a function of a ScoredGroup, such as channel_scores.l1, not {score!r}"
        )
    for name in sorted(needs_of(score)):
        if getattr(group, name) is None:
            raise ValueError(f"{group.name}: the score needs {name}: {_HOW[name]}")
    function = score.function if isinstance(score, ChannelScore) else score
    scores = jnp.asarray(function(group))
    if scores.shape != (group.size,):
        raise ValueError(
            f"{group.name}: the score returned shape {scores.shape}, not ({group.size},): "
            "reduce every axis but the first"
        )
    if jnp.iscomplexobj(scores):
        raise TypeError(f"{group.name}: the score returned {scores.dtype}: take its absolute value")
    return scores.astype(jnp.promote_types(scores.dtype, jnp.float32))


def counts(path: str, leaf: Any) -> bool:
    """Whether a leaf takes part in scores: floating, and not a running statistic.

    The mean and variance that a batch norm keeps are cut with the channel, yet say nothing of how
    much it matters. They are known by their collection ``batch_stats``, or by the names that
    Linen, NNX, Haiku and PyTorch give them.

    Args:
        path: the leaf's path.
        leaf: the leaf.

    Example:
        >>> counts("params/Conv_0/kernel", jnp.ones(3)), counts("norm/var", jnp.ones(3))
        (True, False)
    """
    parts = path.split("/")
    statistic = parts[0] == "batch_stats" or parts[-1] in _STATISTICS
    return not statistic and bool(jnp.issubdtype(leaf.dtype, jnp.inexact))


def scored_group(
    group: Any,
    leaves: Mapping[str, Any],
    *,
    gradients: Mapping[str, Any] | None = None,
    squared_gradients: Mapping[str, Any] | None = None,
    activations: Mapping[tuple[str, int], Any] | None = None,
    key: Any = None,
    where: Callable[[str, Any], bool] = counts,
) -> ScoredGroup:
    """Gather what a score sees of one group.

    Args:
        group: a ``ChannelGroup``: ``name``, ``size`` and ``slices``, each with ``path``, ``axis``
            and ``positions`` (units, k).
        leaves: arrays by path.
        gradients: the same of gradients.
        squared_gradients: the same of squared gradients.
        activations: mean squares by (path, axis) of a weight that reads the channels, (size of that
            axis,); those of other groups are passed over.
        key: a PRNG key of the whole model; each group has its own by its name.
        where: which leaves take part; see :func:`counts`.

    Returns:
        The group, in float32 or wider.

    Raises:
        ValueError: a leaf is missing, too short for its positions, no leaf takes part, or an array
            has another shape than its leaf.

    Example:
        >>> from types import SimpleNamespace as Box
        >>> cut = Box(path="kernel", axis=1, positions=np.array([[0, 1], [2, 3]]))
        >>> halves = Box(name="kernel[1]", size=2, slices=(cut,))
        >>> scored_group(halves, {"kernel": jnp.eye(4)}).weights["kernel", 1].shape
        (2, 8)
    """
    slices = []
    for part in group.slices:
        if part.path not in leaves:
            raise ValueError(f"{part.path} is in group {group.name}, but not among the parameters")
        if where(part.path, leaves[part.path]):
            slices.append(part)
    if not slices:
        raise ValueError(
            f"{group.name}: none of its leaves takes part in the score "
            f"({', '.join(sorted({part.path for part in group.slices}))}): admit one with `where`"
        )

    def gather(arrays: Mapping[str, Any] | None) -> Slices | None:
        if arrays is None:
            return None
        gathered: dict[tuple[str, int], list[Array]] = {}
        for part in slices:
            leaf = leaves[part.path]
            if part.path not in arrays:
                raise ValueError(
                    f"{part.path}: no gradient for this leaf of group {group.name}: differentiate "
                    "with respect to it, or leave it out with `where`"
                )
            array = arrays[part.path]
            if tuple(array.shape) != tuple(leaf.shape):
                raise ValueError(
                    f"{part.path}: shape {array.shape}, but the leaf's is {leaf.shape}"
                )
            rows = _rows(array, part.axis, part, group)
            gathered.setdefault((part.path, part.axis), []).append(rows)
        return {at: jnp.concatenate(rows, axis=1) for at, rows in gathered.items()}

    weights = gather(leaves)
    assert weights is not None
    if key is not None:
        key = jax.random.fold_in(key, zlib.crc32(group.name.encode()))
    return ScoredGroup(
        group.name,
        group.size,
        weights,
        gather(gradients),
        gather(squared_gradients),
        _gather_activations(group, activations),
        key,
        {part.path: tuple(leaves[part.path].shape) for part in slices},
    )


def only(group: ScoredGroup, where: Callable[[str, int], bool]) -> ScoredGroup:
    """A group with some of its slices, to leave others out of a score.

    Args:
        group: the group.
        where: predicate of path and axis.

    Returns:
        The group without the others.

    Raises:
        ValueError: none is left.

    Example:
        >>> weights = {("kernel", 1): jnp.ones((2, 3)), ("bias", 0): jnp.ones((2, 1))}
        >>> group = ScoredGroup("kernel[1]", 2, weights)
        >>> list(only(group, lambda path, axis: not path.endswith("bias")).weights)
        [('kernel', 1)]
    """

    def keep(slices: Slices | None) -> Slices | None:
        if slices is None:
            return None
        return {at: array for at, array in slices.items() if where(*at)}

    if not keep(group.weights):
        paths = ", ".join(f"{path}[{axis}]" for path, axis in group.weights)
        raise ValueError(f"{group.name}: `where` leaves none of {paths}")
    return group._replace(
        weights=keep(group.weights),
        gradients=keep(group.gradients),
        squared_gradients=keep(group.squared_gradients),
    )


def _rows(array: Any, axis: int, part: Any, group: Any) -> Array:
    """(units, elements) of one slice of an array."""
    positions = np.asarray(part.positions)
    if positions.shape[:1] != (group.size,) or positions.ndim != 2:
        raise ValueError(
            f"{part.path}: positions of shape {positions.shape} in group {group.name}, "
            f"which has {group.size} units"
        )
    if explicit_axes(array):
        # Rows of one axis have no place on a mesh that every operation must name.
        array = np.asarray(array)
    if not isinstance(array, np.ndarray):
        array = jnp.asarray(array)
    if not 0 <= axis < array.ndim or (
        positions.size and not 0 <= positions.min() <= positions.max() < array.shape[axis]
    ):
        raise ValueError(
            f"{part.path}: group {group.name} takes axis {axis} up to position "
            f"{positions.max(initial=0)}, but the shape is {array.shape}: pass the parameters that "
            "were coupled"
        )
    if isinstance(array, np.ndarray):
        return jnp.asarray(_taken(np, array, positions, axis))
    return _taken_jit(array, positions, axis)


def _taken(library: Any, array: Any, positions: Any, axis: int) -> Any:
    array = array.astype(jnp.promote_types(array.dtype, jnp.float32))
    rows = library.moveaxis(library.take(array, positions.ravel(), axis=axis), axis, 0)
    return rows.reshape(len(positions), -1)


# One program, instead of one for every operation on every shape.
_taken_jit = jax.jit(functools.partial(_taken, jnp), static_argnames="axis")


def _gather_activations(group: Any, activations: Mapping[tuple[str, int], Any] | None) -> Any:
    if activations is None:
        return None
    gathered: dict[tuple[str, int], list[Array]] = {}
    for part in group.slices:
        at = (part.path, part.axis)
        if at in activations:
            gathered.setdefault(at, []).append(_rows(activations[at], 0, part, group))
    return {at: jnp.concatenate(rows, axis=1) for at, rows in gathered.items()}
