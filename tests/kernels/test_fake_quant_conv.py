"""Convolutions with kernels and activations that are rounded on the way."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxcomp.kernels.fake_quant.conv import fake_quant_conv, fake_quant_conv_reference
from jaxcomp.kernels.fake_quant.rounding import Rounding
from jaxcomp.quantize import Format, PerChannel, PerGroup, PerTensor, fake_quant

RNG = np.random.default_rng(0)
LAST = ("NHWC", "HWIO", "NHWC")
PLAIN = ((1, 1), "SAME", None, None, LAST, 1)
# Shapes of x and w, arguments, rounding, and the format that is the same.
CASES = {
    "plain": ((2, 6, 5, 4), (3, 3, 4, 8), PLAIN, Rounding(4), Format(4)),
    "first": (
        (2, 4, 6, 5), (8, 4, 3, 3), ((2, 1), [(2, 0), (-1, 1)], None, None, None, 1),
        Rounding(8, axis=0), Format(granularity=PerChannel(0)),
    ),
    "groups": (
        (2, 7, 4), (3, 2, 6), ((1,), "SAME", None, (2,), ("NWC", "WIO", "NWC"), 2),
        Rounding(4, False, blocks=((2, -2),)), Format(4, False, PerGroup(2)),
    ),
    "depthwise, transposed": (
        (2, 4, 7), (8, 1, 3), ((1,), [(2, 2)], (2,), None, ("NCW", "OIW", "NWC"), 4),
        Rounding(3, axis=None), Format(3, granularity=PerTensor()),
    ),
    "one": ((2, 3, 5, 4), (1, 1, 4, 6), PLAIN, Rounding(4, False), Format(4, False)),
    "one, inputs": (
        (2, 3, 5, 4), (1, 1, 4, 6), PLAIN, Rounding(4, axis=2), Format(4, True, PerChannel(2)),
    ),
}  # fmt: skip


def made(case) -> Any:
    x_shape, w_shape, *rest = CASES[case]
    return *(jnp.asarray(RNG.normal(size=s), jnp.float32) for s in (x_shape, w_shape)), *rest


def conv(x, w, window):
    strides, padding, lhs, rhs, numbers, groups = window
    return lax.conv_general_dilated(x, w, strides, padding, lhs, rhs, numbers, groups)


@pytest.mark.parametrize("keep", ["weight", "codes"])
@pytest.mark.parametrize("case", CASES)
def test_is_the_convolution_with_what_fake_quant_makes(case, keep):
    x, w, window, rounding, format = made(case)
    x_format, to = Format(5, granularity=PerTensor()), Rounding(5, axis=None)

    def gradients(run):
        loss = lambda x, w: (jnp.sum(jnp.sin(y := run(x, w))), y)
        (_, y), found = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(x, w)
        return y, *found

    found = gradients(lambda x, w: fake_quant_conv(x, w, rounding, *window, inputs=to, keep=keep))
    expected = gradients(lambda x, w: conv(fake_quant(x, x_format), fake_quant(w, format), window))
    for one, other in zip(found, expected, strict=True):
        # A product of one position is no convolution: it may be summed in another order.
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 if "one" in case else 0)


@pytest.mark.parametrize("keep", ["weight", "codes"])
@pytest.mark.parametrize("case", ["plain", "one"])
def test_clipping_stops_the_gradient(case, keep):
    x, w, window, rounding, format = made(case)
    scale = jnp.full((1, 1, 1, w.shape[-1]), 0.1)
    zero = None if rounding.symmetric else jnp.full(scale.shape, 7, jnp.uint8)

    def composed(x, w):
        x = fake_quant(x, Format(4, granularity=PerTensor()), scale[0, 0, 0, :1])
        return jnp.sum(conv(x, fake_quant(w, format, scale, zero), window) ** 2)

    scale_of_x = scale[0, 0, 0, 0]
    ours = lambda x, w: jnp.sum(
        fake_quant_conv(
            x, w, rounding, *window, scale=scale, zero_point=zero, keep=keep,
            inputs=Rounding(4, axis=None), input_scale=scale_of_x,
        ) ** 2
    )  # fmt: skip
    found, expected = (jax.jit(jax.grad(each, (0, 1)))(x, w) for each in (ours, composed))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
        assert (np.asarray(one) == 0).any()


def test_one_position_takes_the_kernels_of_the_product():
    x = jnp.asarray(RNG.normal(size=(2, 2, 4, 128)), jnp.float32)
    w = jnp.asarray(RNG.normal(size=(1, 1, 128, 128)), jnp.float32)
    rounding = Rounding(4, blocks=((32, -2),))
    expected = np.asarray(x) @ np.asarray(fake_quant(w, Format(4, granularity=PerGroup(32))))[0, 0]
    for form in ("xla", "triton", "mosaic_tpu"):
        found = fake_quant_conv(x, w, rounding, *PLAIN, implementation=form)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="no form 'triton' but of kernels of one position"):
        fake_quant_conv(x, w, rounding, (2, 2), *PLAIN[1:], implementation="triton")


def test_vmap_and_the_reference():
    x, w, window, rounding, _ = made("plain")
    run = lambda x, w: fake_quant_conv(x, w, rounding, *window)
    expected = fake_quant_conv_reference(x, w, rounding, *window)
    np.testing.assert_array_equal(run(x, w), expected)
    found = jax.vmap(run)(jnp.stack([x, -x]), jnp.stack([w, 2 * w]))
    np.testing.assert_allclose(found, np.stack([expected, -2 * expected]), atol=1e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_rows_on_many_devices_gather_nothing(kind):
    _, w, window, rounding, _ = made("plain")
    x = jnp.asarray(RNG.normal(size=(8, 6, 5, 4)), jnp.float32)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    put = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, PartitionSpec(*spec)))
    rows = {"inputs": Rounding(8, axis=0), "input_scale": None}
    loss = lambda x, w: jnp.sum(fake_quant_conv(x, w, rounding, *window, **rows) ** 2)
    step = jax.jit(jax.grad(loss, (0, 1)))
    placed = put(x, "data"), put(w)
    found, expected = step(*placed), step(x, w)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
    assert found[0].sharding.spec[0] == "data"
    assert "all-gather" not in str(step.lower(*placed).compile().as_text())


def test_nothing_rounded_is_kept_but_codes_and_bits():
    x, w, window, rounding, _ = made("plain")
    given = {"scale": jnp.ones(8), "inputs": Rounding(8, axis=None), "input_scale": jnp.ones(())}

    def kept(keep):
        run = lambda x, w: fake_quant_conv(x, w, rounding, *window, **given, keep=keep)
        leaves = jax.tree.leaves(jax.vjp(run, x, w)[1])
        return sorted((each.shape, each.dtype.name) for each in leaves if each.size > 8)

    of_x = [((2, 6, 5, 1), "uint8"), ((2, 6, 5, 4), "uint8")]
    assert kept("weight") == [*of_x, ((3, 3, 4, 8), "float32")]
    assert kept("codes") == [*of_x, ((3, 3, 4, 1), "uint8"), ((3, 3, 4, 8), "uint8")]


def test_what_does_not_fit_is_an_error():
    x, w, window, _, _ = made("plain")
    with pytest.raises(ValueError, match="keep must be"):
        fake_quant_conv(x, w, Rounding(4), *window, keep="bits")
    with pytest.raises(ValueError, match="feature"):
        fake_quant_conv(x[..., :-1], w, Rounding(4), *window)
    with pytest.raises(ValueError, match="has no axis 4"):
        fake_quant_conv(x, w, Rounding(4, axis=4), *window)


@pytest.mark.parametrize("case", ["plain", "one", "groups"])
def test_nothing_is_rounded_until_it_is_said_so(case):
    x, w, window, rounding, format = made(case)

    def gradients(run, active):
        loss = lambda x, w: (jnp.sum(jnp.sin(y := run(x, w, active))), y)
        (_, y), found = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(x, w)
        return y, *found

    ours = lambda x, w, active: fake_quant_conv(x, w, rounding, *window, active=active)
    plain = lambda x, w, active: conv(x, jnp.where(active, fake_quant(w, format), w), window)
    for active in map(jnp.asarray, (False, True)):
        for one, other in zip(gradients(ours, active), gradients(plain, active), strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 if case == "one" else 0)
