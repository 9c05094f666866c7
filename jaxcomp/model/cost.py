"""What one operation costs, from its shapes alone.

FLOPs follow the conventions of XLA's own ``cost_analysis()`` of the program as lowered, before any
optimization: a multiply-accumulate is two, a convolution counts the positions that lie on the input
and not those on its padding, an element-wise operation one for each element, a reduction one for
each element that it takes away. ``exp``, ``tanh``, ``sqrt`` and their like are *transcendentals*,
not FLOPs; an operation that XLA spells out in simpler ones (``erfc``, ``logistic``, ``sinh``) costs
what its float32 spelling in JAX 0.10 does. What differs from XLA on purpose:

- a cumulative sum is one for each element; XLA counts the window that its CPU lowering makes of it,
  which grows with the square of the length;
- casts around functions that XLA computes wider than bfloat16 are not counted;
- random bits are not counted, for XLA counts one turn of the generator's loop: :func:`is_counted`
  tells which operations have no rule here;
- a reshape moves no bytes, and a gather or a slice reads what it returns, not the whole array.

Bytes are inputs plus outputs, each operation by itself: what a program without any fusion moves.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

# FLOPs and transcendentals for each element of the result.
_PER_ELEMENT: dict[str, tuple[int, int]] = {
    **dict.fromkeys(
        """
        abs add add_any and ceil clamp clz complex conj div eq floor ge gt imag is_finite le lt max
        min mul ne neg not or population_count real reduce_precision rem round shift_left
        shift_right_arithmetic shift_right_logical sign square sub xor psum psum2 psum_invariant
        pmax pmin select_n integer_pow convert_element_type
        """.split(),  # noqa: SIM905 (a table reads better)
        (1, 0),
    ),
    **dict.fromkeys(
        """
        atan atan2 cbrt cos erf exp expm1 log log1p pow rsqrt sin sqrt tan tanh
        """.split(),  # noqa: SIM905
        (0, 1),
    ),
    **dict.fromkeys(
        """
        copy copy_p device_put layout_constraint mesh_cast name optimization_barrier pcast pvary
        reshard sharding_constraint stop_gradient
        """.split(),  # noqa: SIM905
        (0, 0),
    ),
    "acos": (3, 2),
    "acosh": (7, 4),
    "asin": (5, 2),
    "asinh": (11, 3),
    "atanh": (6, 2),
    "bessel_i0e": (83, 1),
    "cosh": (3, 2),
    "digamma": (73, 3),
    "erf_inv": (37, 2),
    "erfc": (62, 1),
    "exp2": (1, 1),
    "lgamma": (53, 4),
    "logistic": (3, 1),
    "nextafter": (24, 0),
    "sinh": (10, 3),
}
ELEMENTWISE = frozenset(_PER_ELEMENT)

# FLOPs for each element that a reduction takes away.
_PER_REDUCED = {
    **dict.fromkeys([f"reduce_{n}" for n in ("sum", "max", "min", "prod", "and", "or", "xor")], 1),
    "argmax": 9,
    "argmin": 9,
}
REDUCTIONS = frozenset(_PER_REDUCED)

# FLOPs and transcendentals for each element of a running sum, product, ….
_PER_RUNNING = {
    "cumsum": (1, 0),
    "cumprod": (1, 0),
    "cummax": (1, 0),
    "cummin": (1, 0),
    "cumlogsumexp": (8, 2),
}
_WINDOWED = frozenset({"reduce_window_sum", "reduce_window_max", "reduce_window_min"})
# Only move things about, and read no more than they return.
_VIEWS = frozenset({"reshape", "squeeze", "expand_dims"})
_PICKS = frozenset({"slice", "dynamic_slice", "gather", "split"})
_SCATTERS = frozenset(
    {f"scatter{mark}{name}" for mark in "-_" for name in ("add", "sub", "mul", "min", "max")}
)
_WRITES = frozenset({"dynamic_update_slice", "scatter"}) | _SCATTERS
_MOVES = frozenset(
    {"all_gather", "all_gather_invariant", "all_to_all", "axis_index", "broadcast_in_dim"}
    | {"concatenate", "bitcast_convert_type", "iota", "pad", "ppermute", "rev", "transpose"}
    | {"stack", "tile", "unstack"}
    | {"random_wrap", "random_unwrap", "create_token", "empty", "debug_callback", "print"}
)


class Cost(NamedTuple):
    """What an operation costs.

    Attributes:
        flops: arithmetic operations, as XLA counts them.
        bytes: of its inputs and outputs.
        macs: multiply-accumulates of dot products and convolutions; part of ``flops``, twice.
        transcendentals: evaluations of ``exp``, ``tanh``, ``sqrt``, …; not part of ``flops``.
    """

    flops: int
    bytes: int
    macs: int
    transcendentals: int = 0

    def __add__(self, other: Any) -> "Cost":
        """The cost of both."""
        return Cost(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, count: int) -> "Cost":
        """The cost of so many of the same."""
        return Cost(*(count * part for part in self))


NOTHING = Cost(0, 0, 0, 0)
_Shapes = Sequence[tuple[int, ...]]


def is_counted(name: str) -> bool:
    """Whether the FLOPs of an operation without bodies are known.

    Args:
        name: of the primitive.

    Example:
        >>> is_counted("dot_general"), is_counted("cholesky")
        (True, False)
    """
    return (
        name in ELEMENTWISE | REDUCTIONS | _VIEWS | _PICKS | _WRITES | _MOVES | _WINDOWED
        or name in _PER_RUNNING
        or name in {"dot_general", "conv_general_dilated", "ragged_dot_general", "sort", "top_k"}
    )


def op_cost(
    name: str,
    params: Mapping[str, Any],
    input_shapes: _Shapes,
    output_shapes: _Shapes,
    input_dtypes: Sequence[Any],
    output_dtypes: Sequence[Any],
) -> Cost:
    """The cost of one operation, from its shapes; nothing is traced or run.

    Args:
        name: of the primitive, such as ``"dot_general"``.
        params: its parameters, as in the jaxpr.
        input_shapes: of its inputs, which need not be those that it was traced with.
        output_shapes: of its outputs.
        input_dtypes: of its inputs.
        output_dtypes: of its outputs.

    Returns:
        The cost. The FLOPs of an operation that :func:`is_counted` does not know are 0, as are
        those of the bodies of a loop.

    Example:
        >>> numbers = {"dimension_numbers": (((1,), (0,)), ((), ()))}
        >>> float32 = np.dtype("float32")
        >>> op_cost("dot_general", numbers, [(4, 8), (8, 2)], [(4, 2)], [float32] * 2, [float32])
        Cost(flops=128, bytes=224, macs=64, transcendentals=0)
    """
    moved = _bytes(name, input_shapes, output_shapes, input_dtypes, output_dtypes)
    if name in {"dot_general", "conv_general_dilated", "ragged_dot_general"}:
        macs = _MACS[name](params, input_shapes, output_shapes)
        return Cost(2 * macs, moved, macs)
    flops, transcendentals = _arithmetic(name, params, input_shapes, output_shapes)
    if name == "convert_element_type" and input_dtypes[0] == output_dtypes[0]:
        flops = 0
    return Cost(flops, moved, 0, transcendentals)


def _arithmetic(
    name: str, params: Mapping[str, Any], inputs: _Shapes, outputs: _Shapes
) -> tuple[int, int]:
    """FLOPs and transcendentals of what is neither a dot product nor a convolution."""
    made = sum(map(math.prod, outputs))
    if name in _PER_ELEMENT:
        flops, transcendentals = _PER_ELEMENT[name]
        if name == "integer_pow":
            flops = _multiplications(int(params["y"]))
        elif name == "select_n" and len(inputs) > 3:
            flops = 2 * (len(inputs) - 2)
        return made * flops, made * transcendentals
    if name in _PER_REDUCED:
        return _PER_REDUCED[name] * max(0, math.prod(inputs[0]) - made), 0
    if name in _PER_RUNNING:
        flops, transcendentals = _PER_RUNNING[name]
        return made * flops, made * transcendentals
    if name in _WINDOWED:
        return made * (math.prod(params["window_dimensions"]) - 1), 0
    if name == "gather" or name.startswith("scatter"):
        combined = math.prod(inputs[2]) if name in _SCATTERS else 0
        return combined + _bounds(name, params, inputs[1], made), 0
    if name in {"sort", "top_k"}:
        count = math.prod(inputs[0])
        return count * max(0, count - 1).bit_length(), 0
    return 0, 0


def _bounds(name: str, params: Mapping[str, Any], indices: tuple[int, ...], made: int) -> int:
    """What it takes to keep the indices of a gather or scatter within the array."""
    mode = getattr(params.get("mode"), "name", "")
    count = math.prod(indices)
    if name == "gather" and mode == "FILL_OR_DROP":
        # Two comparisons and their conjunction for each, one verdict a row, one choice an element.
        return 4 * count - math.prod(indices[:-1]) + made
    return count if name != "gather" and mode == "CLIP" else 0


def _multiplications(exponent: int) -> int:
    """How many it takes to raise to a power by squaring, and one to divide by the result."""
    size = abs(exponent)
    return max(0, size.bit_length() - 1 + size.bit_count() - 1) + (exponent < 0)


def _dot_macs(params: Mapping[str, Any], inputs: _Shapes, outputs: _Shapes) -> int:
    (contracted, _), _ = params["dimension_numbers"]
    return math.prod(outputs[0]) * math.prod(inputs[0][axis] for axis in contracted)


def _ragged_macs(params: Mapping[str, Any], inputs: _Shapes, outputs: _Shapes) -> int:
    # Each row of the left meets one group of the right.
    numbers = params["ragged_dot_dimension_numbers"].dot_dimension_numbers
    return _dot_macs({"dimension_numbers": numbers}, inputs, outputs)


def _conv_macs(params: Mapping[str, Any], inputs: _Shapes, outputs: _Shapes) -> int:
    numbers = params["dimension_numbers"]
    image, kernel = inputs[:2]
    out = outputs[0]
    places = 1
    for i in range(len(image) - 2):
        places *= _places(
            image[numbers.lhs_spec[2 + i]],
            kernel[numbers.rhs_spec[2 + i]],
            out[numbers.out_spec[2 + i]],
            params["window_strides"][i],
            params["padding"][i][0],
            params["lhs_dilation"][i],
            params["rhs_dilation"][i],
        )
    # The kernel's input axis holds the channels of one group only.
    return (
        places * out[numbers.out_spec[0]] * out[numbers.out_spec[1]] * kernel[numbers.rhs_spec[1]]
    )


def _places(
    image: int, kernel: int, out: int, stride: int, low: int, hole: int, dilation: int
) -> int:
    """Along one axis, the pairs of output and kernel positions that meet a value of the image."""
    at = np.add.outer(np.arange(out) * stride - low, np.arange(kernel) * dilation)
    inside = (at >= 0) & (at <= (image - 1) * hole) & (at % hole == 0)
    return int(np.count_nonzero(inside))


_MACS = {
    "dot_general": _dot_macs,
    "conv_general_dilated": _conv_macs,
    "ragged_dot_general": _ragged_macs,
}


def _bytes(
    name: str,
    input_shapes: _Shapes,
    output_shapes: _Shapes,
    input_dtypes: Sequence[Any],
    output_dtypes: Sequence[Any],
) -> int:
    if name in _VIEWS:
        return 0
    inputs = [_size(*pair) for pair in zip(input_shapes, input_dtypes, strict=True)]
    outputs = [_size(*pair) for pair in zip(output_shapes, output_dtypes, strict=True)]
    if name in _PICKS:
        return 2 * sum(outputs) + sum(inputs[1:])
    if name == "dynamic_update_slice":
        return 2 * inputs[1] + sum(inputs[2:])
    if name.startswith("scatter"):
        return inputs[1] + 2 * inputs[2]
    return sum(inputs) + sum(outputs)


def _size(shape: tuple[int, ...], dtype: Any) -> int:
    # Keys and tokens have no size that NumPy knows.
    try:
        return math.prod(shape) * np.dtype(dtype).itemsize
    except TypeError:
        return math.prod(shape) * getattr(dtype, "itemsize", 0)
