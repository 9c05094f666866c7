"""A packed model in integers against its simulation, and each product against NumPy's integers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxcomp import tree as tree_lib
from jaxcomp.arrays import decode
from jaxcomp.quantize import Format, PerChannel, PerGroup, PerTensor, encode
from jaxcomp.quantize.activations.bounds import Bounds, bounds_of
from jaxcomp.quantize.activations.dynamic import activations
from jaxcomp.quantize.integer.applied import integer_apply
from jaxcomp.share import kmeans

SYMMETRIC, AFFINE = Format(8, True, PerTensor()), Format(8, False, PerTensor())
EACH_EXAMPLE, FEW_BITS = Format(8, False, PerChannel(0)), Format(5, False, PerTensor())


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        attention = nn.MultiHeadDotProductAttention(num_heads=2)
        x = x + attention(nn.LayerNorm()(x))
        return x + nn.Dense(16)(nn.gelu(nn.Dense(24)(x))), None


class Language(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(20, 16)
        stack = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True},
                        length=2)  # fmt: skip
        return embed.attend(stack()(embed(tokens), None)[0])


class Vision(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3))(x))
        x = nn.relu(nn.Conv(8, (3, 3), feature_group_count=8, strides=2)(x))
        x = nn.relu(nn.Conv(12, (3, 2), feature_group_count=2, padding="VALID")(x))
        x = nn.ConvTranspose(4, (2, 2), strides=(2, 2))(x)
        return nn.Dense(5)(x.reshape(x.shape[0], -1))


def packed(params, format):
    weights = tree_lib.select(params)
    of = format if callable(format) else lambda _: format
    encoded = jax.jit(lambda w: {path: encode(leaf, of(path)) for path, leaf in w.items()})
    return tree_lib.replace(params, encoded(weights))


def language_format(path):
    axes = (0, -1) if "Block" in path else 0 if "embedding" in path else -1
    return Format(8, granularity=PerChannel(axes))


def linen(name, weights):
    rng = np.random.default_rng(0)
    model, x = Language(), np.arange(10).reshape(2, 5) * 7 % 20
    if name == "vision":
        model, x = Vision(), rng.normal(0.5, 1, (2, 6, 6, 3)).astype(np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(1), x)
    draw = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / leaf.shape[-1] ** 0.5, "float32")
    return model.apply, packed(jax.tree.map(draw, shapes), weights), x


CASES = {
    "language, affine": ("language", language_format, AFFINE),
    "vision, affine weights": ("vision", Format(4, False), SYMMETRIC),
    "vision, each example": ("vision", Format(8), EACH_EXAMPLE),
    "vision, one scale, 5 bits": ("vision", Format(6, granularity=PerTensor()), FEW_BITS),
}


@pytest.mark.parametrize("case", CASES)
def test_the_simulated_model_and_the_integer_model_agree(case):
    name, weights, format = CASES[case]
    apply_fn, params, x = linen(name, weights)
    model = integer_apply(apply_fn, params, x, format=format)
    kernels = {path for path in tree_lib.flatten(params) if path.endswith(("kernel", "embedding"))}
    assert set(model.executed) == kernels
    simulated = activations(apply_fn, params, x, format=format, points=list(model.executed))
    expected, ours = simulated(params, x), model.apply(model.params, x)
    assert ours.dtype == expected.dtype
    # A rounding that falls on the other side moves one input of the next layer by one step: none
    # did here, so that only the rounding of float32 is left.
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    # And what is simulated is not what the packed model computes on activations as they are.
    assert np.abs(jax.jit(apply_fn)(params, x) - expected).max() > 1e-4


def codes_of(x, format):
    """Codes, scale and zero point by the formulas of Jacob et al., in float64 and int64."""
    x = np.asarray(x, np.float64)
    if format.symmetric:
        top = 2 ** (format.bits - 1) - 1
        scale = np.abs(x).max() / top
        return np.rint(x / scale).astype(np.int64), scale, 0
    low, high = min(x.min(), 0), max(x.max(), 0)
    scale = (high - low) / (2**format.bits - 1)
    zero = int(np.rint(-low / scale))
    return np.clip(np.rint(x / scale) + zero, 0, 2**format.bits - 1).astype(np.int64), scale, zero


@pytest.mark.parametrize(
    ("weights", "format"),
    [
        (Format(8), SYMMETRIC),
        (Format(8), AFFINE),
        (Format(3, False), SYMMETRIC),
        (Format(8, False, PerGroup(16)), FEW_BITS),
    ],
)
def test_a_layer_is_numpys_integer_product(weights, format):
    rng = np.random.default_rng(0)
    x = rng.normal(0.3, 1, (6, 48)).astype(np.float32)
    leaf = encode(jnp.asarray(rng.normal(size=(48, 10)).astype(np.float32)), weights)
    model = integer_apply(lambda w, x: x @ w, leaf, x, format=format)
    codes, scale, zero = codes_of(x, format)
    parts = leaf.to_parts()
    steps = parts.arrays["scale"].astype(np.float64)
    offset = parts.arrays.get("zero_point", np.int64(1 << (weights.bits - 1))).astype(np.int64)
    split = parts.symbols["codes"].values.astype(np.int64).reshape(-1, 48 // len(steps), 10) \
        if steps.ndim == 3 else parts.symbols["codes"].values.astype(np.int64)[None]  # fmt: skip
    centred = (split - offset) if steps.ndim == 3 else split - offset[None]
    data = (codes - zero).reshape(6, len(split), -1)
    sums = np.einsum("rgi,gio->rgo", data, centred)
    expected = np.einsum("rgo,go->ro", sums * scale, steps.reshape(len(split), 10))
    ours = np.asarray(model.apply(model.params, x), np.float64)
    terms = np.abs(sums * scale * steps.reshape(len(split), 10)).sum(1)
    assert (np.abs(ours - expected) <= 4 * 2.0**-24 * terms + 1e-9).all()


def mlp(params, x):
    return jax.nn.relu(x @ params["first"]) @ params["second"] + params["bias"]


@pytest.fixture
def network():
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "first": encode(jax.random.normal(keys[0], (16, 24)), Format(8)),
        "second": encode(jax.random.normal(keys[1], (24, 8)), Format(4, False)),
        "bias": jnp.arange(8.0),
    }
    return params, jax.random.normal(keys[2], (8, 16))


def test_ranges_that_are_given_clip(network):
    params, x = network
    hidden = jax.nn.relu(x @ params["first"].decode())
    for format in (SYMMETRIC, AFFINE):
        ranges = {"first": bounds_of(x[:2], format), "second": bounds_of(hidden[:2], format)}
        model = integer_apply(mlp, params, x, format=format, ranges=ranges)
        simulated = activations(mlp, params, x, format=format, ranges=ranges)
        np.testing.assert_allclose(
            model.apply(model.params, x), simulated(params, x), rtol=1e-5, atol=1e-4
        )
        dynamic = integer_apply(mlp, params, x, format=format)
        assert np.abs(dynamic.apply(dynamic.params, x) - model.apply(model.params, x)).max() > 0.01


def test_layers_have_ranges_of_their_own():
    def model(params, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["stack"])[0]

    stack = jax.random.normal(jax.random.key(0), (3, 8, 8))
    params = {"stack": encode(stack, Format(8, granularity=PerChannel((0, -1))))}
    x = jax.random.normal(jax.random.key(1), (4, 8))
    low = -jnp.array([2.0, 1.0, 0.5]).reshape(3, 1, 1)
    ranges = {"stack": Bounds(low, -low)}
    ints = integer_apply(model, params, x, ranges=ranges)
    simulated = activations(model, params, x, ranges=ranges)
    np.testing.assert_allclose(ints.apply(ints.params, x), simulated(params, x), atol=1e-5)


def test_transformations_leave_it_as_it_is(network):
    params, x = network
    model = integer_apply(mlp, params, x, format=EACH_EXAMPLE)
    plain = model.apply(model.params, x)
    np.testing.assert_allclose(jax.jit(model.apply)(model.params, x), plain, atol=1e-5)
    one = jax.vmap(lambda x: model.apply(model.params, x[None])[0])
    np.testing.assert_allclose(one(x), plain, atol=1e-5)
    _, turns = jax.lax.scan(lambda c, x: (c, model.apply(model.params, x)), 0, x.reshape(4, 2, 16))
    np.testing.assert_allclose(turns.reshape(8, 8), plain, atol=1e-5)
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), model.params)
    both = jax.vmap(model.apply, (0, None))(stacked, x)
    np.testing.assert_allclose(both, jnp.stack([plain, plain]), atol=1e-5)


def test_it_runs_where_mesh_axes_are_explicit():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    w, x = jax.random.normal(jax.random.key(0), (16, 8)), jnp.ones((4, 16))
    apply_fn = lambda w, x: x @ w
    alone = integer_apply(apply_fn, encode(w, Format(8)), x)
    place = lambda a, *axes: jax.device_put(a, NamedSharding(mesh, PartitionSpec(*axes)))
    leaf, x = encode(place(w, None, "model"), Format(8)), place(x, "data", None)
    model = integer_apply(apply_fn, leaf, x)
    ours = model.apply(model.params, x)
    assert jax.typeof(ours).sharding.spec == PartitionSpec("data", None)
    np.testing.assert_allclose(ours, alone.apply(alone.params, jnp.ones((4, 16))), rtol=1e-6)


def test_it_runs_sharded(network):
    split, (params, x) = ("data", "model"), network
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    model = integer_apply(mlp, params, x)
    expected = model.apply(model.params, x)

    def place(array):
        spec = PartitionSpec(split[1]) if array.ndim else PartitionSpec()
        return jax.device_put(array, NamedSharding(mesh, spec))

    sharded = jax.tree.map(place, model.params)
    data = jax.device_put(x, NamedSharding(mesh, PartitionSpec(split[0])))
    np.testing.assert_allclose(model.apply(sharded, data), expected, rtol=1e-5, atol=1e-5)


def test_a_packed_tree_that_is_sharded_is_prepared_where_it_lies(network):
    params, x = network
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    place = lambda a: jax.device_put(a, NamedSharding(mesh, PartitionSpec(None, "model")))
    params = {**params, "first": jax.tree.map(place, params["first"])}
    model = integer_apply(mlp, params, x)
    codes = model.params.weights["first"].codes
    assert codes.addressable_shards[0].data.size == codes.size // 8
    whole = integer_apply(mlp, network[0], x)
    np.testing.assert_allclose(
        model.apply(model.params, x), whole.apply(whole.params, x), rtol=1e-5
    )


def test_other_batches_are_compiled_once_each(network):
    params, x = network
    traced = []

    def counted(params, x):
        traced.append(x.shape)
        return mlp(params, x)

    model = integer_apply(counted, params, x)
    for batch in (8, 8, 2, 2, 8):
        out = model.apply(model.params, x[:batch])
        assert out.shape == (batch, 8)
    assert sorted(traced) == [(2, 16), (8, 16)]


def test_floating_weights_are_gone_from_the_program(network):
    params, x = network
    x = x[:5]
    model = integer_apply(mlp, params, x)
    assert set(model.params.rest) == {"bias"}
    text = jax.jit(model.apply).lower(model.params, x).compile().as_text()
    assert "s8[24,16]" in text
    assert "f32[16,24]" not in text
    assert "f32[24,8]" not in text


def test_layers_weights_are_not_written_again():
    def model(params, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["stack"])[0]

    leaf = encode(jnp.ones((3, 8, 16, 16))[:, 0], Format(8, granularity=PerChannel((0, -1))))
    x = jnp.ones((4, 16))
    ints = integer_apply(model, {"stack": leaf}, x)
    jaxpr = jax.make_jaxpr(ints.apply)(ints.params, x)
    (scan,) = [e for e in jaxpr.eqns[0].params["jaxpr"].eqns if e.primitive.name == "scan"]
    assert all(out.aval.dtype != jnp.int8 for out in scan.outvars)


def test_nan_is_not_hidden(network):
    params, x = network
    broken = x.at[0, 0].set(jnp.nan)
    dynamic = integer_apply(mlp, params, x)
    assert jnp.isnan(dynamic.apply(dynamic.params, broken)).all()
    ranges = dict.fromkeys(
        ("first", "second"), Bounds(jnp.full((1, 1), -3.0), jnp.full((1, 1), 3.0))
    )
    fixed = integer_apply(mlp, params, x, ranges=ranges)
    assert jnp.isnan(fixed.apply(fixed.params, broken)).any()
    assert not jnp.isnan(fixed.apply(fixed.params, x)).any()


def odd(params, x):
    scaled = x @ (params["scaled"] * 2)
    looked = params["table"][jnp.arange(4)]
    both = scaled @ looked.T
    return both @ params["dense"] + params["used"].sum() + x @ params["grid"]


def test_what_stays_is_named():
    weight = lambda *shape: encode(jax.random.normal(jax.random.key(0), shape), Format(8))
    params = {
        "scaled": weight(8, 6),
        "table": weight(5, 6),
        "dense": jnp.ones((4, 3)),
        "used": weight(2, 2),
        "unused": weight(2, 2),
        "grid": kmeans(jax.random.normal(jax.random.key(0), (8, 3)), 4),
        "good": weight(3, 2),
    }
    x = jax.random.normal(jax.random.key(1), (3, 8))
    apply_fn = lambda p, x: odd(p, x) @ p["good"]
    model = integer_apply(apply_fn, params, x)
    assert list(model.executed) == ["good"]
    reasons = {
        "scaled": "changed",
        "dense": "not quantized",
        "grid": "no uniform integers",
        "unused": "no output depends on it",
        "table, read by gather": "looked up",
        "used, read by reduce_sum": "needs its values",
        "scaled, read by mul": "needs its values",
    }
    for name, reason in reasons.items():
        assert reason in model.left[name], model.left
    assert all(f"left: {name}" in str(model) for name in model.left)
    assert "good" in str(model).splitlines()[1]
    assert set(model.params.rest) == set(params) - {"good", "unused"}
    expected = activations(apply_fn, params, x, points=["good"])(params, x)
    np.testing.assert_allclose(model.apply(model.params, x), expected, rtol=1e-4, atol=1e-3)


def test_either_side_may_be_the_weight_and_layouts_are_followed():
    def model(params, x):
        left = jnp.einsum("oi,bi->ob", params["left"][:, ::-1][2:], x)
        batched = jnp.einsum("eij,ebi->ebj", params["experts"], jnp.stack([x, 2 * x]))
        half = x.astype(jnp.bfloat16) @ params["half"].reshape(6, 4).astype(jnp.bfloat16)
        return left, batched, half

    weight = lambda axis, *shape: encode(
        jax.random.normal(jax.random.key(0), shape), Format(8, granularity=PerChannel(axis))
    )
    params = {
        "left": weight(0, 7, 6),
        "experts": weight((0, 2), 2, 6, 3),
        "half": weight(1, 6, 2, 2),
    }
    x = jax.random.normal(jax.random.key(1), (5, 6))
    ints = integer_apply(model, params, x)
    assert not ints.left
    ours = ints.apply(ints.params, x)
    expected = activations(model, params, x)(params, x)
    for a, b, tolerance in zip(ours, expected, (1e-5, 1e-5, 5e-2), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a.astype(float), b.astype(float), atol=tolerance)


def test_scales_along_the_inputs_are_refused_by_name():
    leaf = encode(jnp.ones((8, 4)), Format(8, granularity=PerChannel(0)))
    with pytest.raises(ValueError, match="kernel: its scales change every 1 of the inputs"):
        integer_apply(lambda p, x: x @ p["kernel"], {"kernel": leaf}, jnp.ones((2, 8)))


def test_what_cannot_be_is_refused(network):
    params, x = network
    with pytest.raises(ValueError, match="first: first is not quantized"):
        integer_apply(mlp, decode(params), x)
    with pytest.raises(ValueError, match="added up scales of their own"):
        integer_apply(mlp, params, x, format=Format(8, granularity=PerGroup(8, -1)))
    with pytest.raises(ValueError, match="matches nothing"):
        integer_apply(mlp, params, x, points=["frist"])
    with pytest.raises(TypeError, match="format"):
        integer_apply(mlp, params, x, format=8)
    with pytest.raises(ValueError, match="ranges: there is none for 'second'"):
        integer_apply(mlp, params, x, ranges={"first": bounds_of(x, SYMMETRIC)})
    with pytest.raises(TypeError, match="params must be those of the integer model"):
        integer_apply(mlp, params, x).apply(params, x)
    long = encode(jnp.ones((1 << 17, 1)), Format(8, False))
    with pytest.raises(ValueError, match="could exceed 32 bits"):
        integer_apply(lambda w, x: x @ w, long, jax.ShapeDtypeStruct((1, 1 << 17), jnp.float32))
