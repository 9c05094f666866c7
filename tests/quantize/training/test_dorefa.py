"""DoReFa's weights against the paper's formulas, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcomp import quantize
from jaxcomp.quantize import Format, PerChannel, PerGroup, PerTensor
from jaxcomp.quantize.training.dorefa import dorefa, exact_mean
from tests.quantize.quantize_reference import same_bits

RNG = np.random.default_rng(0)
KERNEL = jnp.asarray(RNG.normal(size=(64, 33)), jnp.float32)


def of(bits, granularity=None):
    return Format(bits, granularity=granularity or PerTensor(), zero=False)


def paper(w, bits):
    """(7) and (9): 2 quantize_k(tanh(w) / (2 max|tanh(w)|) + 1/2) - 1; sign and mean at 1 bit."""
    w = np.asarray(w, np.float64)
    if bits == 1:
        return np.where(w >= 0, 1, -1) * np.abs(w).mean()
    unit = np.tanh(w) / (2 * np.abs(np.tanh(w)).max()) + 0.5
    top = 2**bits - 1
    return 2 * np.rint(top * unit) / top - 1


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_values_are_those_of_the_paper(bits):
    method = dorefa(of(bits))
    params = {"kernel": KERNEL}
    seen = method.apply(params, method.init(params))["kernel"]
    wrong = np.abs(np.asarray(seen, np.float64) - paper(KERNEL, bits)) > 1e-6
    # At eight bits a weight or two of two thousand may lie at an edge.
    assert np.mean(wrong) < 2e-3
    assert len(np.unique(seen)) <= 2**bits
    assert not np.any(np.asarray(seen) == 0)


def test_gradient_is_that_of_the_tangent():
    """Straight through the rounding only: finite differences of the rest, in float64."""
    small = np.asarray(KERNEL[:5, :4], np.float64)
    ct = RNG.normal(size=small.shape)
    method = dorefa(of(3))
    state = method.init({"kernel": jnp.asarray(small, jnp.float32)})
    run = lambda w: jnp.sum(method.apply({"kernel": w}, state)["kernel"] * ct)
    got = jax.jit(jax.grad(run))(jnp.asarray(small, jnp.float32))
    smooth = lambda w: np.sum(np.tanh(w) / np.abs(np.tanh(w)).max() * ct)
    want = np.zeros_like(small)
    for index in np.ndindex(small.shape):
        step = np.zeros_like(small)
        step[index] = 1e-6
        want[index] = (smooth(small + step) - smooth(small - step)) / 2e-6
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_gradient_of_one_bit_passes_as_it_is():
    method = dorefa(of(1))
    params = {"kernel": KERNEL}
    state = method.init(params)
    _, pull = jax.vjp(lambda p: method.apply(p, state), params)
    assert same_bits(pull(params)[0]["kernel"], KERNEL)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_shown_is_packed_to_the_bit(dtype):
    """Also inside a larger program, where tangents and sums are fused with what is around them."""
    params = {"kernel": (0.1 * KERNEL).astype(dtype)}
    for format in (of(1, PerChannel(-1)), of(4), of(8, PerGroup(16))):
        method = dorefa(format)
        state = method.init(params)

        @jax.jit
        def train(w, x, method=method, state=state):
            def loss(w):
                seen = method.apply({"kernel": w * 1}, state)["kernel"]
                return jnp.sum((x @ seen) ** 2).astype(jnp.float32), seen

            (_, seen), grad = jax.value_and_grad(loss, has_aux=True)(w)
            return seen, grad

        packed = method.pack(params, state)["kernel"]
        seen, grad = train(params["kernel"], jnp.ones((2, 64), dtype))
        assert same_bits(packed.decode(), seen)
        assert same_bits(method.apply(params, state)["kernel"], seen)
        assert bool(jnp.all(jnp.isfinite(grad)))


def test_zeros_and_nan():
    zeros = {"kernel": jnp.zeros((2, 3))}
    for bits in (1, 2):
        method = dorefa(of(bits))
        state = method.init(zeros)
        seen = method.apply(zeros, state)["kernel"]
        assert np.all(np.isfinite(seen))
        assert same_bits(method.pack(zeros, state)["kernel"].decode(), seen)
        bad = {"kernel": jnp.array([[jnp.nan, 1.0, 1.0], [0.5, 0.5, 0.5]])}
        assert np.isnan(method.apply(bad, state)["kernel"][0, 0])
        with pytest.raises(ValueError, match="kernel: 1 of 6 values are NaN"):
            method.pack(bad, state)


mean = jax.jit(lambda x: exact_mean(x, of(1)))


@given(st.integers(0, 2**32 - 1), st.floats(1e-3, 1e3))
def test_a_mean_is_right_and_does_not_hang_on_the_order(seed, size):
    generator = np.random.default_rng(seed)
    x = (generator.normal(size=4096) ** 3 * size).astype(np.float32)
    got = mean(jnp.asarray(x).reshape(64, 64))
    wide = np.abs(x.astype(np.float64))
    # Of 4,096 numbers each is rounded to a multiple of this, so that their sum is below 2**30.
    step = wide.max() / 2**18
    np.testing.assert_allclose(float(got[0, 0]), wide.mean(), rtol=1e-6, atol=step / 8)
    np.testing.assert_allclose(float(got[0, 0]), np.rint(wide / step).mean() * step, rtol=1e-6)
    assert same_bits(got, mean(jnp.asarray(generator.permutation(x)).reshape(64, 64)))


def test_what_is_refused():
    with pytest.raises(ValueError, match="zero=False"):
        dorefa(quantize.Format(4))
