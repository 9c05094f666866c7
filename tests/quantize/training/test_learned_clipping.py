"""PACT's clipping against its piecewise formulas, in float64, and as a method."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcomp
from jaxcomp.quantize import Format, PerChannel, PerGroup, PerTensor
from jaxcomp.quantize.training.learned_clipping import fake_quant_clipped, learned_clipping
from tests.quantize.quantize_reference import same_bits

RNG = np.random.default_rng(0)
KERNEL = jnp.asarray(RNG.normal(size=(8, 6)), jnp.float32)
CT = jnp.asarray(RNG.normal(size=(8, 6)), jnp.float32)


def run(x, clip, format, zero_point=None):
    @jax.jit
    def both(x, clip):
        quantize = lambda x, clip: fake_quant_clipped(x, clip, format, zero_point)
        values, pull = jax.vjp(quantize, x, clip)
        return values, *pull(CT)

    return both(x, clip)


def test_activations_behind_a_relu():
    """The paper's own case: y = (|x| - |x - a| + a) / 2, rounded to 2**bits - 1 steps."""
    x, clip = 2 * KERNEL, 1.3
    values, to_x, to_clip = run(x, jnp.float32(clip), Format(3, False), jnp.uint8(0))
    wide = np.asarray(x, np.float64)
    clipped = 0.5 * (np.abs(wide) - np.abs(wide - clip) + clip)
    np.testing.assert_allclose(values, np.rint(clipped * 7 / clip) * clip / 7, atol=1e-6)
    np.testing.assert_array_equal(to_x, np.where((wide > 0) & (wide < clip), CT, 0))
    np.testing.assert_allclose(to_clip, np.sum(np.where(wide >= clip, CT, 0)), rtol=1e-5)


def test_weights_with_a_range_for_each_channel():
    clip = jnp.asarray(RNG.uniform(0.3, 1.5, (1, 6)), jnp.float32)
    values, to_x, to_clip = run(KERNEL, clip, Format(4, granularity=PerChannel(-1)))
    wide, end = np.asarray(KERNEL, np.float64), np.asarray(clip, np.float64)
    want = np.rint(np.clip(wide, -end, end) * 7 / end) * end / 7
    np.testing.assert_allclose(values, want, atol=1e-6)
    np.testing.assert_array_equal(to_x, np.where(np.abs(wide) < end, CT, 0))
    slope = np.where(np.abs(wide) >= end, np.sign(wide), 0)
    np.testing.assert_allclose(to_clip, np.sum(slope * CT, 0, keepdims=True), rtol=1e-5)


def test_the_lower_end_moves_with_the_upper_one():
    """Affine with a zero point inside: both ends are fixed multiples of one number."""
    values, to_x, to_clip = run(KERNEL, jnp.float32(0.5), Format(4, False), jnp.uint8(5))
    wide = np.asarray(KERNEL, np.float64)
    np.testing.assert_allclose(np.min(values), -0.25, rtol=1e-6)
    np.testing.assert_allclose(np.max(values), 0.5, rtol=1e-6)
    slope = np.where(wide >= 0.5, 1, np.where(wide <= -0.25, -0.5, 0))
    np.testing.assert_allclose(to_clip, np.sum(slope * CT), rtol=1e-5)
    np.testing.assert_array_equal(to_x, np.where(slope == 0, CT, 0))


def test_a_range_that_crossed_zero_counts_by_its_magnitude():
    right, left = (run(KERNEL, jnp.float32(sign * 0.7), Format(4)) for sign in (1, -1))
    assert same_bits(right[0], left[0])
    np.testing.assert_array_equal(right[2], -left[2])


@pytest.mark.parametrize(
    "format",
    [
        Format(1, granularity=PerTensor(), zero=False),
        Format(3, granularity=PerGroup(4), scale_dtype="float16"),
        Format(8),
    ],
    ids=lambda format: f"{format.bits}",
)
def test_shown_is_packed_to_the_bit(format):
    method = learned_clipping(format, decay=0.1)
    for dtype in (jnp.float32, jnp.bfloat16):
        params = {"kernel": KERNEL.astype(dtype)}
        state = method.init(params)
        factor = lambda a: a * jnp.asarray(RNG.uniform(-1.2, 1.2, a.shape), jnp.float32)
        state = state._replace(learned=jax.tree.map(factor, state.learned))
        packed = method.pack(params, state)["kernel"]
        assert same_bits(packed.decode(), jax.jit(method.apply)(params, state)["kernel"])
        assert same_bits(packed.decode(), method.apply(params, state)["kernel"])


def test_ranges_begin_at_the_largest_weights_and_decay():
    params = {"kernel": KERNEL}
    method = learned_clipping(Format(4, granularity=PerTensor()), decay=0.25)
    state = method.init(params)
    largest = np.abs(np.asarray(KERNEL)).max()
    np.testing.assert_allclose(state.learned["kernel"], [[largest]], rtol=1e-6)
    tx = jaxcomp.wrap_optimizer(optax.sgd(0.1), method)
    _, new = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_allclose(
        new.compression.learned["kernel"], [[largest * (1 - 0.1 * 0.25)]], rtol=1e-6
    )


def test_ranges_stay_where_bits_change():
    params = {"kernel": KERNEL}
    method = learned_clipping(Format(8), begin=1, bits={2: 4})
    state = method.init(params)
    for step in range(4):
        bits = getattr(method.pack(params, state)["kernel"], "bits", None)
        assert bits == (None, 8, 4, 4)[step]
        if step == 1:
            state = state._replace(learned=jax.tree.map(lambda a: 0.5 * a, state.learned))
            halved = state.learned["kernel"]
        state = jax.jit(method.update)(params, state, params)
    assert same_bits(state.learned["kernel"], halved)


def test_nan_stays_nan_and_what_is_refused():
    x = jnp.array([jnp.nan, jnp.inf, -2.0])
    seen = fake_quant_clipped(x, jnp.array([1.5]), Format(3))
    np.testing.assert_array_equal(seen, [np.nan, 1.5, -1.5])
    with pytest.raises(ValueError, match="takes a zero_point"):
        fake_quant_clipped(x, jnp.array([1.5]), Format(3, False))
    with pytest.raises(ValueError, match="no zero_point"):
        fake_quant_clipped(x, jnp.array([1.5]), Format(3), jnp.zeros(1, jnp.uint8))
    with pytest.raises(ValueError, match="decay is -1"):
        learned_clipping(Format(4), decay=-1.0)
    with pytest.raises(ValueError, match="symmetric=True"):
        learned_clipping(Format(4, False))
