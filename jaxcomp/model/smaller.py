"""Evaluate a program on arrays that lost channels: its operations, bound with smaller shapes."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxcomp.model.cut import Cut, is_cut, masks_of, positions_of, resolve, shape_of, shrunk, take
from jaxcomp.model.dims import kept
from jaxcomp.model.flow import follow
from jaxcomp.model.placement import divisible
from jaxcomp.model.program import Block, Op, Value, read, scan_counts, walk, wirings


def run(cut: Cut, block: Block, arguments: Sequence[Any]) -> list[Any]:
    """Evaluate a block on smaller arrays."""
    arrays = dict(zip(block.inputs, arguments, strict=True))

    def array(value: Value) -> Any:
        return arrays[value] if value in arrays else shrunk(cut, value, value.constant)

    for op in block.ops:
        results = _bind(cut, op, [array(value) for value in op.inputs])
        arrays.update(zip(op.outputs, results, strict=True))
    return [array(value) for value in block.outputs]


def _bind(cut: Cut, op: Op, arguments: list[Any]) -> Sequence[Any]:
    if op.blocks and _touches(cut, op):
        return _LOOPS[op.name](cut, op, arguments)
    params = op.params
    if any(is_cut(cut, value) for value in (*op.inputs, *op.outputs)):
        if op.name in ("iota", "random_bits"):
            (whole,) = _plain(op, params, arguments)
            return [shrunk(cut, op.outputs[0], whole)]
        if op.name == "slice":
            return [_slice(cut, op, arguments[0])]
        params = _placed(params, cut, op)
        if op.name in _SMALLER:
            params = {**params, **_SMALLER[op.name](cut, op)}
    # The sum over channels that a mean divides has lost its axis already.
    return _plain(op, params, _renormalized(cut, op, arguments))


def _plain(op: Op, params: dict[str, Any], arguments: Sequence[Any]) -> Sequence[Any]:
    results = op.primitive.bind(*arguments, **op.primitive.get_bind_params(params))
    return results if op.primitive.multiple_results else [results]


def _touches(cut: Cut, op: Op) -> bool:
    values = [*op.inputs, *op.outputs]
    for block in op.blocks:
        values += block.inputs
        for inner in walk(block):
            values += [*inner.inputs, *inner.outputs]
    return any(is_cut(cut, value) for value in values)


def _renormalized(cut: Cut, op: Op, arguments: list[Any]) -> list[Any]:
    """A mean over channels divides by the number of those that remain."""
    summed = cut.means.get(op, ())
    share = float(np.prod([kept(dim, cut.keep).mean() for dim in summed]))
    if share == 1.0:
        return arguments
    changed, scale = (1, share) if op.name == "div" else (0, 1 / share)
    arguments = list(arguments)
    arguments[changed] = arguments[changed] * np.asarray(scale, op.inputs[changed].dtype)
    return arguments


def _placed(params: dict[str, Any], cut: Cut, op: Op) -> dict[str, Any]:
    """Parameters whose placements fit the smaller result: axes that no longer divide are whole."""
    shape = shape_of(cut, op.outputs[0])
    fitting = {
        name: divisible(value, shape)
        for name, value in params.items()
        if isinstance(value, NamedSharding)
    }
    return {**params, **fitting}


def _slice(cut: Cut, op: Op, array: Any) -> Any:
    (value,) = op.inputs
    starts, limits = op.params["start_indices"], op.params["limit_indices"]
    strides = op.params["strides"] or (1,) * len(starts)
    for axis, mask in enumerate(masks_of(cut, value)):
        positions = np.arange(starts[axis], limits[axis], strides[axis])
        if mask is not None:
            positions = (np.cumsum(mask) - 1)[positions[mask[positions]]]
        if len(positions) != array.shape[axis]:
            array = take(array, positions, axis)
    return array


def _size_params(name: str) -> Callable[[Cut, Op], dict[str, Any]]:
    return lambda cut, op: {name: shape_of(cut, op.outputs[0])}


def _gather(cut: Cut, op: Op) -> dict[str, Any]:
    sizes = zip(
        op.params["slice_sizes"], op.inputs[0].shape, shape_of(cut, op.inputs[0]), strict=True
    )
    return {"slice_sizes": tuple(new if size == full else size for size, full, new in sizes)}


def _dynamic_slice(cut: Cut, op: Op) -> dict[str, Any]:
    return {"slice_sizes": shape_of(cut, op.outputs[0])}


def _pad(cut: Cut, op: Op) -> dict[str, Any]:
    def count(mask: np.ndarray | None, low: int, high: int) -> tuple[int, int, int]:
        assert mask is not None
        return int(mask[:low].sum()), int(mask[len(mask) - high :].sum()), 0

    pairs = zip(op.params["padding_config"], masks_of(cut, op.outputs[0]), strict=True)
    return {
        "padding_config": tuple(
            config if mask is None else count(mask, int(config[0]), int(config[1]))
            for config, mask in pairs
        )
    }


def _split(cut: Cut, op: Op) -> dict[str, Any]:
    axis = op.params["axis"]
    return {"sizes": tuple(shape_of(cut, value)[axis] for value in op.outputs)}


def _tile(cut: Cut, op: Op) -> dict[str, Any]:
    sizes = zip(shape_of(cut, op.outputs[0]), shape_of(cut, op.inputs[0]), strict=True)
    return {"reps": tuple(after // before if before else 1 for after, before in sizes)}


def _conv(cut: Cut, op: Op) -> dict[str, Any]:
    numbers = op.params["dimension_numbers"]
    channels = shape_of(cut, op.inputs[0])[numbers.lhs_spec[1]]
    return {"feature_group_count": channels // shape_of(cut, op.inputs[1])[numbers.rhs_spec[1]]}


_SMALLER: dict[str, Callable[[Cut, Op], dict[str, Any]]] = {
    "broadcast_in_dim": _size_params("shape"),
    "conv_general_dilated": _conv,
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
    "pad": _pad,
    "reshape": _size_params("new_sizes"),
    "split": _split,
    "tile": _tile,
}


def _scan(cut: Cut, op: Op, arguments: list[Any]) -> Sequence[Any]:
    (block,) = op.blocks
    consts, carries = scan_counts(op)

    def body(carry: Any, xs: Any) -> Any:
        results = run(cut, block, (*arguments[:consts], *carry, *xs))
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


def _while(cut: Cut, op: Op, arguments: list[Any]) -> Sequence[Any]:
    condition, body = wirings(op)
    n = op.params["cond_nconsts"]
    m = n + op.params["body_nconsts"]
    return jax.lax.while_loop(
        lambda carry: run(cut, condition.block, (*arguments[:n], *carry))[0],
        lambda carry: run(cut, body.block, (*arguments[n:m], *carry)),
        arguments[m:],
    )


def _cond(cut: Cut, op: Op, arguments: list[Any]) -> Sequence[Any]:
    def branch(block: Block) -> Callable[..., Any]:
        return lambda *inputs: run(cut, block, inputs)

    index, *inputs = arguments
    return jax.lax.switch(index.astype(jnp.int32), [branch(b) for b in op.blocks], *inputs)


def _remat(cut: Cut, op: Op, arguments: list[Any]) -> Sequence[Any]:
    function = jax.checkpoint(
        lambda *inputs: run(cut, op.blocks[0], inputs),
        prevent_cse=op.params["prevent_cse"],
        policy=op.params["policy"],
    )
    return function(*arguments)


def _custom_jvp(cut: Cut, op: Op, arguments: list[Any]) -> Sequence[Any]:
    if _renormalizes(cut, op):
        return run(cut, op.blocks[0], arguments)
    function = jax.custom_jvp(lambda *xs: tuple(run(cut, op.blocks[0], xs)))

    def rule(primals: Any, tangents: Any) -> Any:
        push = lambda inputs: jax.jvp(lambda *xs: tuple(_plain(op, op.params, xs)), *inputs)
        return _smaller_rule(cut, op, push, (primals, tangents), 2)

    function.defjvp(rule)
    return function(*arguments)


def _custom_vjp(cut: Cut, op: Op, arguments: list[Any]) -> Sequence[Any]:
    if _renormalizes(cut, op):
        return run(cut, op.blocks[0], arguments)
    function = jax.custom_vjp(lambda *xs: tuple(run(cut, op.blocks[0], xs)))

    def pull(inputs: Any) -> Any:
        primals, cotangents = inputs
        return jax.vjp(lambda *xs: tuple(_plain(op, op.params, xs)), *primals)[1](cotangents)

    # The rule is traced with its own forward pass, which the compiler shares with this one.
    function.defvjp(
        lambda *xs: (function(*xs), xs),
        lambda xs, cotangents: _smaller_rule(cut, op, pull, (xs, cotangents), 1),
    )
    return function(*arguments)


def _smaller_rule(
    cut: Cut, op: Op, rule: Callable[[Any], Any], inputs: tuple[Any, Any], copies: int
) -> Any:
    """Run a derivative rule of an operation, written for full-size arrays, on smaller ones."""
    values = (*op.inputs, *(op.inputs if copies == 2 else op.outputs))
    leaves, structure = jax.tree.flatten(inputs)
    full = [
        jax.ShapeDtypeStruct(value.shape, leaf.dtype)
        for value, leaf in zip(values, leaves, strict=True)
    ]
    program = read(rule, jax.tree.unflatten(structure, full))
    staying = {
        name: positions_of(cut, value) for name, value in zip(program.leaves, values, strict=True)
    }
    smaller = resolve(follow(program), {}, program.leaves, staying)
    results = run(smaller, program.block, leaves)
    return jax.tree.unflatten(program.out_tree, results)


def _renormalizes(cut: Cut, op: Op) -> bool:
    """Whether a mean in this operation changes, which its own rule knows nothing of."""
    return any(inner in cut.means for inner in walk(op.blocks[0]))


_LOOPS: dict[str, Callable[[Cut, Op, list[Any]], Sequence[Any]]] = {
    "checkpoint": _remat,
    "cond": _cond,
    "custom_jvp_call": _custom_jvp,
    "custom_vjp_call": _custom_vjp,
    "remat2": _remat,
    "scan": _scan,
    "while": _while,
}
