"""What the product with a masked matrix owes beyond the table of products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.kernels import masked_matmul, pack_mask
from jaxcomp.kernels.forms import Choice
from jaxcomp.kernels.masked import triton


@pytest.mark.parametrize("tile", triton._TILES)
@pytest.mark.parametrize("block", [128, 256])
def test_every_tile_computes_the_same(tile, block):
    """A step of a tile stays within the rows of one bit."""
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(5, 256)), rng.normal(size=(256, 64))
    mask = rng.random(w.shape) < 0.5
    packed = pack_mask(jnp.asarray(mask), block)
    choice = Choice("triton", tile)
    run = triton.forward(block).run
    found = run(
        jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32), packed.bits, interpret=True,
        **choice.tile,
    )  # fmt: skip
    np.testing.assert_allclose(found, x @ (w * mask), atol=1e-4)


@pytest.mark.parametrize("wide", [jnp.float64, jnp.complex64])
def test_wide_activations_are_no_kernels(wide):
    """They would be summed in fewer digits, or not at all."""
    mask = jnp.ones((256, 64), bool)
    with jax.enable_x64(True):
        x = jnp.ones((2, 256), wide)
        reason = triton.forward(256).unfit(x, jnp.ones((256, 64)), pack_mask(mask).bits)
    assert jnp.dtype(wide).name in str(reason)


def test_nothing_in_or_out():
    for shape in ((0, 4), (4, 0)):
        mask, x, w = jnp.ones(shape, bool), jnp.ones((3, shape[0])), jnp.ones(shape)
        np.testing.assert_array_equal(masked_matmul(x, w, mask), np.zeros((3, shape[1])))
        loss = lambda x, w, mask: masked_matmul(x, w, mask).sum()
        dx, dw = jax.grad(loss, (0, 1))(x, w, mask)
        assert (dx.shape, dw.shape) == (x.shape, w.shape)
        assert pack_mask(jnp.ones(shape, bool)).unpack().shape == shape
