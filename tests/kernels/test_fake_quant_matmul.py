"""Products with weights and activations that are rounded on the way."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxcomp.kernels.fake_quant.matmul import fake_quant_matmul, fake_quant_matmul_reference
from jaxcomp.kernels.fake_quant.operand import Operand, scaled, values
from jaxcomp.kernels.fake_quant.rounding import Rounding, find_scale
from jaxcomp.kernels.fake_quant.triton import to_even
from jaxcomp.quantize import Format, PerBlock, PerChannel, PerGroup, PerTensor, fake_quant

SAME = {
    "channel": (PerChannel(), {"axis": -1}),
    "inputs": (PerChannel(0), {"axis": 0}),
    "tensor": (PerTensor(), {"axis": None}),
    "groups": (PerGroup(4), {"blocks": ((4, -2),)}),
    "tiles": (PerBlock((4, 2)), {"blocks": ((4, -2), (2, -1))}),
}


RNG = np.random.default_rng(0)


def weight(dtype=jnp.float32, shape=(8, 6)):
    w = RNG.normal(size=shape) + 0.3
    w[:, 1] = 0
    return jnp.asarray(w, dtype)


def same_bits(found, expected):
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", SAME)
def test_the_numbers_are_those_of_quantize(kind, dtype):
    granularity, shared = SAME[kind]
    every = [(8, True, True), (3, True, True), (5, False, True), (1, True, False)]
    w = weight(dtype)
    for bits, symmetric, zero in every if kind == "channel" else every[1:3]:
        format = Format(bits, symmetric, granularity, zero)
        how = Operand(Rounding(bits, symmetric, zero=zero, **shared), False, False)
        found = jax.jit(lambda w, how=how: values(how, scaled(how, w, None, None), w.dtype))(w)
        same_bits(found, fake_quant(w, format))


@pytest.mark.parametrize("scale", [0.0, 1e-42, 3e38, np.inf, np.nan])
def test_hostile_numbers_are_those_of_quantize(scale):
    w = weight() * np.float32(scale)
    for symmetric in (True, False):
        found = fake_quant_matmul(jnp.eye(8), w, Rounding(4, symmetric, axis=None))
        expected = np.asarray(fake_quant(w, Format(4, symmetric, PerTensor())))
        if np.isfinite(scale):
            np.testing.assert_array_equal(found, expected)
        else:
            assert not np.isfinite(np.asarray(found)).any()


@pytest.mark.parametrize("keep", ["weight", "codes"])
@pytest.mark.parametrize("given", [False, True])
def test_gradients_are_those_of_fake_quant(keep, given):
    w, x = weight(), jnp.asarray(RNG.normal(size=(3, 8)), jnp.float32)
    scale = {"scale": jnp.full((6,), 0.15)} if given else {}
    in_scale = {"input_scale": jnp.asarray(0.05)} if given else {}
    rows = Rounding(5, axis=None)

    def ours(x, w):
        y = fake_quant_matmul(x, w, Rounding(4), **scale, inputs=rows, **in_scale, keep=keep)
        return jnp.sum(jnp.sin(y))

    def composed(x, w):
        rounded = fake_quant(x, Format(5, granularity=PerTensor()), in_scale.get("input_scale"))
        return jnp.sum(jnp.sin(rounded @ fake_quant(w, Format(4), scale.get("scale"))))

    found, expected = (jax.grad(each, (0, 1))(x, w) for each in (ours, composed))
    jax.tree.map(same_bits, found, expected)
    if given:
        assert all((np.asarray(each) == 0).any() for each in found)


def test_affine_scales_that_are_given_and_each_row_by_itself():
    w, x = weight(), jnp.asarray(RNG.normal(size=(2, 3, 8)), jnp.float32)
    scale, zero = jnp.full((1, 6), 0.1), jnp.full((1, 6), 3, jnp.uint8)
    y = fake_quant_matmul(
        x, w, Rounding(4, False), scale=scale, zero_point=zero, inputs=Rounding(8, axis=(0, 1))
    )
    rows = fake_quant(x, Format(8, granularity=PerChannel((0, 1))))
    same_bits(y, rows @ fake_quant(w, Format(4, symmetric=False), scale, zero))


@pytest.mark.parametrize("implementation", ["xla", "triton", "mosaic_tpu"])
@pytest.mark.parametrize("blocks", [(), ((32, -2),)])
def test_narrow_scales_and_clipping_in_every_form(implementation, blocks):
    w = jnp.asarray(RNG.normal(size=(128, 128)), jnp.bfloat16)
    x = jnp.asarray(np.eye(128)[:16], jnp.bfloat16)
    scale = jnp.asarray(RNG.uniform(0.1, 0.2, size=(4, 1, 128) if blocks else (1, 128)))
    scale = scale.astype(jnp.float8_e4m3fn)
    format = Format(4, granularity=PerGroup(32) if blocks else PerChannel())
    rounding = Rounding(4, blocks=blocks)
    run = lambda x, w: fake_quant_matmul(x, w, rounding, scale=scale, implementation=implementation)
    y, back = jax.vjp(run, x, w)
    expected = fake_quant(w, format, scale)
    same_bits(y, expected[:16])
    dx, dw = back(y)
    inside = jax.vjp(lambda w: fake_quant(w, format, scale), w)[1](jnp.ones_like(w))[0]
    same_bits(dw, (x.T @ y) * inside)
    expected = np.asarray(y, np.float64) @ np.asarray(expected, np.float64).T
    np.testing.assert_allclose(np.asarray(dx, np.float64), expected, atol=0.01 * expected.max())


@pytest.mark.parametrize("form", ["xla", "triton", "mosaic_tpu"])
def test_what_is_rounded_in_float32_is_multiplied_in_bfloat16(form):
    w = jnp.asarray(RNG.normal(size=(128, 128)), jnp.float32)
    x = jnp.asarray(RNG.normal(size=(16, 128)), jnp.bfloat16)

    def ours(x, w):
        return fake_quant_matmul(x, w, Rounding(4), dtype="bfloat16", implementation=form)

    def composed(x, w):
        return x @ fake_quant(w, Format(4)).astype(jnp.bfloat16)

    dy = jnp.asarray(RNG.normal(size=(16, 128)), jnp.bfloat16)
    found, expected = (jax.vjp(run, x, w) for run in (ours, composed))
    assert found[0].dtype == jnp.bfloat16
    for one, other in zip((found[0], *found[1](dy)), (expected[0], *expected[1](dy)), strict=True):
        assert one.dtype == other.dtype
        one, other = (np.asarray(each, np.float64) for each in (one, other))
        np.testing.assert_allclose(one, other, atol=0.01 * np.abs(other).max())


def test_a_dense_gradient_is_not_stopped_where_a_weight_is_clipped():
    w, x = weight(), jnp.asarray(RNG.normal(size=(3, 8)), jnp.float32)
    for dense in (False, True):
        run = lambda w, dense=dense: fake_quant_matmul(
            x, w, Rounding(4), scale=jnp.full((6,), 0.1), dense_gradient=dense
        )
        gradient = np.asarray(jax.grad(lambda w, run=run: run(w).sum())(w))
        clipped = np.abs(np.asarray(w)) > 0.76
        assert clipped.any()
        assert (gradient[clipped] != 0).all() == dense
        expected = np.broadcast_to(np.asarray(x).sum(0)[:, None], (8, 6))
        np.testing.assert_allclose(gradient[~clipped], expected[~clipped], rtol=1e-5)


def test_nothing_rounded_is_kept_but_codes_and_bits():
    w, x = weight(shape=(64, 32)), jnp.ones((16, 64))
    scale, small = jnp.ones((1, 32)), jnp.asarray(0.1)

    def kept(**given):
        run = lambda x, w: fake_quant_matmul(x, w, Rounding(4), **given)
        leaves = jax.tree.leaves(jax.vjp(run, x, w)[1])
        return leaves, sorted((each.shape, each.dtype.name) for each in leaves if each.size > 32)

    leaves, shapes = kept()
    assert shapes == [((16, 64), "float32"), ((64, 32), "float32")]
    for array in (x, w):
        assert any(
            (np.asarray(leaf) == array).all() for leaf in leaves if leaf.shape == array.shape
        )
    assert kept(scale=scale)[1] == shapes
    assert kept(scale=scale, keep="codes", inputs=Rounding(8, axis=None), input_scale=small)[1] == [
        ((16, 8), "uint8"),
        ((16, 64), "uint8"),
        ((64, 4), "uint8"),
        ((64, 32), "uint8"),
    ]


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        (AxisType.Auto, "xla"),
        (AxisType.Explicit, "xla"),
        (AxisType.Auto, "triton"),
        (AxisType.Explicit, "mosaic_tpu"),
    ],
)
def test_weights_on_a_mesh_gather_nothing(kind, form):
    mesh = jax.make_mesh((2, 2), ("in", "out"), axis_types=(kind, kind))
    w, x = weight(shape=(256, 256)), jnp.asarray(RNG.normal(size=(4, 256)), jnp.float32)
    put = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, PartitionSpec(*spec)))
    rounding = Rounding(4, False, blocks=((16, -2),))

    def loss(x, w):
        y = fake_quant_matmul(x, w, rounding, inputs=Rounding(8, axis=0), implementation=form)
        return jnp.sum(y**2)

    step = jax.jit(jax.grad(loss, (0, 1)))
    placed = put(x, None, "in"), put(w, "in", "out")
    found, expected = step(*placed), step(x, w)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-3)
    assert tuple(found[1].sharding.spec) == ("in", "out")
    assert "all-gather" not in str(step.lower(*placed).compile().as_text())


def test_codes_and_bits_on_explicit_axes():
    kinds = (AxisType.Explicit, AxisType.Explicit)
    mesh = jax.make_mesh((2, 2), ("in", "out"), axis_types=kinds)
    w, x = weight(), jnp.asarray(RNG.normal(size=(4, 8)), jnp.float32)
    put = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, PartitionSpec(*spec)))
    scale = jnp.full((1, 6), 0.15)

    def loss(x, w):
        rows = {"inputs": Rounding(4, axis=None), "input_scale": jnp.asarray(0.1)}
        return jnp.sum(fake_quant_matmul(x, w, Rounding(4), scale=scale, keep="codes", **rows) ** 2)

    step = jax.jit(jax.grad(loss, (0, 1)))
    found, expected = step(put(x, None, "in"), put(w, "in", "out")), step(x, w)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    assert tuple(found[1].sharding.spec) == ("in", "out")


def test_float64_is_multiplied_in_float64():
    with jax.enable_x64(True):
        x, w = jnp.asarray(RNG.normal(size=(3, 8))), jnp.asarray(RNG.normal(size=(8, 2)))
        y = fake_quant_matmul(x, w, Rounding(6))
        assert y.dtype == jnp.float64
        expected = x @ fake_quant_matmul(jnp.eye(8), w, Rounding(6))
        np.testing.assert_allclose(y, expected, rtol=1e-14)


def test_ties_go_to_even_without_an_instruction_for_it():
    x = np.array([a + b for a, b in itertools.product(range(-5, 6), (0, 0.25, 0.5, 0.75))])
    x = np.append(x, [0.49999997, 2.0**23 + 1, -(2.0**30), np.inf, -np.inf]).astype(np.float32)
    np.testing.assert_array_equal(to_even(jnp.asarray(x)), np.round(x))
    assert np.isnan(to_even(jnp.asarray(np.nan)))


def test_the_reference_is_the_same():
    w, x = weight(), jnp.asarray(RNG.normal(size=(3, 8)), jnp.float32)
    same_bits(fake_quant_matmul(x, w, Rounding(4)), fake_quant_matmul_reference(x, w, Rounding(4)))


WRONG = {
    "bits must be 1 to 8, not 9": {"rounding": Rounding(9)},
    "1 bit around zero": {"rounding": Rounding(1)},
    "zero=False needs": {"rounding": Rounding(2, symmetric=False, zero=False)},
    "blocks of 3 do not divide": {"rounding": Rounding(blocks=((3, -2),))},
    "has no axis 2": {"rounding": Rounding(axis=2)},
    "keep must be": {"rounding": Rounding(), "keep": "bits"},
    "zero_point was given without": {"rounding": Rounding(), "zero_point": jnp.zeros(6, "uint8")},
    "an affine rounding takes a": {"rounding": Rounding(4, False), "scale": jnp.ones(6)},
    "a scale of shape .5,. does not": {"rounding": Rounding(), "scale": jnp.ones(5)},
    "x: a scale without": {"rounding": Rounding(), "input_scale": jnp.ones(())},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_is_an_error(message):
    with pytest.raises(ValueError, match=message):
        fake_quant_matmul(jnp.ones((2, 8)), jnp.ones((8, 6)), **WRONG[message])


def test_a_product_of_integers_is_an_error():
    with pytest.raises(TypeError, match="dtype must be floating"):
        fake_quant_matmul(jnp.ones((2, 8)), jnp.ones((8, 6)), Rounding(4), dtype="int8")


def test_shared_by_what_kernels_do_not_take():
    x, w = jnp.ones((16, 128)), jnp.ones((128, 128))
    for rounding, reason in (
        (Rounding(axis=0), "each input has a scale of its own"),
        (Rounding(blocks=((8, -2),)), "groups of 8 inputs are no power of two"),
        (Rounding(blocks=((16, -1),)), "are not groups of inputs"),
    ):
        with pytest.raises(ValueError, match=reason):
            fake_quant_matmul(x, w, rounding, implementation="triton")


@pytest.mark.parametrize("clips", [False, True])
def test_second_derivatives_are_straight_through(clips):
    """Those of `x @ quantize.fake_quant(w)`, in every pair of arguments."""
    x, w = weight(shape=(3, 8)), weight()
    scale = jnp.full((1, 6), 0.2) if clips else None
    how = Operand(Rounding(4), clips, False)
    rounded = lambda w: values(how, scaled(how, w, scale, None), w.dtype)
    product = lambda x, w: fake_quant_matmul(x, w, Rounding(4), scale=scale)
    hessian = lambda run: jax.jacrev(
        jax.grad(lambda x, w: jnp.sin(run(x, w)).sum(), (0, 1)), (0, 1)
    )(x, w)
    found, expected = hessian(product), hessian(lambda x, w: x @ rounded(w))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
        assert np.abs(b).max() > 0.01


@pytest.mark.parametrize("how", [{"keep": "codes"}, {"inputs": Rounding(8, axis=None)}])
def test_what_keeps_codes_is_not_differentiated_twice(how):
    x, w = weight(shape=(3, 8)), weight()
    gradient = jax.grad(lambda w: (fake_quant_matmul(x, w, Rounding(4), **how) ** 2).sum())
    assert np.isfinite(gradient(w)).all()
    with pytest.raises(NotImplementedError, match="keep='weight', and round inputs before"):
        jax.jacrev(gradient)(w)


@pytest.mark.parametrize("shape", [(64, 64), (256, 128), (33, 40)])
@pytest.mark.parametrize("given", [False, True])
def test_a_nan_is_not_rounded_away(shape, given):
    w = jnp.ones(shape).at[3, 5].set(jnp.nan)
    scale = jnp.ones((1, 1)) if given else None
    for form in ("xla", "triton")[: 1 if shape[0] == 33 else 2]:
        y = fake_quant_matmul(
            jnp.ones((1, shape[0])), w, Rounding(4), scale=scale, implementation=form
        )
        assert np.flatnonzero(np.isnan(y[0])).tolist() == [5]


def test_nothing_in_or_out():
    for shape in ((0, 4), (4, 0)):
        for how in ({}, {"inputs": Rounding(8, axis=None)}, {"scale": jnp.ones((1, 1))}):
            run = lambda x, w, how=how: fake_quant_matmul(x, w, Rounding(4, axis=None), **how)
            x, w = jnp.ones((3, shape[0])), jnp.ones(shape)
            np.testing.assert_array_equal(run(x, w), np.zeros((3, shape[1])))
            dx, dw = jax.grad(lambda x, w, run=run: run(x, w).sum(), (0, 1))(x, w)
            assert (dx.shape, dw.shape) == (x.shape, w.shape)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"scale": 0.5}, "w: scale must be an array, not 0.5"),
        ({"scale": jnp.ones((1, 1), jnp.int32)}, "w: a scale of int32 is not floating"),
        ({"inputs": Rounding(8, axis=None), "input_scale": 2.0}, "x: scale must be an array"),
    ],
)
def test_what_is_no_scale_is_an_error(unchecked, how, message):
    with pytest.raises(TypeError, match=message):
        fake_quant_matmul(jnp.ones((1, 8)), weight(), Rounding(4), **how)


def test_what_is_no_float_is_not_rounded(unchecked):
    whole = jnp.ones((1, 8), jnp.uint8)
    with pytest.raises(TypeError, match="x: uint8 numbers are not rounded: give floats"):
        fake_quant_matmul(whole, weight(), Rounding(4), inputs=Rounding(8, axis=None))
    with pytest.raises(TypeError, match="w: int32 numbers"):
        fake_quant_matmul(jnp.ones((1, 8)), jnp.ones((8, 6), jnp.int32), Rounding(4))
    np.testing.assert_array_equal(
        fake_quant_matmul(whole, jnp.ones((8, 6)), Rounding(4)), np.full((1, 6), 8.0)
    )


@pytest.mark.parametrize("implementation", ["xla", "triton", "mosaic_tpu"])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_nothing_is_rounded_until_it_is_said_so(implementation, given, symmetric):
    w, x = weight(shape=(128, 128)), jnp.asarray(RNG.normal(size=(3, 128)), jnp.float32)
    rounding, format = Rounding(4, symmetric), Format(4, symmetric=symmetric)
    how = {}
    if given:
        found = find_scale(w * 0.5, rounding)
        how = dict(
            zip(("scale", "zero_point"), found if not symmetric else found[:1], strict=False)
        )

    def run(x, w, active):
        return fake_quant_matmul(
            x, w, rounding, active=active, implementation=implementation, **how
        )

    def plain(x, w, active):
        return x @ jnp.where(active, fake_quant(w, format, **how), w)

    loss = lambda run: lambda x, w, active: jnp.sum(jnp.sin(run(x, w, active)))
    step = jax.jit(jax.value_and_grad(loss(run), (0, 1)))
    for active in map(jnp.asarray, (False, True)):
        found = jax.tree.leaves(step(x, w, active))
        expected = jax.tree.leaves(jax.value_and_grad(loss(plain), (0, 1))(x, w, active))
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)
    both = jax.vmap(run, (None, None, 0))(x, w, jnp.array([False, True]))
    np.testing.assert_allclose(both[0], x @ w, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(both[1], run(x, w, jnp.asarray(True)), rtol=1e-4, atol=1e-4)


def test_what_is_not_rounded_yet_keeps_every_number():
    """Also of those that no level is near, and on explicit axes."""
    w = jnp.asarray([[np.inf, 1e38], [-0.0, 1e-42]], jnp.float32)
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Explicit,))
    one = jnp.asarray([[0.0, 1.0]])
    off = jnp.asarray(False)
    y = fake_quant_matmul(one[:, 1:], w[1:], Rounding(8), active=off)
    same_bits(y, one[:, 1:] @ w[1:])
    w = w.at[0, 0].set(3.0)
    placed = jax.device_put(w, NamedSharding(mesh, PartitionSpec(None, "d")))
    for rounding in (Rounding(8), Rounding(8, axis=None), Rounding(8, blocks=((2, -2),))):
        with jax.set_mesh(mesh):
            y = jax.jit(
                lambda x, w, rounding=rounding: fake_quant_matmul(x, w, rounding, active=off)
            )(one, placed)
        same_bits(y, one @ w)


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"active": True}, TypeError, "active must be one boolean"),
        ({"active": jnp.ones(2, bool)}, TypeError, "active must be one boolean"),
        ({"active": jnp.float32(1)}, TypeError, "active must be one boolean"),
        ({"active": jnp.array(True), "keep": "codes"}, ValueError, "keep='weight'"),
    ],
)
def test_what_does_not_say_when_is_an_error(unchecked, how, error, message):
    with pytest.raises(error, match=message):
        fake_quant_matmul(jnp.ones((2, 8)), jnp.ones((8, 6)), Rounding(4), **how)
