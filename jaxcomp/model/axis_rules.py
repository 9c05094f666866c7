"""What each operation makes of its inputs' axes: one rule for each kind of operation.

A rule hands axes on, unites them, splits them, or fixes them because the operation treats
positions differently (a convolution's window, a sort, an index). An operation without a rule fixes
all that it touches, and is named as the reason.
"""

from collections.abc import Callable, Sequence
from typing import Any

from jaxcomp.model.axes import Axes, Flow
from jaxcomp.model.dims import Dim
from jaxcomp.model.program import Op

# Position by position, on inputs of one shape (or of size 1 where they are broadcast).
_ELEMENTWISE = """
    abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp
    clz complex conj convert_element_type copy copy_p cos cosh device_put digamma div eq eq_to erf
    erf_inv erfc exp exp2 expm1 floor ge gt igamma igamma_grad_a igammac imag integer_pow is_finite
    le le_to lgamma log log1p log2 logistic lt lt_to max mesh_cast min mul mulhi name ne neg
    nextafter not one_minus_square optimization_barrier or polygamma population_count pow pvary real
    reduce_precision regularized_incomplete_beta rem reshard round rsqrt select_n
    sharding_constraint shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt
    square stop_gradient sub tan tanh xor zeta
"""
_REDUCTIONS = """
    argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum reduce_xor
"""
ELEMENTWISE = frozenset(_ELEMENTWISE.split())
REDUCTIONS = frozenset(_REDUCTIONS.split())
# Identities on several arrays at once.
SIDE_BY_SIDE = frozenset({"optimization_barrier", "device_put"})
SCATTERS = frozenset(
    {"scatter", "scatter-add", "scatter-sub", "scatter-mul", "scatter-min", "scatter-max"}
)
_CUMULATIVE = frozenset({"cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"})
_WINDOWS = frozenset({"reduce_window_sum", "reduce_window_max", "reduce_window_min"})


def opaque(flow: Flow, op: Op) -> list[Axes]:
    """Fix every axis of an operation: nobody knows what it does with them."""
    reason = f"{op} is not followed"
    for value in op.inputs:
        flow.fix(flow.of(value), reason)
    return [flow.fresh(value, reason) for value in op.outputs]


def _bitcast(flow: Flow, op: Op) -> list[Axes]:
    same_rank = op.inputs[0].shape == op.outputs[0].shape
    return [flow.of(op.inputs[0])] if same_rank else opaque(flow, op)


def _elementwise(flow: Flow, op: Op) -> list[Axes]:
    if op.name in SIDE_BY_SIDE:
        return [flow.of(value) for value in op.inputs]
    (output,) = op.outputs
    axes: list[Dim] = [flow.dims.atom(1) for _ in output.shape]
    for value in op.inputs:
        if len(value.shape) != len(output.shape):
            continue  # a scalar beside arrays
        for i, dim in enumerate(flow.of(value)):
            if axes[i].size == 1 != dim.size:
                axes[i] = dim
            elif dim.size == axes[i].size != 1:
                flow.dims.unite(axes[i], dim, str(op))
    for i, dim in enumerate(axes):
        if dim.size != output.shape[i]:
            axes[i] = flow.dims.atom(output.shape[i])
    return [tuple(axes)]


def _reshape(flow: Flow, op: Op) -> list[Axes]:
    if op.params.get("dimensions") is not None or 0 in op.outputs[0].shape:
        return opaque(flow, op)
    out = flow.fresh(op.outputs[0])
    dims = flow.dims
    before, after = dims.product(flow.of(op.inputs[0])), dims.product(out)
    if before.size != 1:
        dims.unite(before, after, str(op))
    return [out]


def _squeeze(flow: Flow, op: Op) -> list[Axes]:
    axes, gone = flow.of(op.inputs[0]), op.params["dimensions"]
    return [tuple(dim for i, dim in enumerate(axes) if i not in gone)]


def _expand_dims(flow: Flow, op: Op) -> list[Axes]:
    axes = iter(flow.of(op.inputs[0]))
    new = op.params["dimensions"]
    rank = len(op.outputs[0].shape)
    return [tuple(flow.dims.atom(1) if i in new else next(axes) for i in range(rank))]


def _transpose(flow: Flow, op: Op) -> list[Axes]:
    axes = flow.of(op.inputs[0])
    return [tuple(axes[i] for i in op.params["permutation"])]


