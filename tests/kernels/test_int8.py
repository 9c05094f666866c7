"""Integer products against NumPy's in 64 bits: every sum exact, every form the same."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxcomp.kernels import int8 as module
from jaxcomp.kernels.int8 import (
    int8_linear,
    int8_matmul,
    int8_matmul_reference,
    int8_weight,
    signed,
)
from jaxcomp.kernels.int8_conv import Window, int8_conv

FORMS = (None, "plain", "cpu")


def integers(shape, seed=0, low=-128):
    return np.random.default_rng(seed).integers(low, 128, shape).astype(np.int8)


def ulps(ours, expected):
    spacing = np.spacing(np.abs(expected).astype(np.float32)).astype(np.float64)
    return np.abs(np.asarray(ours, np.float64) - expected) / spacing


# One row, few rows, many rows; several axes of rows; none; batches.
SHAPES = [
    ((1, 33), (5, 33)),
    ((7, 33), (5, 33)),
    ((80, 33), (5, 33)),
    ((2, 3, 33), (5, 33)),
    ((1, 1, 33), (5, 33)),
    ((33,), (5, 33)),
    ((4, 3, 33), (4, 5, 33)),
    ((4, 33), (4, 5, 33)),
    ((2, 3, 1, 6, 33), (2, 3, 5, 33)),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("rows", "outputs"), SHAPES)
def test_sums_are_exact(rows, outputs, form):
    x, codes = integers(rows), integers(outputs, 1)
    batch = "abc"[: len(outputs) - 2]
    middle = "mno"[: len(rows) - 1 - len(batch)]
    expected = np.einsum(
        f"{batch}{middle}i,{batch}ji->{batch}{middle}j", x.astype(np.int64), codes.astype(np.int64)
    )
    ours = int8_matmul(jnp.asarray(x), jnp.asarray(codes), implementation=form)
    assert ours.dtype == jnp.int32
    np.testing.assert_array_equal(ours, expected)
    np.testing.assert_array_equal(
        int8_matmul_reference(jnp.asarray(x), jnp.asarray(codes)), expected
    )


@pytest.mark.parametrize("form", FORMS)
def test_the_greatest_sum_that_fits(form):
    size = (1 << 17) - 1
    x = jnp.full((2, size), -128, jnp.int8)
    assert int8_matmul(x, x[:1], implementation=form).tolist() == [[size << 14]] * 2


def centred(x, zero):
    return x.astype(np.int64) - (0 if zero is None else np.asarray(zero, np.int64))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("x_affine", "w_affine", "each_row"),
    [(False, False, False), (True, False, False), (False, True, True), (True, True, True)],
)
@pytest.mark.parametrize("rows", [1, 6, 70])
def test_linear_scales_the_exact_sum(rows, each_row, x_affine, w_affine, form):
    rng = np.random.default_rng(rows)
    x, codes = integers((rows, 24)), integers((10, 24), 1)
    w_scale = rng.uniform(0.01, 1, 10).astype(np.float32)
    w_zero = rng.integers(-128, 128, 10).astype(np.int32) if w_affine else None
    shape = (rows,) if each_row else ()
    x_scale = np.asarray(rng.uniform(0.01, 1, shape), np.float32)
    x_zero = np.asarray(rng.integers(-128, 128, shape), np.int32) if x_affine else None
    weight = int8_weight(*jax.tree.map(jnp.asarray, (codes, w_scale, w_zero)))
    arguments = jax.tree.map(jnp.asarray, (x, x_scale, weight, x_zero))
    ours = jax.jit(partial(int8_linear, implementation=form))(*arguments)
    spread = lambda a: a[:, None] if each_row and a is not None else a
    sums = (
        centred(x, spread(x_zero)) @ centred(codes, None if w_zero is None else w_zero[:, None]).T
    )
    expected = sums * np.float64(spread(x_scale)) * np.float64(w_scale)
    assert ours.dtype == jnp.float32
    # The sum is exact; converting it, the product of the scales and their product round once each.
    assert ulps(ours, expected).max() <= 2


@pytest.mark.parametrize("budget", [1, 1 << 23])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("groups", [1, 6])
def test_groups_have_scales_of_their_own(groups, affine, budget, monkeypatch):
    # A budget of one sum walks over the groups one at a time.
    monkeypatch.setattr(module, "_GROUP_SUMS", budget)
    rng = np.random.default_rng(groups)
    x, codes = integers((2, 3, 24)), integers((2, groups, 5, 24 // groups), 1)
    w_scale = rng.uniform(0.01, 1, (2, groups, 5)).astype(np.float32)
    w_zero = rng.integers(-128, 128, (2, groups, 5)).astype(np.int32) if affine else None
    x_scale = rng.uniform(0.01, 1, (2, 3)).astype(np.float32)
    x_zero = rng.integers(-128, 128, (2, 3)).astype(np.int32) if affine else None
    weight = int8_weight(*jax.tree.map(jnp.asarray, (codes, w_scale, w_zero)))
    ours = int8_linear(*jax.tree.map(jnp.asarray, (x, x_scale, weight, x_zero)), grouped=True)
    spread = lambda zero: None if zero is None else zero[..., None]
    values = centred(codes, spread(w_zero)) * np.float64(w_scale)[..., None]
    dense = np.moveaxis(values, 1, 2).reshape(2, 5, 24)
    expected = np.einsum("bri,boi->bro", centred(x, spread(x_zero)), dense) * x_scale[..., None]
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


CONVOLUTIONS = [
    # x, kernel (out, *window, channels / groups), window
    ((2, 7, 6, 3), (5, 3, 3, 3), Window((1, 1), ((1, 1), (1, 1)), (1, 1), (1, 1))),
    ((2, 7, 6, 3), (5, 2, 3, 3), Window((2, 1), ((0, 1), (2, 0)), (1, 1), (1, 2))),
    ((2, 7, 6, 4), (6, 3, 3, 2), Window((2, 2), ((1, 1), (1, 1)), (1, 1), (1, 1), 2)),
    ((2, 7, 6, 4), (4, 3, 3, 1), Window((1, 2), ((1, 1), (1, 1)), (1, 1), (2, 1), 4)),
    ((2, 7, 6, 4), (8, 3, 3, 1), Window((1, 1), ((1, 1), (1, 1)), (1, 1), (1, 1), 4)),
    ((1, 5, 2), (3, 3, 2), Window((1,), ((2, 2),), (2,), (1,))),
    ((2, 9, 2), (3, 3, 2), Window((2,), ((-1, -2),), (1,), (1,))),
    ((2, 4, 4, 3), (5, 1, 1, 3), Window((1, 1), ((0, 0), (0, 0)), (1, 1), (1, 1))),
]


@pytest.mark.parametrize("form", ["native", "patches"])
@pytest.mark.parametrize("kind", ["symmetric", "affine", "each row"])
@pytest.mark.parametrize("case", range(len(CONVOLUTIONS)))
def test_convolutions_scale_the_exact_sum(case, kind, form):
    shape, kernel, window = CONVOLUTIONS[case]
    rng = np.random.default_rng(case)
    x, codes = integers(shape), integers(kernel, 1)
    w_scale = rng.uniform(0.01, 1, kernel[0]).astype(np.float32)
    rows = (shape[0], *(1 for _ in shape[1:-1])) if kind == "each row" else ()
    x_scale = np.asarray(rng.uniform(0.01, 1, rows), np.float32)
    x_zero = w_zero = None
    if kind != "symmetric":
        x_zero = np.asarray(rng.integers(-128, 128, rows), np.int32)
        w_zero = rng.integers(-128, 128, kernel[0]).astype(np.int32)
    flat = int8_weight(*jax.tree.map(jnp.asarray, (codes.reshape(kernel[0], -1), w_scale, w_zero)))
    weight = flat._replace(codes=jnp.asarray(codes))
    arguments = jax.tree.map(jnp.asarray, (x, x_scale, weight))
    zero = None if x_zero is None else jnp.asarray(x_zero)
    ours = jax.jit(partial(int8_conv, window=window, implementation=form))(
        *arguments, x_zero_point=zero
    )
    spread = lambda a: a[..., None] if np.ndim(a) else a
    space = "01"[: len(shape) - 2]
    with jax.enable_x64(True):
        # Sums below 2^53 are exact in float64.
        sums = lax.conv_general_dilated(
            jnp.asarray(centred(x, None if x_zero is None else spread(x_zero)), jnp.float64),
            jnp.asarray(centred(codes.T, w_zero).T, jnp.float64),
            window.strides, window.padding, window.input_dilation, window.kernel_dilation,
            (f"N{space}C", f"O{space}I", f"N{space}C"), window.groups,
        )  # fmt: skip
        expected = np.asarray(sums) * np.float64(spread(x_scale)) * w_scale
    assert ours.shape == expected.shape
    assert ulps(ours, expected).max() <= 2


def test_codes_become_signed():
    np.testing.assert_array_equal(signed(jnp.arange(256, dtype=jnp.uint8)), np.arange(-128, 128))


def test_under_vmap_and_scan_the_sums_stay():
    x, codes = integers((6, 2, 33)), integers((6, 5, 33), 1)
    each = jax.vmap(int8_matmul)(jnp.asarray(x), jnp.asarray(codes))
    shared = jax.jit(jax.vmap(int8_matmul, (0, None)))(jnp.asarray(x), jnp.asarray(codes[0]))
    _, turned = lax.scan(lambda c, slices: (c, int8_matmul(*slices)), 0, (x, codes))
    wide = x.astype(np.int64)
    np.testing.assert_array_equal(each, np.einsum("bri,boi->bro", wide, codes))
    np.testing.assert_array_equal(turned, each)
    np.testing.assert_array_equal(shared, np.einsum("bri,oi->bro", wide, codes[0]))


def test_the_dot_stays_an_integer_dot():
    x, codes = jnp.ones((1, 64), jnp.int8), jnp.ones((32, 64), jnp.int8)
    text = jax.jit(int8_matmul).lower(x, codes).compile().as_text()
    # A library call on the codes as they are; no wider copy of the weight.
    assert "s32[32,64]" not in text
    assert "f32[32,64]" not in text


@pytest.mark.parametrize(
    ("x", "codes", "form", "message"),
    [
        ((2, 3), (4, 5), None, "must be"),
        ((2, 3), (3, 4, 3), None, "must be"),
        ((2, 3), (3,), None, "must be"),
        ((2, 3), (4, 3), "fast", "implementation"),
    ],
)
def test_what_does_not_fit_is_refused(x, codes, form, message):
    with pytest.raises(ValueError, match=message):
        int8_matmul(jnp.zeros(x, jnp.int8), jnp.zeros(codes, jnp.int8), implementation=form)


def test_convolutions_and_groups_that_do_not_fit_are_refused():
    weight = int8_weight(jnp.zeros((4, 3), jnp.int8), jnp.ones(4))
    window = Window((1,), ((0, 0),), (1,), (1,))
    x = jnp.zeros((1, 5, 2), jnp.int8)
    with pytest.raises(ValueError, match="channels"):
        int8_conv(x, jnp.ones(()), weight._replace(codes=jnp.zeros((4, 3, 1), jnp.int8)), window)
    kernel = weight._replace(codes=jnp.zeros((4, 3, 2), jnp.int8))
    with pytest.raises(ValueError, match="implementation"):
        int8_conv(x, jnp.ones(()), kernel, window, implementation="fast")
    groups = int8_weight(jnp.zeros((3, 4, 2), jnp.int8), jnp.ones((3, 4)))
    with pytest.raises(ValueError, match="3 groups of 2 do not make 5"):
        int8_linear(jnp.zeros((1, 5), jnp.int8), jnp.ones(()), groups, grouped=True)
