"""Run a program on smaller parameters: the traced operations, bound again with smaller shapes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.model.couple import Coupling, analyse
from jaxcomp.model.dims import Dim, atoms, find, kept
from jaxcomp.model.program import Block, Op, Value, read, walk, wirings

# By path, the positions of each axis that stay; None where the whole axis does.
Kept = Mapping[str, Sequence[np.ndarray | None]]


class _Cut(NamedTuple):
    """A program's channels and which of them stay."""

    coupling: Coupling
    keep: dict[Dim, np.ndarray]
    masks: dict[Value, tuple[np.ndarray | None, ...]]


def rewrite(
    apply_fn: Callable[..., Any], params: Any, cut: Kept, renormalize: bool = False
) -> Callable[..., Any]:
    """A function of full-size parameters as a function of smaller ones.

    The function is traced at full size for each new shape of its inputs, its axes are followed
    anew, and its operations are bound again without the channels that were cut: a pure function
    that can be jitted, differentiated, vmapped and sharded. Its own outputs shrink where they have
    such channels, as updated ``batch_stats`` do.

    Args:
        apply_fn: a function of ``(params, *inputs)``; that which was cut, or another one of the
            same parameters, such as the training step's.
        params: the full-size parameters; only their shapes and dtypes are used.
        cut: by path, for each axis the positions that stay, ascending; None for all.
        renormalize: allow cuts that change a mean or maximum over channels; a mean is then taken
            over those that remain.

    Returns:
        The function of smaller parameters. It raises ``ValueError`` with the leaf and the
        operation if the cut does not fit ``apply_fn``, before anything is computed.

    Example:
        >>> full = {"w0": jnp.ones((3, 8)), "w1": jnp.ones((8, 2))}
        >>> keep = np.array([0, 1, 2, 4, 6, 7])
        >>> smaller = rewrite(
        ...     lambda p, x: x @ p["w0"] @ p["w1"], full, {"w0": (None, keep), "w1": (keep, None)}
        ... )
        >>> smaller({"w0": jnp.ones((3, 6)), "w1": jnp.ones((6, 2))}, jnp.ones((1, 3)))
        Array([[18., 18.]], dtype=float32)
    """
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    cuts: dict[Any, _Cut] = {}

    def smaller(params: Any, *inputs: Any) -> Any:
        arguments = jax.tree.leaves(inputs)
        # An analysis depends on nothing but structure and shapes, so it may be kept.
        avals = tuple((np.shape(a), jax.dtypes.result_type(a)) for a in arguments)
        key = (jax.tree.structure(inputs), avals)
        if key not in cuts:
            cuts[key] = _cut(analyse(read(apply_fn, shapes, *inputs), renormalize, False), cut)
        program = cuts[key].coupling.program
        leaves = _check_leaves(params, cuts[key])
        results = _run(cuts[key], program.block, (*leaves, *arguments))
        return jax.tree.unflatten(program.out_tree, results)

    return smaller


def smaller_shapes(coupling: Coupling, keep: Mapping[Dim, np.ndarray]) -> Any:
    """A function from values to their shapes after a cut.

    Args:
        coupling: an analysed program.
        keep: which units stay, by atom.

    Returns:
        ``shape(value)``.
    """
    sizes: dict[Dim, int] = {atom: int(mask.sum()) for atom, mask in keep.items()}

    def size(dim: Dim) -> int:
        dim = find(dim)
        if dim in sizes:
            return sizes[dim]
        if dim.parts:
            return sum(size(part) for part in dim.parts)
        return int(np.prod([size(f) for f in dim.factors])) if dim.factors else dim.size

    return lambda value: tuple(size(dim) for dim in coupling.flow.of(value))