def _broadcast(flow: Flow, op: Op) -> list[Axes]:
    out = list(flow.fresh(op.outputs[0]))
    for dim, i in zip(flow.of(op.inputs[0]), op.params["broadcast_dimensions"], strict=True):
        if dim.size == out[i].size:
            out[i] = dim
    return [tuple(out)]


def _source(flow: Flow, op: Op) -> list[Axes]:
    """Made from nothing: every axis is free."""
    return [flow.fresh(value) for value in op.outputs]


def _concatenate(flow: Flow, op: Op) -> list[Axes]:
    axis = op.params["dimension"]
    inputs = [flow.of(value) for value in op.inputs]
    out = list(inputs[0])
    for axes in inputs[1:]:
        flow.unite(out[:axis] + out[axis + 1 :], axes[:axis] + axes[axis + 1 :], str(op))
    out[axis] = flow.dims.concat([axes[axis] for axes in inputs])
    return [tuple(out)]


def _stack(flow: Flow, op: Op) -> list[Axes]:
    axis = op.params["axis"]
    inputs = [flow.of(value) for value in op.inputs]
    for axes in inputs[1:]:
        flow.unite(inputs[0], axes, str(op))
    new = flow.dims.atom(len(inputs), f"{op} made it")
    return [(*inputs[0][:axis], new, *inputs[0][axis:])]


def _unstack(flow: Flow, op: Op) -> list[Axes]:
    axis = op.params["axis"]
    axes = flow.of(op.inputs[0])
    flow.dims.fix(axes[axis], f"{op} takes it apart")
    return [(*axes[:axis], *axes[axis + 1 :])] * len(op.outputs)


def _tile(flow: Flow, op: Op) -> list[Axes]:
    pairs = zip(flow.of(op.inputs[0]), op.params["reps"], strict=True)
    return [tuple(flow.dims.product([flow.dims.atom(n), dim]) for dim, n in pairs)]


def _cut(flow: Flow, dim: Dim, sizes: Sequence[int], reason: str) -> list[Dim]:
    """One axis as consecutive pieces."""
    pieces = [flow.dims.atom(size) for size in sizes]
    flow.dims.unite(dim, flow.dims.concat(pieces), reason)
    return pieces


def _split(flow: Flow, op: Op) -> list[Axes]:
    axis = op.params["axis"]
    axes = flow.of(op.inputs[0])
    pieces = _cut(flow, axes[axis], [int(size) for size in op.params["sizes"]], str(op))
    return [(*axes[:axis], piece, *axes[axis + 1 :]) for piece in pieces]


def _slice(flow: Flow, op: Op) -> list[Axes]:
    axes = flow.of(op.inputs[0])
    starts, limits = op.params["start_indices"], op.params["limit_indices"]
    strides = op.params["strides"] or (1,) * len(axes)
    out = [
        _slice_axis(flow, op, *arguments)
        for arguments in zip(axes, starts, limits, strides, op.outputs[0].shape, strict=True)
    ]
    return [tuple(out)]


def _slice_axis(
    flow: Flow, op: Op, dim: Dim, start: int, limit: int, stride: int, size: int
) -> Dim:
    if size == dim.size:
        return dim
    if size == 0:
        return flow.dims.atom(0)
    if stride == 1:
        sizes = [start, limit - start, dim.size - limit]
        pieces = _cut(flow, dim, sizes, str(op))
        return pieces[1]
    if dim.size % stride == 0 and size == dim.size // stride and start < stride:
        # Every stride-th channel: one column of (size, stride).
        rows, column = flow.dims.atom(size), flow.dims.atom(stride)
        flow.dims.unite(dim, flow.dims.product([rows, column]), str(op))
        flow.dims.fix(column, f"{op} takes one in {stride}")
        return rows
    flow.dims.fix(dim, f"{op} takes some positions of it")
    return flow.dims.atom(size, f"{op} takes some positions")


def _dynamic_slice(flow: Flow, op: Op) -> list[Axes]:
    out = []
    for dim, size in zip(flow.of(op.inputs[0]), op.params["slice_sizes"], strict=True):
        if size == dim.size:
            out.append(dim)
        else:
            flow.dims.fix(dim, f"{op} takes positions of it that only the running program knows")
            out.append(flow.dims.atom(size, f"{op} takes some positions"))
    return [tuple(out)]


