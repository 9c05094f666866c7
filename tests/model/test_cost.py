"""The cost of one operation against what XLA says of the same one, lowered, not optimized."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from jaxcomp.model.cost import Cost, is_counted, op_cost
from jaxcomp.model.program import Op, read, walk


def costs(function, *inputs) -> Cost:
    """The summed cost of every operation, loops excluded."""
    program = read(lambda params, *rest: function(*rest), {"w": np.ones(1)}, *inputs)
    return sum(map(cost, walk(program.block)), Cost(0, 0, 0, 0))


def cost(op: Op) -> Cost:
    return op_cost(
        op.name,
        op.params,
        [v.shape for v in op.inputs],
        [v.shape for v in op.outputs],
        [v.dtype for v in op.inputs],
        [v.dtype for v in op.outputs],
    )


def xla(function, *inputs) -> tuple[int, int]:
    found = jax.jit(function).lower(*inputs).cost_analysis() or {}
    return int(found.get("flops") or 0), int(found.get("transcendentals") or 0)


def agree(function, *inputs) -> None:
    found = costs(function, *inputs)
    assert (found.flops, found.transcendentals) == xla(function, *inputs)


X = np.linspace(0.1, 0.9, 60, dtype=np.float32).reshape(6, 10)
INDEX = np.arange(60, dtype=np.int32).reshape(6, 10)
FLAGS = INDEX > 3

UNARY = """abs acos asin asinh atan atanh bessel_i0e cbrt ceil cos cosh digamma erf erf_inv erfc exp
exp2 expm1 floor is_finite lgamma log log1p logistic neg round rsqrt sign sin sinh sqrt square tan
tanh""".split()  # noqa: SIM905


# JAX 0.12 spells these out in another way.
RESPELLED = {"asin", "digamma", "lgamma"} if jax.__version_info__ >= (0, 11) else set()


@pytest.mark.parametrize("name", [name for name in UNARY if name not in RESPELLED])
def test_unary(name):
    agree(lambda x: getattr(lax, name)(x), X)


@pytest.mark.parametrize("name", "add atan2 div max min mul nextafter pow rem sub".split())  # noqa: SIM905
def test_binary(name):
    agree(lambda x, y: getattr(lax, name)(x, y), X, X)


@pytest.mark.parametrize("exponent", [-5, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16])
def test_powers(exponent):
    agree(lambda x: lax.integer_pow(x, exponent), X)


@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        (lambda x: x.astype(jnp.bfloat16), (X,)),
        (lambda x: lax.convert_element_type(x, jnp.float32), (X,)),
        (lambda i: i.astype(jnp.float32), (INDEX,)),
        (lambda x: lax.clamp(0.2, x, 0.8), (X,)),
        (lambda b, x: lax.select_n(b, x, -x), (FLAGS, X)),
        (lambda i, x: lax.select_n(i, x, -x, x * x, 1 - x), (INDEX, X)),
        (lambda b: ~b & b, (FLAGS,)),
        (lambda i: lax.population_count(i) << i, (INDEX,)),
        (lambda x: x + x[:1], (X,)),
        (lambda x: lax.reduce_sum_p.bind(x, axes=(1,), out_sharding=None), (X,)),
        (lambda x: x.max((0, 1)), (X,)),
        (lambda x: x.argmax(1), (X,)),
        (lambda b: jnp.any(b, 0), (FLAGS,)),
        (lambda x: jnp.sort(x, 1), (X,)),
        (lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (2, 3), (1, 1), "SAME"), (X,)),
        (lambda x: lax.reduce_window(x, 0.0, lax.add, (2, 2), (2, 2), "VALID"), (X,)),
        (lambda x, y: x @ y.T, (X, X)),
        (lambda x, y: x @ y.T, (X.astype(jnp.bfloat16), X.astype(jnp.bfloat16))),
        (lambda x, y: jnp.einsum("bij,kbj->bik", x, y), (np.ones((2, 3, 4)), np.ones((5, 2, 4)))),
        (lambda x, i: x[i], (X, INDEX[0, :4])),
        (lambda x, i: jnp.take(x, i, axis=0, mode="fill"), (X, INDEX[0, :4])),
        (lambda x, i: jnp.take(x, i, axis=0, mode="clip"), (X, INDEX[0, :4])),
        (lambda x, i: x.at[i, i].get(mode="fill"), (X, INDEX[0, :4])),
        (lambda x, i: x.at[i].add(1.0), (X, INDEX[0, :4])),
        (lambda x, i: x.at[i].max(1.0, mode="clip"), (X, INDEX[0, :4])),
        (lambda x: jnp.concatenate([x.T, x.T])[::-1, :3].reshape(-1, 2), (X,)),
        (lambda x: lax.dynamic_update_slice(x, x[:2], (1, 0)), (X,)),
        (jax.nn.softmax, (X,)),
        (jax.nn.gelu, (X,)),
        (lambda x: jnp.var(x, 1), (X,)),
    ],
)
def test_others(function, inputs):
    agree(function, *(np.asarray(v, np.float32) if v.dtype == np.float64 else v for v in inputs))


@st.composite
def convolutions(draw):
    """A valid convolution of any layout, stride, padding, dilation and grouping."""
    rank = draw(st.integers(1, 2))
    numbers = lambda low, high: draw(st.lists(st.integers(low, high), min_size=rank, max_size=rank))
    groups, batch_groups = draw(st.sampled_from([(1, 1), (2, 1), (3, 1), (1, 2)]))
    per_group, out = draw(st.integers(1, 3)), groups * batch_groups * draw(st.integers(1, 2))
    image = [2 * batch_groups, per_group * groups, *numbers(4, 7)]
    kernel = [out, per_group, *numbers(1, 3)]
    order = draw(st.permutations(range(rank + 2)))
    place = np.argsort(order)
    dimension_numbers = lax.ConvDimensionNumbers(*(tuple(int(i) for i in place),) * 3)
    return (
        np.ones([image[i] for i in order], np.float32),
        np.ones([kernel[i] for i in order], np.float32),
        {
            "window_strides": numbers(1, 3),
            "padding": [(draw(st.integers(-1, 3)), draw(st.integers(0, 3))) for _ in range(rank)],
            "lhs_dilation": numbers(1, 2),
            "rhs_dilation": numbers(1, 2),
            "dimension_numbers": dimension_numbers,
            "feature_group_count": groups,
            "batch_group_count": batch_groups,
        },
    )


@given(convolutions())
@settings(max_examples=60)
def test_convolutions(case):
    image, kernel, options = case

    def convolve(x, k):
        return lax.conv_general_dilated(x, k, **options)

    shape = jax.eval_shape(convolve, image, kernel).shape
    if 0 in shape:
        assert costs(convolve, image, kernel).flops == 0
        return
    found = costs(convolve, image, kernel)
    assert found.flops == xla(convolve, image, kernel)[0] == 2 * found.macs


def test_a_convolution_counts_the_multiplications_that_are_not_with_padding():
    image, kernel = np.ones((1, 5, 5, 2), np.float32), np.ones((3, 3, 2, 4), np.float32)
    numbers = ("NHWC", "HWIO", "NHWC")

    def convolve(x, k):
        return lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=numbers)

    # All inputs are one, so each output is the number of products in it.
    products = int(convolve(image, kernel).sum())
    assert costs(convolve, image, kernel).macs == products


def test_cumulative_sums_are_linear_where_xla_is_quadratic():
    x = np.ones((3, 50), np.float32)
    assert costs(lambda x: lax.cumsum(x, axis=1), x).flops == x.size
    assert xla(lambda x: lax.cumsum(x, axis=1), x)[0] == x.size * 49


def test_bytes_are_inputs_and_outputs():
    x, y = np.ones((6, 10), np.float32), np.ones((10, 4), jnp.bfloat16)
    found = costs(lambda x, y: lax.dot_general(x, y, (((1,), (0,)), ((), ()))), x, y)
    assert found.bytes == 6 * 10 * 4 + 10 * 4 * 2 + 6 * 4 * 4


def test_a_lookup_reads_the_rows_and_not_the_table():
    table, rows = np.ones((1000, 8), np.float32), np.zeros(3, np.int32)

    def look_up(t, i):
        return t.at[i].get(mode="promise_in_bounds", wrap_negative_indices=False)

    indices = 3 * 4
    broadcast = 2 * indices
    assert costs(look_up, table, rows).bytes == broadcast + indices + 2 * 3 * 8 * 4


def test_shapes_need_not_be_those_traced():
    program = read(lambda p, x: x @ p, np.ones((8, 4)), np.ones((2, 8)))
    (op,) = program.block.ops
    float32 = [np.dtype("float32")] * 2
    smaller = op_cost(op.name, op.params, [(2, 3), (3, 4)], [(2, 4)], float32, float32[:1])
    assert smaller.macs == 2 * 3 * 4


def test_what_has_no_rule_says_so():
    program = read(lambda p, x: jnp.linalg.cholesky(p + x), np.eye(3), np.eye(3))
    names = {op.name for op in walk(program.block)}
    assert {name for name in names if not is_counted(name)} == {"cholesky"}


@given(st.integers(0, 5), st.integers(1, 4))
def test_costs_add_and_multiply(count, size):
    one = costs(lambda x: jnp.exp(x) @ x, np.ones((size, size), np.float32))
    assert one.times(count) == sum([one] * count, Cost(0, 0, 0, 0))
    assert one.macs == size**3
    assert one.transcendentals == math.prod((size, size))
