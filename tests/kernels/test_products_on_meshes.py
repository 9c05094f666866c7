"""Products with dense weights where axes of a mesh are explicit, and under vmap on one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxcomp.kernels import (
    Rounding,
    fake_quant_conv,
    fake_quant_matmul,
    masked_conv,
    masked_matmul,
    pack_mask,
)

MASK = np.random.default_rng(1).random((16, 8)) < 0.6
PRODUCTS = {
    "masked": lambda x, w: masked_matmul(x, w, jnp.asarray(MASK)),
    "masked, dense gradient": lambda x, w: masked_matmul(
        x, w, jnp.asarray(MASK), dense_gradient=True
    ),
    "rounded": lambda x, w: fake_quant_matmul(x, w, Rounding(4)),
    "both rounded": lambda x, w: fake_quant_matmul(
        x, w, Rounding(4), inputs=Rounding(8, axis=None), keep="codes"
    ),
}
every_product = pytest.mark.parametrize("name", PRODUCTS)


def normal(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def put(array, *names):
    mesh = jax.make_mesh((2, 4), ("d", "m"), axis_types=(AxisType.Explicit,) * 2)
    return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*names)))


def assert_gradients_are_those_of_one_device(product, x, w, of_x, of_w):
    gradient = jax.grad(lambda x, w: (product(x, w) ** 2).sum(), (0, 1))
    x_there, w_there = put(x, *of_x), put(w, *of_w)
    found = jax.jit(gradient)(x_there, w_there)
    for each, like, expected in zip(found, (x_there, w_there), gradient(x, w), strict=True):
        assert jax.typeof(each).sharding == jax.typeof(like).sharding
        np.testing.assert_allclose(each, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("of_x", "of_w"),
    [
        ("d", "d"), ("d", "m"), ("d", ("d", "m")), ((None, "m"), ()), ((), ("d", "m")),
        (("d", "m"), "m"),
    ],
)  # fmt: skip
@every_product
def test_gradients_lie_as_what_they_are_of(name, of_x, of_w):
    x, w = normal(4, 16), normal(16, 8)
    assert_gradients_are_those_of_one_device(PRODUCTS[name], x, w, of_x, of_w)


@pytest.mark.parametrize("of_x", [("d", "m"), (None, "m"), ("d", None, "m"), (None, "m", "d")])
@every_product
def test_any_axis_of_activations_may_lie_on_several_devices(name, of_x):
    assert_gradients_are_those_of_one_device(
        PRODUCTS[name], normal(4, 8, 16), normal(16, 8), of_x, ()
    )


@pytest.mark.parametrize("product", ["masked", "rounded"])
def test_gradients_of_convolutions_lie_as_what_they_are_of(product):
    window = ((1,), "SAME")
    layout = {"dimension_numbers": ("NWC", "WIO", "NWC")}
    mask = jnp.asarray(np.random.default_rng(1).random((3, 16, 8)) < 0.6)
    run = {
        "masked": lambda x, w: masked_conv(x, w, mask, *window, **layout),
        "rounded": lambda x, w: fake_quant_conv(x, w, Rounding(4), *window, **layout),
    }[product]
    assert_gradients_are_those_of_one_device(
        run, normal(4, 8, 16), normal(3, 16, 8), ("d",), (None, "m")
    )


@pytest.mark.parametrize("form", ["xla", "triton", "mosaic_tpu"])
def test_examples_of_a_vmap_stay_on_their_devices(form):
    mesh = jax.make_mesh((8,), ("e",))
    x = jax.device_put(normal(64, 256), NamedSharding(mesh, PartitionSpec("e")))
    w, mask = normal(256, 256), pack_mask(normal(256, 256) > 0)
    run = jax.jit(jax.vmap(lambda x: masked_matmul(x, w, mask, implementation=form)))
    y = run(x)
    assert y.sharding.spec[0] == "e"
    assert "all-gather" not in str(run.lower(x).compile().as_text())
    np.testing.assert_allclose(y, x @ jnp.where(mask.unpack(), w, 0), atol=1e-3)