def _dynamic_update_slice(flow: Flow, op: Op) -> list[Axes]:
    axes, update = flow.of(op.inputs[0]), flow.of(op.inputs[1])
    for dim, new in zip(axes, update, strict=True):
        if dim.size == new.size:
            flow.dims.unite(dim, new, str(op))
        else:
            flow.fix((dim, new), f"{op} writes to some positions of it")
    return [axes]


def _pad(flow: Flow, op: Op) -> list[Axes]:
    out = []
    for dim, (low, high, interior), size in zip(
        flow.of(op.inputs[0]), op.params["padding_config"], op.outputs[0].shape, strict=True
    ):
        if low == high == interior == 0:
            out.append(dim)
        elif interior == 0 and low >= 0 and high >= 0:
            dims = flow.dims
            out.append(dims.concat([dims.atom(int(low)), dim, dims.atom(int(high))]))
        else:
            flow.dims.fix(dim, f"{op} pads inside it or cuts it")
            out.append(flow.dims.atom(size, str(op)))
    return [tuple(out)]


def _reduce(flow: Flow, op: Op) -> list[Axes]:
    # Whether a reduced axis may lose channels is a matter of values: law.py.
    axes = flow.of(op.inputs[0])
    if op.name in ("argmax", "argmin"):
        flow.fix([axes[i] for i in op.params["axes"]], f"{op} returns a position")
    return [tuple(dim for i, dim in enumerate(axes) if i not in op.params["axes"])]


def _cumulative(flow: Flow, op: Op) -> list[Axes]:
    axes = flow.of(op.inputs[0])
    flow.dims.fix(axes[op.params["axis"]], f"{op} runs along it")
    return [axes]


def _sort(flow: Flow, op: Op) -> list[Axes]:
    axes = flow.of(op.inputs[0])
    for value in op.inputs[1:]:
        flow.unite(axes, flow.of(value), str(op))
    flow.dims.fix(axes[op.params["dimension"]], f"{op} orders along it")
    return [axes] * len(op.outputs)


def _reverse(flow: Flow, op: Op) -> list[Axes]:
    axes = flow.of(op.inputs[0])
    flow.fix([axes[i] for i in op.params["dimensions"]], f"{op} reverses it")
    return [axes]


def _top_k(flow: Flow, op: Op) -> list[Axes]:
    axes = flow.of(op.inputs[0])
    axis = op.params.get("axis", len(axes) - 1) % len(axes)
    flow.dims.fix(axes[axis], f"{op} orders along it")
    new = flow.dims.atom(op.outputs[0].shape[axis], str(op))
    return [(*axes[:axis], new, *axes[axis + 1 :])] * len(op.outputs)


def _dot(flow: Flow, op: Op) -> list[Axes]:
    (contract, batch) = op.params["dimension_numbers"]
    lhs, rhs = (flow.of(value) for value in op.inputs)
    for i, j in (*zip(*contract, strict=True), *zip(*batch, strict=True)):
        flow.dims.unite(lhs[i], rhs[j], str(op))
    used = [set(contract[side]) | set(batch[side]) for side in (0, 1)]
    free = [dim for i, dim in enumerate(lhs) if i not in used[0]]
    free += [dim for i, dim in enumerate(rhs) if i not in used[1]]
    return [(*(lhs[i] for i in batch[0]), *free)]


def conv_axes(op: Op) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Axes (batch, channel), (output, input) and (batch, channel) of a convolution's arrays."""
    numbers = op.params["dimension_numbers"]
    return numbers.lhs_spec[:2], numbers.rhs_spec[:2], numbers.out_spec[:2]


