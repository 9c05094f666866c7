"""Bad input is refused with the path or argument and the remedy, before anything changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcomp
from jaxcomp import partition, quantize
from jaxcomp.quantize import Format, PerChannel, PerGroup, PerTensor, encode, fake_quant, train

pytestmark = pytest.mark.usefixtures("unchecked")


X = np.ones((6, 4), np.float32)
BAD_ARRAYS = [
    (np.float32(1.0), ValueError, "x: a scalar cannot be quantized"),
    (np.zeros((), np.float32), ValueError, "x: a scalar cannot be quantized"),
    (np.ones((0, 4), np.float32), ValueError, r"x: shape \(0, 4\) has no elements"),
    (np.ones((4, 0), np.float32), ValueError, r"x: shape \(4, 0\) has no elements"),
    (np.ones((6, 4), np.int32), TypeError, "x: int32 is not a floating array"),
    (np.ones((6, 4), bool), TypeError, "x: bool is not a floating array"),
    (np.ones((6, 4), np.complex64), TypeError, "x: complex64 is not a floating array"),
    (np.ones((6, 4), np.float64), TypeError, "x: float64 is wider .* cast it to float32"),
    ([[1.0, 2.0]], TypeError, "x: list is not a floating array"),
    (1.0, TypeError, "x: float is not a floating array"),
    (None, TypeError, "x: NoneType is not a floating array"),
]


@pytest.mark.parametrize("function", [encode, fake_quant])
@pytest.mark.parametrize(("x", "error", "message"), BAD_ARRAYS, ids=lambda v: str(v)[:30])
def test_arrays(function, x, error, message):
    with pytest.raises(error, match=message):
        function(x, Format(4, granularity=PerTensor()))


@pytest.mark.parametrize("shape", [(), (0, 4), (4, 0)])
@pytest.mark.parametrize("function", [encode, fake_quant])
def test_shapes_inside_jit(function, shape):
    with pytest.raises(ValueError, match="x: "):
        jax.eval_shape(lambda x: function(x, Format(4)), jax.ShapeDtypeStruct(shape, jnp.float32))


def test_compressed_twice():
    leaf = encode(jnp.asarray(X), Format(4))
    for function in (encode, fake_quant):
        with pytest.raises(TypeError, match=r"x: already compressed .* decode it first"):
            function(leaf, Format(4))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values(bad):
    x = X.copy()
    x[2, 3] = bad
    with pytest.raises(ValueError, match="x: 1 of 24 values are NaN or infinite"):
        encode(jnp.asarray(x), Format(4))


@pytest.mark.parametrize(
    ("granularity", "message"),
    [
        (PerChannel(2), r"x: shape \(6, 4\) has no axis 2"),
        (PerChannel((0, 1)), r"x: .* names every axis of shape \(6, 4\)"),
        (PerGroup(4), "x: groups of 4 do not divide axis -2 .* choose a divisor of 6"),
        (PerGroup(2, 2), r"x: shape \(6, 4\) has no axis 2"),
    ],
    ids=str,
)
@pytest.mark.parametrize("function", [encode, fake_quant])
def test_formats_that_do_not_fit(function, granularity, message):
    with pytest.raises(ValueError, match=message):
        function(jnp.asarray(X), Format(4, granularity=granularity))


SYMMETRIC, AFFINE, GROUPS = Format(4), Format(4, False), Format(4, True, PerGroup(3))
ONE, CODE = np.full((1, 4), 0.5, np.float32), np.full((1, 4), 8, np.uint8)
BAD_RANGES = [
    (SYMMETRIC, None, CODE, ValueError, "zero_point was given without scale: give both"),
    (SYMMETRIC, ONE, CODE, ValueError, "takes no zero_point beside scale"),
    (AFFINE, ONE, None, ValueError, "takes a zero_point beside scale"),
    (SYMMETRIC, 0.5, None, TypeError, "scale must be a floating array, not 0.5"),
    (SYMMETRIC, CODE, None, TypeError, "scale must be a floating array"),
    (AFFINE, ONE, ONE, TypeError, "zero_point must be a unsignedinteger array"),
    (AFFINE, ONE, CODE.astype(np.int32), TypeError, "zero_point must be"),
    (SYMMETRIC, np.ones(3, np.float32), None, ValueError, r"scale of shape \(3,\) does not broad"),
    (SYMMETRIC, np.ones((2, 6, 4), np.float32), None, ValueError, "scale of shape .* broadcast"),
    (SYMMETRIC, np.ones((12, 4), np.float32), None, ValueError, "scale of shape .* broadcast"),
    (AFFINE, ONE, np.zeros(5, np.uint8), ValueError, r"zero_point of shape \(5,\)"),
    (GROUPS, np.ones((6, 4), np.float32), None, ValueError, r"does not broadcast to \(2, 3, 4\)"),
    (Format(4, True, PerGroup(4)), ONE, None, ValueError, "groups of 4 do not divide"),
    (SYMMETRIC, ONE * 0, None, ValueError, "scale must be positive and finite"),
    (SYMMETRIC, -ONE, None, ValueError, "scale must be positive and finite"),
    (SYMMETRIC, ONE * np.nan, None, ValueError, "scale must be positive and finite"),
    (SYMMETRIC, ONE * np.inf, None, ValueError, "scale must be positive and finite"),
    (AFFINE, ONE, CODE * 2, ValueError, "zero_point must be a code from 0 to 15"),
]


@pytest.mark.parametrize(("format", "scale", "zero_point", "error", "message"), BAD_RANGES)
def test_given_ranges(format, scale, zero_point, error, message):
    given = [jnp.asarray(v) if isinstance(v, np.ndarray) else v for v in (scale, zero_point)]
    with pytest.raises(error, match=message):
        fake_quant(jnp.asarray(X), format, *given)
    if isinstance(scale, np.ndarray):
        with pytest.raises(error, match=message):
            jax.eval_shape(lambda x: fake_quant(x, format, *given), jnp.asarray(X))


def test_numpy_arrays_are_taken():
    """Checkpoints hold them."""
    x = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    leaf = encode(x, Format(4))
    assert isinstance(leaf.codes, jax.Array)
    np.testing.assert_array_equal(fake_quant(x, Format(4)), encode(jnp.asarray(x), Format(4)))
    np.testing.assert_array_equal(fake_quant(x, Format(4), leaf.scale), leaf.decode())
    np.testing.assert_array_equal(fake_quant(x, Format(4), np.asarray(leaf.scale)), leaf.decode())


# --- the method


@pytest.mark.parametrize("format", [4, "int4", None, Format])
def test_train_without_a_format(format):
    with pytest.raises(TypeError, match=r"format must be a quantize.Format, such as Format\(bits"):
        train(format)


@pytest.mark.parametrize("begin", ["3", 2.5, None, True])
def test_begin_of_another_type(begin):
    with pytest.raises(TypeError, match="begin must be an int"):
        train(Format(4), begin)


def test_begin_before_the_start():
    with pytest.raises(ValueError, match=r"begin must be a step from 0 to .*, not -1"):
        train(Format(4), begin=-1)


def tree(kernel):
    good = jnp.asarray(X)
    return {"params": {"a": {"kernel": good, "bias": good[0]}, "b": {"kernel": kernel}}}


@pytest.mark.parametrize(
    ("kernel", "format", "error", "message"),
    [
        (X[:5], Format(4, True, PerGroup(3)), ValueError, "params/b/kernel: groups of 3 do not"),
        (X, Format(4, True, PerChannel(2)), ValueError, r"params/a/kernel: shape .* no axis 2"),
        (X, Format(4, True, PerChannel((0, -1))), ValueError, "params/a/kernel: .* every axis"),
        (X * np.nan, Format(4), ValueError, "params/b/kernel: 24 of 24 values are NaN"),
        (X[:0], Format(4), ValueError, r"params/b/kernel: shape \(0, 4\) has no elements"),
        (X.astype(np.float64), Format(4), TypeError, "params/b/kernel: float64 is wider"),
    ],
)
def test_init_names_the_leaf(kernel, format, error, message):
    leaf = kernel if kernel.dtype == np.float64 else jnp.asarray(kernel)
    with pytest.raises(error, match=message):
        train(format).init(tree(leaf))


def test_pack_names_the_leaf():
    """Weights may have gone wrong since `init`."""
    method = train(Format(4, True, PerGroup(3)))
    state = method.init(tree(jnp.asarray(X)))
    with pytest.raises(ValueError, match="params/b/kernel: 1 of 24 values are NaN"):
        method.pack(tree(jnp.asarray(X).at[1, 1].set(jnp.nan)), state)
    with pytest.raises(ValueError, match=r"params/b/kernel: shape \(5, 4\), but the state"):
        method.pack(tree(jnp.asarray(X[:5])), state)


def test_trees_without_weights():
    for params in ({}, {"bias": jnp.ones(3)}, {"kernel": jnp.ones((2, 2), jnp.int32)}):
        with pytest.raises(ValueError, match="there is no weight to compress"):
            train(Format(4)).init(params)
    packed = {"kernel": encode(jnp.asarray(X), Format(4)), "bias": jnp.ones(4)}
    with pytest.raises(ValueError, match=r"no weight to compress: kernel .* compressed already"):
        train(Format(4)).init(packed)


@pytest.mark.parametrize("function", [encode, fake_quant])
def test_keys(function):
    with pytest.raises(TypeError, match="key must be one PRNG key"):
        function(jnp.asarray(X), Format(4), key=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn", "float8_e8m0fnu"])
def test_scales_of_every_stored_dtype_are_looked_at(dtype):
    format, scale = Format(4, scale_dtype=dtype), jnp.full((1, 4), 0.5, dtype)
    wide = fake_quant(jnp.asarray(X), Format(4), scale.astype(jnp.float32))
    np.testing.assert_array_equal(fake_quant(jnp.asarray(X), format, scale), wide)
    with pytest.raises(ValueError, match="scale must be positive and finite"):
        fake_quant(jnp.asarray(X), format, jnp.full((1, 4), jnp.nan, dtype))


def test_leaves_that_are_chosen_but_cannot_be():
    for leaf, error in ((jnp.ones((2, 2), jnp.int32), TypeError), (jnp.ones(()), ValueError)):
        method = partition({"*": train(Format(4))}, where=lambda path, leaf: True)
        with pytest.raises(error, match="deep/scalar: "):
            method.init({"deep": {"scalar": leaf}, "kernel": jnp.ones((2, 2))})


def test_vectors_need_one_scale():
    params = {"embedding": jnp.ones((4, 4)), "bias": jnp.ones(4)}
    everything = partition({"*": train(Format(4))}, where=lambda path, leaf: True)
    with pytest.raises(ValueError, match=r"bias: PerChannel\(axis=-1\) names every .* PerTensor"):
        everything.init(params)
    rules = {"bias": train(Format(4, granularity=PerTensor())), "*": train(Format(4))}
    method = partition(rules, where=lambda path, leaf: True)
    packed = method.pack(params, method.init(params))
    assert all(isinstance(leaf, jaxcomp.QuantizedArray) for leaf in packed.values())


def test_public_names():
    for name in quantize.__all__:
        assert getattr(quantize, name).__doc__