def _cut(coupling: Coupling, cut: Kept) -> _Cut:
    """Say for every atom which units stay, from what stays of the leaves."""
    keep: dict[Dim, np.ndarray] = {}
    for path, value in coupling.program.leaves.items():
        staying = cut.get(path, (None,) * len(value.shape))
        for axis, (dim, stay) in enumerate(zip(coupling.flow.of(value), staying, strict=True)):
            mask = np.full((dim.size,), stay is None)
            if stay is not None:
                mask[stay] = True
            _assign(dim, mask, keep, f"{path} axis {axis}")
    for atom in [atom for atom, mask in keep.items() if mask.all()]:
        del keep[atom]
    for group in coupling.groups:
        if group.fixed is not None and coupling.units[group.name] in keep:
            raise ValueError(f"{group.name}: cannot be cut in this function: {group.fixed}")
    return _Cut(coupling, keep, {})


def _assign(dim: Dim, mask: np.ndarray, keep: dict[Dim, np.ndarray], where: str) -> None:
    """Take an axis' kept positions apart into those of its atoms."""
    dim = find(dim)
    if dim.parts:
        offset = 0
        for part in dim.parts:
            _assign(part, mask[offset : offset + part.size], keep, where)
            offset += part.size
    elif dim.factors:
        grid = mask.reshape([find(factor).size for factor in dim.factors])
        for i, factor in enumerate(dim.factors):
            others = tuple(j for j in range(grid.ndim) if j != i)
            _assign(factor, np.asarray(grid.any(others)), keep, where)
        if (kept(dim, keep) != mask).any():
            raise ValueError(f"{where}: the kept positions are not whole units of {dim}")
    elif dim.size > 1 and (keep.setdefault(dim, mask) != mask).any():
        raise ValueError(
            f"{where}: another leaf keeps other channels, but this function ties the two"
        )


def _check_leaves(params: Any, cut: _Cut) -> list[Any]:
    program = cut.coupling.program
    if jax.tree.structure(params) != program.params_tree:
        raise ValueError(
            f"params: {jax.tree.structure(params)} is not the structure of the model that was cut, "
            f"{program.params_tree}"
        )
    leaves = jax.tree.leaves(params)
    for leaf, (path, value) in zip(leaves, program.leaves.items(), strict=True):
        expected = _shape(cut, value)
        if tuple(leaf.shape) != expected:
            raise ValueError(
                f"{path}: shape {tuple(leaf.shape)}, but the smaller model has {expected}: "
                "pass the smaller parameters"
            )
    return leaves


def _masks(cut: _Cut, value: Value) -> tuple[np.ndarray | None, ...]:
    """What stays of each axis of a value."""
    if value not in cut.masks:
        cut.masks[value] = tuple(
            kept(dim, cut.keep) if any(atom in cut.keep for atom in atoms(dim)) else None
            for dim in cut.coupling.flow.of(value)
        )
    return cut.masks[value]


def _is_cut(cut: _Cut, value: Value) -> bool:
    return any(mask is not None for mask in _masks(cut, value))


def _shape(cut: _Cut, value: Value) -> tuple[int, ...]:
    masks = zip(value.shape, _masks(cut, value), strict=True)
    return tuple(size if mask is None else int(mask.sum()) for size, mask in masks)


def _shrink(cut: _Cut, value: Value, array: Any) -> Any:
    """The kept positions of a full-size array."""
    for axis, mask in enumerate(_masks(cut, value)):
        if mask is not None:
            array = _take(array, np.flatnonzero(mask), axis)
    return array


def _take(array: Any, indices: np.ndarray, axis: int) -> Any:
    if isinstance(array, np.ndarray):
        return np.take(array, indices, axis)
    if len(indices) and (np.diff(indices) == 1).all():
        return jax.lax.slice_in_dim(array, int(indices[0]), int(indices[-1]) + 1, axis=axis)
    return jnp.take(array, indices, axis, mode="clip", unique_indices=True, indices_are_sorted=True)