def _conv(flow: Flow, op: Op) -> list[Axes]:
    if op.params["batch_group_count"] != 1:
        return opaque(flow, op)
    (lhs_batch, lhs_channel), (rhs_out, rhs_in), (out_batch, out_channel) = conv_axes(op)
    lhs, rhs = (flow.of(value) for value in op.inputs)
    dims, groups = flow.dims, op.params["feature_group_count"]
    for axes, used in ((lhs, (lhs_batch, lhs_channel)), (rhs, (rhs_out, rhs_in))):
        flow.fix([dim for i, dim in enumerate(axes) if i not in used], f"{op} slides along it")
    if groups == 1:
        dims.unite(lhs[lhs_channel], rhs[rhs_in], str(op))
    else:
        # Input channels are (group, input), filters (group, output): the groups go together.
        group, outputs = dims.atom(groups), dims.atom(rhs[rhs_out].size // groups)
        dims.unite(lhs[lhs_channel], dims.product([group, rhs[rhs_in]]), str(op))
        dims.unite(rhs[rhs_out], dims.product([group, outputs]), str(op))
    out = list(flow.fresh(op.outputs[0], f"{op} slides along it"))
    out[out_batch], out[out_channel] = lhs[lhs_batch], rhs[rhs_out]
    return [tuple(out)]


def _window(flow: Flow, op: Op) -> list[Axes]:
    axes, out = flow.of(op.inputs[0]), []
    params = op.params
    for i, dim in enumerate(axes):
        moves = (params["window_dimensions"][i], params["window_strides"][i])
        if moves == (1, 1) and op.outputs[0].shape[i] == dim.size:
            out.append(dim)
        else:
            flow.dims.fix(dim, f"{op} slides along it")
            out.append(flow.dims.atom(op.outputs[0].shape[i], f"{op} slides along it"))
    return [tuple(out)]


def _gather(flow: Flow, op: Op) -> list[Axes]:
    numbers, sizes = op.params["dimension_numbers"], op.params["slice_sizes"]
    operand, indices = (flow.of(value) for value in op.inputs)
    out = list(flow.fresh(op.outputs[0]))
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    windows = iter(numbers.offset_dims)
    for i, dim in enumerate(operand):
        if i in numbers.operand_batching_dims:
            j = numbers.start_indices_batching_dims[numbers.operand_batching_dims.index(i)]
            flow.dims.unite(dim, indices[j], str(op))
        elif sizes[i] != dim.size or i in numbers.start_index_map:
            flow.dims.fix(dim, f"{op} takes positions of it by index")
        if i not in gone:
            position = next(windows)
            if sizes[i] == dim.size:
                out[position] = dim
            else:
                flow.dims.fix(out[position], f"{op} takes positions by index")
    batch = [i for i in range(len(out)) if i not in numbers.offset_dims]
    for i, dim in zip(batch, indices[:-1], strict=True):
        out[i] = dim
    return [tuple(out)]


def _scatter(flow: Flow, op: Op) -> list[Axes]:
    numbers = op.params["dimension_numbers"]
    operand, indices, updates = (flow.of(value) for value in op.inputs)
    windows = iter(numbers.update_window_dims)
    for i, dim in enumerate(operand):
        if i in numbers.operand_batching_dims:
            j = numbers.scatter_indices_batching_dims[numbers.operand_batching_dims.index(i)]
            flow.dims.unite(dim, indices[j], str(op))
        elif i in numbers.scatter_dims_to_operand_dims:
            flow.dims.fix(dim, f"{op} writes to positions of it by index")
        if i in numbers.inserted_window_dims or i in numbers.operand_batching_dims:
            continue
        update = updates[next(windows)]
        if update.size == dim.size:
            flow.dims.unite(dim, update, str(op))
        else:
            flow.fix((dim, update), f"{op} writes to positions of it by index")
    batch = [dim for i, dim in enumerate(updates) if i not in numbers.update_window_dims]
    for update, dim in zip(batch, indices[:-1], strict=True):
        flow.dims.unite(update, dim, str(op))
    return [operand]


RULES: dict[str, Callable[[Flow, Op], Any]] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys(REDUCTIONS, _reduce),
    **dict.fromkeys(_CUMULATIVE, _cumulative),
    **dict.fromkeys(_WINDOWS, _window),
    **dict.fromkeys(SCATTERS, _scatter),
    "bitcast_convert_type": _bitcast,
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "conv_general_dilated": _conv,
    "dot_general": _dot,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "expand_dims": _expand_dims,
    "gather": _gather,
    "iota": _source,
    "pad": _pad,
    "random_bits": _source,
    "reshape": _reshape,
    "rev": _reverse,
    "slice": _slice,
    "sort": _sort,
    "split": _split,
    "squeeze": _squeeze,
    "stack": _stack,
    "tile": _tile,
    "top_k": _top_k,
    "transpose": _transpose,
    "unstack": _unstack,
}
