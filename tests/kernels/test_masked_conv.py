"""Convolutions with a kernel of which a mask keeps a part."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxcomp.kernels.masked.conv import masked_conv, masked_conv_reference, pack_kernel_mask

RNG = np.random.default_rng(0)
LAST = ("NHWC", "HWIO", "NHWC")
# Shapes of x and w, and arguments.
CASES = {
    "same": ((2, 6, 5, 4), (3, 3, 4, 8), ((1, 1), "SAME", None, None, LAST, 1)),
    "strides": ((2, 6, 5, 4), (3, 2, 4, 8), ((2, 3), "VALID", None, None, LAST, 1)),
    "first": ((2, 4, 6, 5), (8, 4, 3, 3), ((1, 1), [(2, 0), (-1, 1)], None, None, None, 1)),
    "groups": ((2, 7, 4), (3, 2, 6), ((1,), "SAME", None, (2,), ("NWC", "WIO", "NWC"), 2)),
    "depthwise": ((2, 4, 7), (8, 1, 3), ((2,), [(1, 1)], None, None, ("NCW", "OIW", "NWC"), 4)),
    "transposed": ((2, 5, 4), (3, 6, 4), ((1,), [(2, 2)], (2,), None, ("NWC", "WOI", "NWC"), 1)),
    "space": ((1, 3, 4, 5, 2), (2, 2, 2, 2, 3), ((1, 1, 1), "SAME", None, None,
              ("NDHWC", "DHWIO", "NDHWC"), 1)),
    "one": ((2, 3, 5, 4), (1, 1, 4, 6), ((1, 1), "SAME", None, None, LAST, 1)),
    "one, strides": ((2, 3, 5, 4), (1, 1, 4, 6), ((2, 2), "VALID", None, None, LAST, 1)),
}  # fmt: skip


def made(case, dtype=jnp.float32):
    x_shape, w_shape, window = CASES[case]
    x, w = (jnp.asarray(RNG.normal(size=shape), dtype) for shape in (x_shape, w_shape))
    return x, w, jnp.asarray(RNG.random(w_shape) < 0.4), window


def exact_conv(x, w, window):
    """A convolution in float64, in NumPy: a sum over outputs and positions."""
    strides, padding, lhs, rhs, numbers, groups = window
    specs = lax.conv_dimension_numbers(x.shape, w.shape, numbers)
    x, w = (
        np.transpose(np.asarray(x, float), specs[0]),
        np.transpose(np.asarray(w, float), specs[1]),
    )
    n = len(strides)
    lhs, rhs = lhs or (1,) * n, rhs or (1,) * n
    if isinstance(padding, str):
        reach = [(k - 1) * r + 1 for k, r in zip(w.shape[2:], rhs, strict=True)]
        padding = lax.padtype_to_pads(x.shape[2:], reach, strides, padding)
    wide = [(s - 1) * d + 1 for s, d in zip(x.shape[2:], lhs, strict=True)]
    spread = np.zeros((*x.shape[:2], *wide))
    spread[(..., *(slice(None, None, d) for d in lhs))] = x
    for axis, (before, after) in enumerate(padding, 2):
        pads = [(0, 0)] * spread.ndim
        pads[axis] = (max(before, 0), max(after, 0))
        spread = np.pad(spread, pads)
        stop = spread.shape[axis] - max(-after, 0)
        spread = np.take(spread, range(max(-before, 0), stop), axis)
    sizes = [
        (length - (k - 1) * r - 1) // s + 1
        for length, k, r, s in zip(spread.shape[2:], w.shape[2:], rhs, strides, strict=True)
    ]
    per_in, per_out = w.shape[1], w.shape[0] // groups
    y = np.zeros((x.shape[0], w.shape[0], *sizes))
    for at in itertools.product(*map(range, w.shape[2:])):
        cut = tuple(
            slice(i * r, i * r + (size - 1) * s + 1, s)
            for i, r, s, size in zip(at, rhs, strides, sizes, strict=True)
        )
        seen = spread[(slice(None), slice(None), *cut)]
        for g in range(groups):
            into, out = slice(g * per_in, (g + 1) * per_in), slice(g * per_out, (g + 1) * per_out)
            y[:, out] += np.einsum("ni...,oi->no...", seen[:, into], w[(out, slice(None), *at)])
    return np.transpose(y, np.argsort(specs[2]))


@pytest.mark.parametrize("case", CASES)
def test_is_the_convolution_with_the_masked_kernel(case):
    x, w, mask, window = made(case)
    expected = exact_conv(x, np.asarray(w) * np.asarray(mask), window)
    for given in (mask, pack_kernel_mask(mask, window[4])):
        found = masked_conv(x, w, given, *window)
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_masked_kernel(case):
    x, w, mask, window = made(case)

    def gradients(run, **named):
        loss = lambda x, w: jnp.sum(jnp.sin(run(x, w, mask, *window, **named)))
        return jax.jit(jax.grad(loss, (0, 1)))(x, w)

    found, expected = gradients(masked_conv), gradients(masked_conv_reference)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    _, dense = gradients(masked_conv, dense_gradient=True)
    np.testing.assert_allclose(np.where(mask, dense, 0), found[1], atol=1e-5)
    assert (np.asarray(dense)[~np.asarray(mask)] != 0).any()


def test_what_is_removed_does_not_count_and_dtypes_are_kept():
    x, w, mask, window = made("same", jnp.bfloat16)
    bad = jnp.where(mask, w, jnp.inf)
    y, back = jax.vjp(lambda x, w: masked_conv(x, w, mask, *window), x, bad)
    assert y.dtype == jnp.bfloat16
    expected = exact_conv(x, np.where(mask, np.asarray(w, float), 0), window)
    np.testing.assert_allclose(y.astype(jnp.float32), expected, atol=0.1)
    dx, dw = back(y)
    assert dx.dtype == dw.dtype == jnp.bfloat16
    assert np.isfinite(np.asarray(dx, float)).all()
    assert not np.asarray(dw)[~np.asarray(mask)].any()


def test_mixed_dtypes_promote():
    x, w, mask, window = made("same")
    run = lambda x, w: jnp.sum(masked_conv(x, w, mask, *window) ** 2)
    dx, dw = jax.grad(run, (0, 1))(x.astype(jnp.bfloat16), w)
    assert (dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.float32)


def test_vmap_over_rows_and_over_kernels():
    x, w, mask, window = made("same")
    run = lambda x, w, mask: masked_conv(x, w, mask, *window)
    found = jax.vmap(run)(jnp.stack([x, -x]), jnp.stack([w, 2 * w]), jnp.stack([mask, mask]))
    expected = exact_conv(x, np.asarray(w) * np.asarray(mask), window)
    np.testing.assert_allclose(found, np.stack([expected, -2 * expected]), atol=1e-5)


def test_one_position_is_the_product_with_a_masked_matrix():
    x = jnp.asarray(RNG.normal(size=(2, 2, 3, 256)), jnp.float32)
    w = jnp.asarray(RNG.normal(size=(1, 1, 256, 128)), jnp.float32)
    mask = jnp.asarray(RNG.random(w.shape) < 0.4)
    window = ((1, 1), "SAME", None, None, LAST)
    expected = np.asarray(x) @ (np.asarray(w) * np.asarray(mask))[0, 0]
    for form in ("xla", "triton", "mosaic_tpu"):
        found = masked_conv(x, w, mask, *window, implementation=form)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="no form 'triton' but of kernels of one position"):
        masked_conv(x, w, mask, (2, 2), *window[1:], implementation="triton")


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_rows_on_many_devices_gather_nothing(kind):
    _, w, mask, window = made("same")
    x = jnp.asarray(RNG.normal(size=(8, 6, 5, 4)), jnp.float32)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    put = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, PartitionSpec(*spec)))
    loss = lambda x, w, mask: jnp.sum(masked_conv(x, w, mask, *window) ** 2)
    step = jax.jit(jax.grad(loss, (0, 1)))
    placed = put(x, "data"), put(w), put(mask)
    found, expected = step(*placed), step(x, w, mask)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
    assert found[0].sharding.spec[0] == "data"
    assert "all-gather" not in str(step.lower(*placed).compile().as_text())


def test_only_the_arrays_and_bits_are_kept():
    x, w, mask, window = made("same")
    packed = pack_kernel_mask(mask, LAST)
    leaves = jax.tree.leaves(jax.vjp(lambda x, w: masked_conv(x, w, packed, *window), x, w)[1])
    assert sorted((each.shape, each.dtype.name) for each in leaves) == sorted(
        (each.shape, each.dtype.name) for each in (x, w, packed.bits)
    )


def test_what_does_not_fit_is_an_error():
    x, w, mask, window = made("same")
    with pytest.raises(ValueError, match="must be of the shape of w"):
        masked_conv(x, w, mask[..., :-1], *window)
    with pytest.raises(ValueError, match=r"must be \(36, 8\)"):
        masked_conv(x, w, pack_kernel_mask(mask[:1], LAST), *window)
    with pytest.raises(ValueError, match="feature"):
        masked_conv(x[..., :-1], w, mask, *window)
    with pytest.raises(ValueError, match="give numbers"):
        masked_conv(x, w, mask, (1, 1), "SAME", (2, 2), None, LAST)