def _run(cut: _Cut, block: Block, arguments: Sequence[Any]) -> list[Any]:
    """Evaluate a block on smaller arrays."""
    arrays = dict(zip(block.inputs, arguments, strict=True))

    def array(value: Value) -> Any:
        return arrays[value] if value in arrays else _shrink(cut, value, value.constant)

    for op in block.ops:
        results = _bind(cut, op, [array(value) for value in op.inputs])
        arrays.update(zip(op.outputs, results, strict=True))
    return [array(value) for value in block.outputs]


def _bind(cut: _Cut, op: Op, arguments: list[Any]) -> Sequence[Any]:
    if op.blocks and _touches(cut, op):
        return _LOOPS[op.name](cut, op, arguments)
    params = op.params
    if any(_is_cut(cut, value) for value in (*op.inputs, *op.outputs)):
        if op.name in ("iota", "random_bits"):
            (whole,) = _plain(op, params, arguments)
            return [_shrink(cut, op.outputs[0], whole)]
        if op.name == "slice":
            return [_slice(cut, op, arguments[0])]
        if op.name in ("sharding_constraint", "reshard") and not _divides(cut, op):
            return arguments
        if op.name in _SMALLER:
            params = {**params, **_SMALLER[op.name](cut, op)}
        arguments = _renormalized(cut, op, arguments)
    return _plain(op, params, arguments)


def _plain(op: Op, params: dict[str, Any], arguments: Sequence[Any]) -> Sequence[Any]:
    results = op.primitive.bind(*arguments, **op.primitive.get_bind_params(params))
    return results if op.primitive.multiple_results else [results]


def _touches(cut: _Cut, op: Op) -> bool:
    values = [*op.inputs, *op.outputs]
    for block in op.blocks:
        values += block.inputs
        for inner in walk(block):
            values += [*inner.inputs, *inner.outputs]
    return any(_is_cut(cut, value) for value in values)


def _renormalized(cut: _Cut, op: Op, arguments: list[Any]) -> list[Any]:
    """A mean over channels divides by the number of those that remain."""
    summed = cut.coupling.widths.means.get(op, ())
    share = 1.0
    for atom in {find(atom) for atom in summed} & set(cut.keep):
        share *= cut.keep[atom].mean()
    if share == 1.0:
        return arguments
    divisor = 1 if op.name == "div" or _uniform_second(op) else 0
    scale = share if op.name == "div" else 1 / share
    arguments = list(arguments)
    arguments[divisor] = arguments[divisor] * np.asarray(scale, op.inputs[divisor].dtype)
    return arguments


def _uniform_second(op: Op) -> bool:
    return len(op.inputs[1].shape) == 0


def _divides(cut: _Cut, op: Op) -> bool:
    """Whether a sharding still fits the smaller array."""
    try:
        op.params["sharding"].shard_shape(_shape(cut, op.outputs[0]))
    except ValueError:
        return False
    return True


def _slice(cut: _Cut, op: Op, array: Any) -> Any:
    (value,) = op.inputs
    starts, limits = op.params["start_indices"], op.params["limit_indices"]
    strides = op.params["strides"] or (1,) * len(starts)
    for axis, mask in enumerate(_masks(cut, value)):
        positions = np.arange(starts[axis], limits[axis], strides[axis])
        if mask is not None:
            positions = (np.cumsum(mask) - 1)[positions[mask[positions]]]
        array = _take(array, positions, axis)
    return array


def _size_params(name: str) -> Callable[[_Cut, Op], dict[str, Any]]:
    return lambda cut, op: {name: _shape(cut, op.outputs[0])}


def _gather(cut: _Cut, op: Op) -> dict[str, Any]:
    sizes = zip(
        op.params["slice_sizes"], op.inputs[0].shape, _shape(cut, op.inputs[0]), strict=True
    )
    return {"slice_sizes": tuple(new if size == full else size for size, full, new in sizes)}


def _dynamic_slice(cut: _Cut, op: Op) -> dict[str, Any]:
    return {"slice_sizes": _shape(cut, op.outputs[0])}


