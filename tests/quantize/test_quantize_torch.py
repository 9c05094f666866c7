"""Values and gradients beside `torch.fake_quantize_per_tensor_affine` and `per_channel`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.quantize import Format, PerChannel, PerTensor, encode, fake_quant
from jaxcomp.quantize.scales import find_scales

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.slow


@functools.cache
def ours(format):
    def run(x, cotangent, scale, zero_point=None):
        values, pull = jax.vjp(lambda x: fake_quant(x, format, scale, zero_point), x)
        return values, pull(cotangent)[0]

    return jax.jit(run)


def theirs(x, cotangent, scale, zero_point, format, axis):
    """PyTorch's, whose codes may be signed and whose zero point is an int32."""
    low, high = format.code_range
    x = torch.tensor(x, requires_grad=True)
    if axis is None:
        values = torch.fake_quantize_per_tensor_affine(x, float(scale), int(zero_point), low, high)
    else:
        values = torch.fake_quantize_per_channel_affine(
            x, torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32), axis, low, high
        )
    values.backward(torch.tensor(cotangent))
    return values.detach().numpy(), x.grad.numpy()


def near_a_tie(x, scale) -> np.ndarray:
    """Half way between two codes the last bit of the quotient decides."""
    return np.abs(np.abs(x.astype(np.float64) / scale) % 1 - 0.5) < 1e-4


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("found", [True, False], ids=["found range", "narrow range"])
def test_values_and_gradients(bits, symmetric, axis, found):
    format = Format(bits, symmetric, PerTensor() if axis is None else PerChannel(axis))
    for seed in range(5):
        rng = np.random.default_rng(seed)
        x = (rng.normal(rng.normal(), 10.0 ** rng.integers(-3, 3), (40, 30))).astype(np.float32)
        cotangent = rng.normal(size=x.shape).astype(np.float32)
        scale, zero_point, _ = find_scales(jnp.asarray(x), format)
        scale = np.asarray(scale) if found else np.asarray(scale) / np.float32(3.3)
        given = () if zero_point is None else (zero_point,)
        zeros = np.zeros(scale.shape, np.uint8) if zero_point is None else np.asarray(zero_point)

        values, grad = ours(format)(x, cotangent, scale, *given)
        expected, expected_grad = theirs(
            x, cotangent, scale.ravel() if axis is not None else scale.item(),
            zeros.ravel() if axis is not None else zeros.item(), format, axis,
        )  # fmt: skip
        clear = ~near_a_tie(x, scale)
        assert clear.mean() > 0.9
        np.testing.assert_allclose(np.asarray(values)[clear], expected[clear], rtol=3e-7)
        np.testing.assert_array_equal(np.asarray(grad)[clear], expected_grad[clear])
        if found:
            packed = encode(jnp.asarray(x), format).decode()
            np.testing.assert_allclose(np.asarray(packed)[clear], expected[clear], rtol=3e-7)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_found_range_is_that_of_the_observers(symmetric):
    """`MinMaxObserver` finds the affine scale and zero point; ours never clips more."""
    observers = pytest.importorskip("torch.ao.quantization")
    rng = np.random.default_rng(0)
    for shift in (-3.0, -0.4, 0.0, 0.9, 5.0):
        x = rng.normal(shift, 1, (40, 30)).astype(np.float32)
        scale, zero_point, _ = find_scales(jnp.asarray(x), Format(8, symmetric, PerTensor()))
        if symmetric:
            np.testing.assert_allclose(float(scale[0, 0]), np.abs(x).max() / 127, rtol=1e-6)
            continue
        observer = observers.MinMaxObserver(dtype=torch.quint8, qscheme=torch.per_tensor_affine)
        observer(torch.tensor(x))
        their_scale, their_zero = observer.calculate_qparams()
        np.testing.assert_allclose(float(scale[0, 0]), their_scale.item(), rtol=1e-6)
        assert int(zero_point[0, 0]) == int(their_zero)
