"""Fake quantization: bit for bit what is packed, in every program, and its gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from quantize_reference import (
    BITS,
    DTYPES,
    FEW_FORMATS,
    GRANULARITIES,
    SHAPE,
    decode_jit,
    encode_jit,
    name_of,
    round_trip,
    same_bits,
    samples,
)

import jaxcomp
from jaxcomp.quantize import (
    Format,
    Percentile,
    PerChannel,
    PerGroup,
    PerTensor,
    encode,
    fake_quant,
)
from jaxcomp.quantize.affine import find_codes, from_codes
from jaxcomp.quantize.scales import Scales, find_scales

# Every bits, symmetry and dtype, with each granularity in turn.
LAW = [
    (dtype, Format(bits, symmetric, GRANULARITIES[(bits + 2 * symmetric + turn) % 4]))
    for turn, dtype in enumerate(DTYPES)
    for bits in BITS
    for symmetric in (True, False)
    if turn == 0 or symmetric == ((bits + turn) % 2 == 0)
]
TRIED = ("normal", "huge, lopsided", "mixed", "halves")
few = pytest.mark.parametrize("format", FEW_FORMATS, ids=name_of)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)


@pytest.mark.parametrize(("dtype", "format"), LAW, ids=name_of)
def test_law(dtype, format):
    compiled = jax.jit(lambda x: fake_quant(x, format))
    for kind in TRIED:
        x = samples(dtype)[kind]
        with jax.disable_jit():  # operation by operation, so that no compiler sees two of them
            packed = round_trip(x, format)
        assert same_bits(fake_quant(x, format), packed)
        assert same_bits(compiled(x), packed)


@pytest.mark.parametrize(
    ("format", "dtype"),
    [(format, DTYPES[index % 3]) for index, format in enumerate(FEW_FORMATS)],
    ids=name_of,
)
def test_law_inside_a_gradient(format, dtype):
    """With the matmul, the backward pass and an update of the weights in the same program."""
    x, inputs = samples(dtype)["normal"], jnp.ones((2, 5, 8), dtype)

    def loss(x):
        seen = fake_quant(x, format)
        return jnp.sum(jnp.tanh(inputs @ seen)), seen

    @jax.jit
    def step(x):
        (_, seen), grads = jax.value_and_grad(loss, has_aux=True)(x)
        new = x - jnp.asarray(0.1, dtype) * grads
        return seen, new, encode(new, format)

    seen, new, leaf = step(x)
    assert same_bits(seen, round_trip(x, format))
    assert same_bits(leaf.decode(), round_trip(new, format))


@pytest.mark.parametrize("format", FEW_FORMATS[::2], ids=name_of)
def test_law_inside_scan_map_and_remat(format):
    xs = jnp.stack([samples(jnp.float32)[kind] for kind in TRIED])
    expected = np.stack([round_trip(samples(jnp.float32)[kind], format) for kind in TRIED])
    _, scanned = jax.lax.scan(lambda c, x: (c, fake_quant(x, format)), 0, xs)
    assert same_bits(scanned, expected)
    remat = jax.checkpoint(lambda x: fake_quant(x, format))
    mapped, pull = jax.vjp(jax.jit(jax.vmap(remat)), xs)
    assert same_bits(mapped, expected)
    assert same_bits(pull(xs)[0], xs)


@given(st.integers(0, 2**32 - 1), st.integers(-20, 20))
def test_law_near_ties(seed, power):
    """Weights half way between two codes, where one unit in the last place decides."""
    rng = np.random.default_rng(seed)
    format = Format(8, bool(seed % 2), PerTensor())
    step = float(np.float32(rng.uniform(1, 2) * 2.0**power))
    x = (rng.integers(-126, 126, SHAPE) + 0.5) * step * (1 + rng.integers(-3, 4, SHAPE) * 6e-8)
    x[0, 0, 0], x[1, 0, 1] = 127 * step, -127 * step
    x = jnp.asarray(x, jnp.float32)
    with jax.disable_jit():
        packed = round_trip(x, format)
    assert same_bits(_tied(format)(x), packed)
    assert same_bits(fake_quant(x, format), packed)


@functools.cache
def _tied(format):
    return jax.jit(lambda x: fake_quant(x, format))


@few
def test_given_range(format):
    """With the range that would be found, or a constant or a traced one: the same values."""
    x = samples(jnp.float32)["normal"]
    scale, zero_point, _ = find_scales(x, format)
    given_range = (scale,) if zero_point is None else (scale, zero_point)
    expected = round_trip(x, format)
    assert same_bits(fake_quant(x, format, *given_range), expected)
    assert same_bits(jax.jit(lambda x: fake_quant(x, format, *given_range))(x), expected)
    assert same_bits(jax.jit(lambda x, *g: fake_quant(x, format, *g))(x, *given_range), expected)
    narrow = scale / 3
    scales = Scales(narrow, zero_point)
    codes, _ = find_codes(x, scales, format)
    clipped = from_codes(codes, scales, format, x.dtype)
    assert same_bits(jax.jit(lambda x: fake_quant(x, format, narrow, *given_range[1:]))(x), clipped)


@every_dtype
@pytest.mark.parametrize("kind", ["normal", "huge, lopsided", "zero", "one large", "halves"])
def test_gradient_passes_where_nothing_is_clipped(kind, dtype):
    """A range that is found holds all weights: also the largest ones, which define it."""
    x = samples(dtype)[kind]
    weights = jnp.asarray(np.random.default_rng(1).normal(size=x.shape), dtype)

    @jax.jit
    def grads(x):
        return [
            jax.grad(lambda x, f=f: jnp.sum((fake_quant(x, f) * weights).astype(jnp.float32)))(x)
            for f in FEW_FORMATS
        ]

    for grad in grads(x):
        assert same_bits(grad, weights)


@pytest.mark.parametrize("symmetric", [True, False])
@given(st.integers(0, 2**32 - 1))
def test_gradient_against_float64(symmetric, seed):
    """Inside: one. Outside: zero. For steps that are no powers of two, away from the very edge."""
    rng = np.random.default_rng(seed)
    scale = rng.uniform(0.01, 0.2, (1, 6))
    zero_point = rng.integers(0, 16, (1, 6))
    x = rng.normal(size=(8, 6)).astype(np.float32)
    cotangent = rng.normal(size=(8, 6)).astype(np.float32)
    scale = scale.astype(np.float32)

    low, high = (-7, 7) if symmetric else (0, 15)
    codes = np.rint(x.astype(np.float64) / scale) + (0 if symmetric else zero_point)
    clear = np.abs(np.abs(x.astype(np.float64) / scale) % 1 - 0.5) > 1e-4
    expected = np.where((codes >= low) & (codes <= high), cotangent, 0)
    values = (np.clip(codes, low, high) - (0 if symmetric else zero_point)) * scale

    args = (jnp.asarray(x), jnp.asarray(scale)) + (
        () if symmetric else (jnp.asarray(zero_point, jnp.uint8),)
    )
    found, grad = _value_and_grad(symmetric)(jnp.asarray(cotangent), *args)
    np.testing.assert_array_equal(np.asarray(grad)[clear], expected[clear])
    np.testing.assert_allclose(np.asarray(found)[clear], values[clear], rtol=3e-7)


@functools.cache
def _value_and_grad(symmetric):
    def run(cotangent, x, scale, zero_point=None):
        format = Format(4, symmetric)
        values, pull = jax.vjp(lambda x: fake_quant(x, format, scale, zero_point), x)
        return values, pull(cotangent)[0]

    return jax.jit(run)


def test_the_edge_of_the_range():
    """What rounds to the last code is inside, ties to even as the values are."""
    scale = jnp.array([0.5])
    x = jnp.array([3.5, 3.74, 3.75, 3.76, -3.74, -3.75, 1e30, -jnp.inf])
    grad = jax.grad(lambda x: jnp.sum(fake_quant(x, Format(4), scale)))(x)
    assert grad.tolist() == [1, 1, 0, 0, 1, 0, 0, 0]  # 3.75 / 0.5 = 7.5 rounds to 8
    zero_point = jnp.array([3], jnp.uint8)
    x = jnp.array([-1.5, -1.74, -1.75, -2.0, 6.0, 6.24, 6.25, 6.5])
    affine = Format(4, symmetric=False)
    grad = jax.grad(lambda x: jnp.sum(fake_quant(x, affine, scale, zero_point)))(x)
    assert grad.tolist() == [1, 1, 0, 0, 1, 1, 1, 0]  # -3.5 rounds to -4, 12.5 to 12


def test_no_gradient_to_the_range():
    x, scale = jnp.linspace(-1, 1, 8), jnp.array([0.1])
    by_scale = jax.grad(lambda scale: jnp.sum(fake_quant(x, Format(4), scale)))(scale)
    assert by_scale.tolist() == [0]
    # Nor does the gradient of one weight contain what it does to a scale that others share.
    x = jnp.array([[1.0, 2.0], [30.0, 4.0]])
    jacobian = jax.jacrev(lambda x: fake_quant(x, Format(3)).ravel())(x).reshape(4, 4)
    np.testing.assert_array_equal(jacobian, np.eye(4))


def test_what_is_kept_for_the_backward_pass():
    """Nothing where no weight is clipped, outside `jit` too."""
    x = samples(jnp.float32)["normal"]
    for format, kept in ((Format(4), False), (Format(4, range=Percentile(99)), True)):
        _, pull = jax.vjp(lambda x, f=format: fake_quant(x, f), x)
        assert any(jnp.shape(leaf) == x.shape for leaf in jax.tree.leaves(pull)) == kept


@pytest.mark.parametrize("given_scale", [False, True])
def test_forward_mode_is_reverse_mode(given_scale):
    x, tangent = samples(jnp.float32)["normal"], samples(jnp.float32, seed=1)["normal"]
    scale = (jnp.array([0.05]),) if given_scale else ()

    def function(x):
        return fake_quant(x, Format(4), *scale)

    values, moved = jax.jvp(function, (x,), (tangent,))
    assert same_bits(values, function(x))
    inside = jnp.abs(jnp.round(x / 0.05)) <= 7 if given_scale else True
    assert same_bits(moved, jnp.where(inside, tangent, 0))
    assert same_bits(jax.jit(jax.jacfwd(function))(x), jax.jit(jax.jacrev(function))(x))
    _, linear = jax.linearize(function, x)
    assert same_bits(linear(tangent), moved)


def test_second_derivatives():
    """Straight through twice: the Hessian of the sum of squares is 2 where nothing is clipped."""
    x, scale = jnp.array([0.2, -0.3, 9.0]), jnp.array([0.1])

    def loss(x):
        return jnp.sum(fake_quant(x, Format(4), scale) ** 2)

    @jax.jit
    def second(x):
        return jax.hessian(loss)(x), jax.jacrev(jax.grad(loss))(x), jax.jacfwd(jax.jacfwd(loss))(x)

    for hessian in second(x):
        np.testing.assert_array_equal(hessian, np.diag([2.0, 2.0, 0.0]))


@every_dtype
def test_dtypes_are_kept(dtype):
    x = samples(dtype)["normal"]
    grad = jax.grad(lambda x: jnp.sum(fake_quant(x, Format(4)).astype(jnp.float32)))(x)
    assert fake_quant(x, Format(4)).dtype == grad.dtype == dtype
    assert fake_quant(x, Format(4), jnp.array([0.1])).dtype == dtype
    leaf = encode(x, Format(4))
    assert (leaf.dtype, leaf.scale.dtype, leaf.codes.dtype) == (dtype, jnp.float32, jnp.uint8)


@pytest.mark.parametrize(
    "granularity", [PerTensor(), PerChannel(-1), PerChannel(0), PerGroup(2, 0)], ids=name_of
)
def test_ensembles(granularity):
    """A model in an ensemble is quantized as it is alone, whichever axis the ensemble is on."""
    xs = np.random.default_rng(0).normal(size=(3, 4, 6)) * np.array([1, 10, 100])[:, None, None]
    xs = xs.astype(np.float32)
    format = Format(3, granularity == PerTensor(), granularity)
    alone = np.stack([decode_jit(encode_jit(x, format)) for x in xs])
    axis = 0 if granularity == PerTensor() else 2
    together = jax.jit(jax.vmap(lambda x: fake_quant(x, format), in_axes=axis))
    assert same_bits(together(np.moveaxis(xs, 0, axis)), alone)
    leaves = jax.jit(jax.vmap(lambda x: encode(x, format)))(xs)
    assert same_bits(jax.jit(jax.vmap(lambda leaf: leaf.decode()))(leaves), alone)
    assert jax.tree.map(lambda field: field[1], leaves).shape == (4, 6)


def test_values_are_few():
    x = np.linspace(-1, 1, 768, dtype=np.float32).reshape(256, 3)
    for symmetric in (True, False):
        leaf = encode(jnp.asarray(x), Format(3, symmetric, PerTensor()))
        # From -1 to 1 affine codes meet ties at both ends: one code stays unused.
        assert len(np.unique(leaf.decode())) == 7
        assert jaxcomp.nbytes(leaf) == 256 * 2 + (4 if symmetric else 5)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("chance", [False, True])
def test_a_nan_stays_one_with_a_scale_that_is_given(symmetric, chance):
    x = jnp.array([[jnp.nan, 0.2], [jnp.inf, -jnp.inf]])
    zero_point = None if symmetric else jnp.array([3, 3], jnp.uint8)
    key = jax.random.key(0) if chance else None
    y = fake_quant(x, Format(4, symmetric=symmetric), jnp.array([0.1, 0.1]), zero_point, key=key)
    assert jnp.isnan(y).tolist() == [[True, False], [False, False]]
    assert jnp.all(jnp.isfinite(y[1]))