def _pad(cut: _Cut, op: Op) -> dict[str, Any]:
    def count(mask: np.ndarray | None, low: int, high: int) -> tuple[int, int, int]:
        assert mask is not None
        return int(mask[:low].sum()), int(mask[len(mask) - high :].sum()), 0

    pairs = zip(op.params["padding_config"], _masks(cut, op.outputs[0]), strict=True)
    return {
        "padding_config": tuple(
            config if mask is None else count(mask, config[0], config[1]) for config, mask in pairs
        )
    }


def _split(cut: _Cut, op: Op) -> dict[str, Any]:
    axis = op.params["axis"]
    return {"sizes": tuple(_shape(cut, value)[axis] for value in op.outputs)}


def _tile(cut: _Cut, op: Op) -> dict[str, Any]:
    sizes = zip(_shape(cut, op.outputs[0]), _shape(cut, op.inputs[0]), strict=True)
    return {"reps": tuple(after // before if before else 1 for after, before in sizes)}


def _conv(cut: _Cut, op: Op) -> dict[str, Any]:
    numbers = op.params["dimension_numbers"]
    channels = _shape(cut, op.inputs[0])[numbers.lhs_spec[1]]
    return {"feature_group_count": channels // _shape(cut, op.inputs[1])[numbers.rhs_spec[1]]}


_SMALLER: dict[str, Callable[[_Cut, Op], dict[str, Any]]] = {
    "broadcast_in_dim": _size_params("shape"),
    "conv_general_dilated": _conv,
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
    "pad": _pad,
    "reshape": _size_params("new_sizes"),
    "split": _split,
    "tile": _tile,
}


def _scan(cut: _Cut, op: Op, arguments: list[Any]) -> Sequence[Any]:
    (block,) = op.blocks
    consts, carries = op.params["num_consts"], op.params["num_carry"]

    def body(carry: Any, xs: Any) -> Any:
        results = _run(cut, block, (*arguments[:consts], *carry, *xs))
        return results[:carries], results[carries:]

    carry, ys = jax.lax.scan(
        body,
        arguments[consts : consts + carries],
        arguments[consts + carries :],
        length=op.params["length"],
        reverse=op.params["reverse"],
        unroll=op.params["unroll"],
    )
    return [*carry, *ys]


def _while(cut: _Cut, op: Op, arguments: list[Any]) -> Sequence[Any]:
    condition, body = wirings(op)
    n = op.params["cond_nconsts"]
    m = n + op.params["body_nconsts"]
    return jax.lax.while_loop(
        lambda carry: _run(cut, condition.block, (*arguments[:n], *carry))[0],
        lambda carry: _run(cut, body.block, (*arguments[n:m], *carry)),
        arguments[m:],
    )


def _cond(cut: _Cut, op: Op, arguments: list[Any]) -> Sequence[Any]:
    def branch(block: Block) -> Callable[..., Any]:
        return lambda *inputs: _run(cut, block, inputs)

    index, *inputs = arguments
    return jax.lax.switch(index.astype(jnp.int32), [branch(b) for b in op.blocks], *inputs)


def _remat(cut: _Cut, op: Op, arguments: list[Any]) -> Sequence[Any]:
    function = jax.checkpoint(
        lambda *inputs: _run(cut, op.blocks[0], inputs),
        prevent_cse=op.params["prevent_cse"],
        policy=op.params["policy"],
    )
    return function(*arguments)


def _custom_rule(cut: _Cut, op: Op, arguments: list[Any]) -> Sequence[Any]:
    return _run(cut, op.blocks[0], arguments)


_LOOPS: dict[str, Callable[[_Cut, Op, list[Any]], Sequence[Any]]] = {
    "checkpoint": _remat,
    "cond": _cond,
    "custom_jvp_call": _custom_rule,
    "custom_vjp_call": _custom_rule,
    "remat2": _remat,
    "scan": _scan,
    "while": _while,
}
