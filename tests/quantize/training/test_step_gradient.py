"""LSQ's fake quantization against the paper's piecewise formulas, in float64."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcomp.quantize import Format, PerChannel, PerGroup, PerTensor, fake_quant, nf4
from jaxcomp.quantize.training.step_gradient import fake_quant_learned, initial_step, used_step

RNG = np.random.default_rng(0)
SHAPE = (8, 6)
FORMATS = [
    Format(2, granularity=PerTensor()),
    Format(4, granularity=PerChannel(-1)),
    Format(8, granularity=PerGroup(4)),
    Format(3, False, PerTensor()),
    Format(4, False, PerChannel(0)),
]
name_of = lambda format: f"{format.bits}-{format.symmetric}-{type(format.granularity).__name__}"


def spread(scale, format):
    """Scales repeated for every element, told by the words of the documentation."""
    scale = np.asarray(scale, np.float64)
    if isinstance(format.granularity, PerGroup):
        return np.repeat(scale[:, 0], format.granularity.size, axis=0)
    return np.broadcast_to(scale, SHAPE)


def paper(x, scale, zero_point, format, count):
    """Values, and the derivatives of each with respect to itself and its step: (1) to (3)."""
    first = -(2 ** (format.bits - 1) - 1) if format.symmetric else -zero_point
    last = 2 ** (format.bits - 1) - 1 if format.symmetric else 2**format.bits - 1 - zero_point
    x, ratio = np.asarray(x, np.float64), np.asarray(x, np.float64) / scale
    values = np.rint(np.clip(ratio, first, last)) * scale
    below, above = ratio <= first, ratio >= last
    to_step = np.where(below, first, np.where(above, last, np.rint(ratio) - ratio))
    to_x = np.where(below | above, 0.0, 1.0)
    return values, to_x, to_step / np.sqrt(count * last)


def draw(format, dtype=jnp.float32):
    x = jnp.asarray(RNG.normal(size=SHAPE), dtype)
    zero = None if format.symmetric else 3
    point = None if zero is None else jnp.asarray(zero, jnp.uint8)
    scale = initial_step(x, format, point)
    # Steps that clip much, and ones that clip little.
    factor = RNG.uniform(0.1, 1.0, scale.shape) * (0.2 if format.bits == 8 else 1)
    scale = scale * jnp.asarray(factor, jnp.float32)
    return x, scale, zero, None if zero is None else jnp.full(scale.shape, zero, jnp.uint8)


@pytest.mark.parametrize("format", FORMATS, ids=name_of)
def test_values_and_gradients_are_those_of_the_paper(format):
    x, scale, zero, point = draw(format)
    count = x.size // scale.size
    ct = jnp.asarray(RNG.normal(size=SHAPE), jnp.float32)

    @jax.jit
    def run(x, scale):
        values, pull = jax.vjp(lambda x, s: fake_quant_learned(x, s, format, point), x, scale)
        return values, *pull(ct)

    values, to_x, to_scale = run(x, scale)
    steps = spread(scale, format)
    want, through, slope = paper(x, steps, zero, format, count)
    np.testing.assert_allclose(values, want, rtol=1e-6)
    np.testing.assert_array_equal(to_x, np.where(through, ct, 0))
    _, sum_up = jax.vjp(lambda s: spread_jax(s, format), scale)
    (expected,) = sum_up(jnp.asarray(slope * ct, jnp.float32))
    np.testing.assert_allclose(to_scale, expected, rtol=2e-5, atol=1e-5)
    assert 0 < np.mean(through) < 1


def spread_jax(scale, format):
    if isinstance(format.granularity, PerGroup):
        return jnp.repeat(scale[:, 0], format.granularity.size, axis=0)
    return jnp.broadcast_to(scale, SHAPE)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_values_are_those_of_fake_quant_at_this_scale(dtype):
    format = FORMATS[1]
    x, scale, _, _ = draw(format, dtype)
    both = jax.jit(lambda x, s: (fake_quant_learned(x, s, format), fake_quant(x, format, s)))
    learned, plain = both(x, scale)
    assert learned.dtype == dtype
    np.testing.assert_array_equal(np.asarray(learned), np.asarray(plain))
    np.testing.assert_array_equal(
        np.asarray(fake_quant_learned(x, scale, format)), np.asarray(learned)
    )


def test_gradients_of_half_precision_are_summed_in_float32():
    """2,048 ones and more cannot be counted in float16, nor 256 in bfloat16."""
    format = Format(2, granularity=PerTensor())
    for dtype in (jnp.float16, jnp.bfloat16):
        x = jnp.full((4096, 1), 3.0, dtype)
        run = lambda s, x=x: fake_quant_learned(x, s, format, count=1).astype(jnp.float32).sum()
        assert float(jax.grad(run)(jnp.ones((1, 1)))[0, 0]) == 4096


SMALL = Format(3, granularity=PerTensor())
at = jax.jit(jax.value_and_grad(lambda s, x: fake_quant_learned(x, s, SMALL, count=1).sum()))


@given(st.floats(-20, 20, width=32), st.floats(0.0625, 4, width=32))
def test_any_number_and_any_step(x, scale):
    """Idempotent, odd, within half a step inside the range, and the slope of the paper."""
    value, slope = at(jnp.float32(scale).reshape(1), jnp.float32(x).reshape(1))
    again, _ = at(jnp.float32(scale).reshape(1), value.reshape(1))
    minus, _ = at(jnp.float32(scale).reshape(1), jnp.float32(-x).reshape(1))
    assert float(again) == float(value) == -float(minus)
    if abs(x) <= 3 * scale:
        assert abs(value - x) <= scale / 2 * (1 + 1e-5)
    ratio = np.float64(np.float32(x)) / np.float64(np.float32(scale))
    if abs(abs(ratio) - 3) < 1e-4 or abs(ratio % 1 - 0.5) < 1e-4:
        return  # either side of a jump
    want = np.rint(ratio) - ratio if abs(ratio) < 3 else math.copysign(3, ratio)
    np.testing.assert_allclose(float(slope[0]) * math.sqrt(3), want, rtol=1e-4, atol=1e-4)


def test_a_step_that_crossed_zero_works_and_comes_back():
    """The magnitude counts, and descent on the raw number is descent on it."""
    x = jnp.asarray(RNG.normal(size=(1, 64)), jnp.float32)
    run = lambda s: fake_quant_learned(x, s, SMALL)
    loss = lambda s: jnp.sum((run(s) - x) ** 2)
    for raw in (0.3, 1e-4):
        right, left = jnp.full((1, 1), raw), jnp.full((1, 1), -raw)
        np.testing.assert_array_equal(run(right), run(left))
        np.testing.assert_array_equal(jax.grad(loss)(right), -jax.grad(loss)(left))
    # At zero everything is clipped: the gradient leads away from there.
    assert float(jax.grad(loss)(jnp.zeros((1, 1)))[0, 0]) < 0
    assert np.all(np.isfinite(run(jnp.zeros((1, 1)))))


def test_used_steps_are_positive_and_no_code_overflows():
    raw = jnp.array([0.0, -1e30, 1e38, 2.0])
    for dtype in (jnp.float32, jnp.float16):
        used = used_step(raw, Format(8), dtype)
        assert np.all(np.asarray(used) > 0)
        x = jnp.full((4, 4), jnp.finfo(dtype).max, dtype)
        assert np.all(np.isfinite(fake_quant_learned(x, raw, Format(8))))


def test_nan_stays_nan_and_infinity_is_clipped():
    x = jnp.array([jnp.nan, jnp.inf, -jnp.inf, 0.4])
    seen = fake_quant_learned(x, jnp.array([0.5]), SMALL)
    np.testing.assert_array_equal(seen, [np.nan, 1.5, -1.5, 0.5])
    slope = jax.grad(lambda s: fake_quant_learned(x, s, SMALL)[1:].sum())(jnp.array([0.5]))
    assert np.all(np.isfinite(slope))


def test_relu_codes_use_the_whole_range():
    """An affine format with zero point 0: 2**bits levels, none below zero, no gradient there."""
    format, zero = Format(2, False, PerTensor()), jnp.zeros((), jnp.uint8)
    x = jnp.array([-1.0, 0.0, 0.4, 1.2, 9.0])
    run = lambda x: fake_quant_learned(x, jnp.float32(1.0), format, zero)
    np.testing.assert_array_equal(run(x), [0, 0, 0, 1, 3])
    np.testing.assert_array_equal(jax.grad(lambda x: run(x).sum())(x), [0, 0, 1, 1, 0])


def test_initial_steps():
    x = jnp.asarray(RNG.normal(size=SHAPE), jnp.float32)
    size = np.abs(np.asarray(x, np.float64))
    for format, mean in (
        (Format(4, granularity=PerTensor()), size.mean(keepdims=True)),
        (Format(4, granularity=PerChannel(-1)), size.mean(0, keepdims=True)),
        (Format(4, granularity=PerGroup(4)), size.reshape(2, 4, 6).mean(1, keepdims=True)),
    ):
        got = jax.jit(lambda x, f=format: initial_step(x, f))(x)
        assert got.shape == mean.shape
        np.testing.assert_allclose(got, 2 * mean / np.sqrt(7), rtol=1e-6)
    unsigned = initial_step(x, Format(4, False, PerTensor()), jnp.zeros((), jnp.uint8))
    np.testing.assert_allclose(unsigned, 2 * size.mean(keepdims=True) / np.sqrt(15), rtol=1e-6)
    np.testing.assert_array_equal(initial_step(jnp.zeros(SHAPE), Format(4)), np.ones((1, 6)))


def test_vmap_and_scan():
    x = jnp.asarray(RNG.normal(size=(3, *SHAPE)), jnp.float32)
    scale = jnp.asarray(RNG.uniform(0.1, 1, (3, 1, 1)), jnp.float32)
    format = FORMATS[0]
    grad = jax.grad(lambda s, x: jnp.sum(fake_quant_learned(x, s, format) ** 2))
    alone = jnp.stack([grad(s, w) for s, w in zip(scale, x, strict=True)])
    np.testing.assert_allclose(jax.jit(jax.vmap(grad))(scale, x), alone, rtol=1e-5)
    scanned = jax.lax.scan(lambda c, args: (c, grad(*args)), 0, (scale, x))[1]
    np.testing.assert_allclose(scanned, alone, rtol=1e-5)


def test_what_is_refused():
    x, scale = jnp.ones((2, 2)), jnp.ones((1, 1))
    with pytest.raises(ValueError, match="no zero_point"):
        fake_quant_learned(x, scale, Format(4), jnp.zeros((1, 1), jnp.uint8))
    with pytest.raises(ValueError, match="a zero_point"):
        fake_quant_learned(x, scale, Format(4, False))
    with pytest.raises(ValueError, match="does not broadcast"):
        fake_quant_learned(x, jnp.ones((1, 3)), Format(4))
    with pytest.raises(ValueError, match="positive and finite"):
        fake_quant_learned(x, scale * jnp.nan, Format(4))
    with pytest.raises(ValueError, match="count is 0"):
        fake_quant_learned(x, scale, Format(4), count=0)
    with pytest.raises(TypeError, match="steps are learned in a uniform"):
        inspect.unwrap(initial_step)(x, nf4(2))


@pytest.mark.slow
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_against_torch(axis):
    """PyTorch passes gradients up to where rounding leaves the range, half a step further."""
    torch = pytest.importorskip("torch")
    granularity = PerTensor() if axis is None else PerChannel(axis)
    for bits, zero in ((8, None), (4, None), (2, None), (4, 3), (4, 0)):
        format = Format(bits, zero is None, granularity)
        x = jnp.asarray(RNG.normal(size=SHAPE), jnp.float32)
        point = None if zero is None else jnp.asarray(zero, jnp.uint8)
        scale = initial_step(x, format, point) * 0.8
        last = 2 ** (bits - 1) - 1 if zero is None else 2**bits - 1
        first = -last if zero is None else 0
        ratio = np.asarray(x, np.float64) / np.asarray(scale) + (zero or 0)
        between = (np.abs(ratio - last) < 0.51) | (np.abs(ratio - first) < 0.51)
        x = jnp.where(between, 0.1 * scale, x)
        ct = RNG.normal(size=SHAPE).astype(np.float32)
        factor = 1 / math.sqrt(x.size // scale.size * (last - (zero or 0)))
        points = None if zero is None else jnp.full(scale.shape, zero, jnp.uint8)
        values, pull = jax.vjp(
            lambda x, s, f=format, p=points: fake_quant_learned(x, s, f, p), x, scale
        )
        tensors = [torch.tensor(np.asarray(x), requires_grad=True)]
        tensors.append(torch.tensor(np.asarray(scale).ravel(), requires_grad=True))
        zeros = torch.full((scale.size,), float(zero or 0), requires_grad=True)
        if axis is None:
            out = torch._fake_quantize_learnable_per_tensor_affine(
                *tensors, zeros, first, last, factor
            )
        else:
            out = torch._fake_quantize_learnable_per_channel_affine(
                *tensors, zeros, axis, first, last, factor
            )
        out.backward(torch.tensor(ct))
        np.testing.assert_allclose(values, out.detach().numpy(), rtol=1e-6, atol=1e-7)
        to_x, to_scale = pull(jnp.asarray(ct))
        np.testing.assert_array_equal(to_x, tensors[0].grad.numpy())
        np.testing.assert_allclose(
            np.asarray(to_scale).ravel(), tensors[1].grad.numpy(), rtol=1e-4, atol=1e-5
        )
