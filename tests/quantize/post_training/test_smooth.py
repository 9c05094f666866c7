"""SmoothQuant: its definition, the same function, and what it gains in 8 bits."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxcomp import tree as tree_lib
from jaxcomp.model import tapped
from jaxcomp.model.program import read, walk
from jaxcomp.quantize.post_training.rescaling.smooth import smooth
from tests.model.cutting import difference
from tests.model.zoo import ZOO

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(4, 6, 16)), jnp.float32)
OUTLIERS = (3, 11)


def layer_norm(x, scale, bias):
    x = x - x.mean(-1, keepdims=True)
    return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale + bias


def projections(params, x):
    h = layer_norm(x, params["scale"], params["bias"])
    return tuple(h @ params[name] for name in ("query", "key", "value"))


def attention_params(seed=0):
    rng = np.random.default_rng(seed)
    params = {name: rng.normal(size=(16, 8)) / 4 for name in ("query", "key", "value")}
    params |= {"scale": np.exp(0.3 * rng.normal(size=16)), "bias": 0.1 * rng.normal(size=16)}
    params["scale"][list(OUTLIERS)] *= 40
    return {name: jnp.asarray(value, jnp.float32) for name, value in params.items()}


def reference(params, xs, strength):
    """Equation 4 with the largest of all kernels that read the norm, in float64."""
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    x = np.asarray(xs, np.float64).reshape(-1, 16)
    x = x - x.mean(-1, keepdims=True)
    h = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]
    kernels = np.concatenate([p["query"], p["key"], p["value"]], 1)
    s = np.abs(h).max(0) ** strength / np.abs(kernels).max(1) ** (1 - strength)
    return {k: v / s if v.ndim == 1 else v * s[:, None] for k, v in p.items()}


@pytest.mark.parametrize("strength", [0.5, 0.8])
def test_it_is_the_papers_equation(strength):
    params = attention_params()
    found = smooth(projections, params, [X[:2], X[2:]], strength=strength)
    for name, expected in reference(params, X, strength).items():
        np.testing.assert_allclose(found.params[name], expected, rtol=2e-5, atol=1e-7)
    (group,) = found.groups
    assert set(group.divided) == {"scale", "bias"}
    assert set(group.multiplied) == {"query", "key", "value"}
    assert group.after < group.before / 3
    assert difference(projections(params, X), projections(found.params, X)) < 1e-5


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.LayerNorm(name="norm")(x)
        return x + nn.MultiHeadDotProductAttention(2, name="attention")(h)


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(16, rngs=rngs)
        self.up = nnx.Linear(16, 24, rngs=rngs)
        self.down = nnx.Linear(24, 16, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.relu(self.up(self.norm(x))))


def linen_block():
    model = LinenBlock()
    return model.apply, jax.jit(model.init)(jax.random.key(0), X)


def nnx_block():
    graph, state = nnx.split(NnxBlock(nnx.Rngs(0)))
    return lambda state, x: nnx.merge(graph, state)(x), state


def with_outliers(params):
    """A trained transformer's habit: a few channels of its norms are very wide."""
    leaves = tree_lib.flatten(params)
    wide = {
        path: leaf.at[jnp.array(OUTLIERS)].mul(40.0)
        for path, leaf in leaves.items()
        if path.endswith("scale")
    }
    return tree_lib.replace(params, wide)


def rounded(x):
    """8 bits, a scale a tensor."""
    scale = jnp.max(jnp.abs(x)) / 127
    return jnp.clip(jnp.round(x / scale), -127, 127) * scale


def simulated(apply_fn, params, x):
    """Weights, and what each dot and its like reads, in 8 bits a tensor, whatever the model."""

    weights = {
        path: rounded(leaf) if tree_lib.is_weight(path, leaf) else leaf
        for path, leaf in tree_lib.flatten(params).items()
    }
    params = tree_lib.replace(params, weights)
    program = read(apply_fn, params, x)

    def swap(inputs, bind):
        return bind(*map(rounded, inputs))

    swaps = {op: swap for op in walk(program.block) if op.name == "dot_general"}
    run = lambda *values: tapped.run(program, values, {}, {}, swaps)[0]
    return jax.jit(run)(*jax.tree.leaves(params), x)[0]


@pytest.mark.parametrize("make", [linen_block, nnx_block])
def test_8_bits_lose_less_on_a_block_with_wide_channels(make):
    apply_fn, params = make()
    params = with_outliers(params)
    found = smooth(apply_fn, params, [X])
    run = jax.jit(apply_fn)
    exact = run(params, X)
    assert difference(exact, run(found.params, X)) < 1e-5
    assert jax.tree.structure(found.params) == jax.tree.structure(params)
    assert not any(group.kept for group in found.groups)
    plain, even = (
        float(jnp.mean((simulated(apply_fn, each, X) - exact) ** 2))
        for each in (params, found.params)
    )
    assert even < plain / 2


@pytest.mark.parametrize(
    "name", [pytest.param("llama half-split", marks=pytest.mark.slow), "group norm"]
)
def test_the_zoo_computes_the_same(name):
    case = ZOO[name]()
    found = smooth(case.apply_fn, case.params, [case.inputs])
    run = jax.jit(case.apply_fn)
    outputs = run(case.params, *case.inputs), run(found.params, *case.inputs)
    assert difference(*outputs) < 1e-5
    assert any(not group.kept for group in found.groups)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in ZOO if n not in ("llama half-split", "group norm")])
def test_the_rest_of_the_zoo_computes_the_same(name):
    case = ZOO[name]()
    found = smooth(case.apply_fn, case.params, [case.inputs])
    run = jax.jit(case.apply_fn)
    outputs = run(case.params, *case.inputs), run(found.params, *case.inputs)
    assert difference(*outputs) < max(case.tolerance, 1e-5)


def test_stacked_layers_have_scales_of_their_own():
    def model(params, x):
        def layer(x, p):
            h = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p["scale"]
            return x + jnp.tanh(h @ p["w"]), None

        return jax.lax.scan(layer, x, params)[0]

    scale = np.exp(RNG.normal(size=(3, 16)))
    params = {
        "scale": jnp.asarray(scale, jnp.float32),
        "w": jnp.asarray(RNG.normal(size=(3, 16, 16)) / 4, jnp.float32),
    }
    found = smooth(model, params, [X])
    (group,) = found.groups
    assert (group.channels, group.divided, group.multiplied) == (48, ("scale",), ("w",))
    s = np.asarray(params["scale"] / found.params["scale"])
    np.testing.assert_allclose(found.params["w"], params["w"] * s[:, :, None], rtol=1e-5)
    assert np.abs(s[0] / s[1] - 1).max() > 0.3
    assert difference(model(params, X), model(found.params, X)) < 1e-5


def test_a_residual_sum_that_reads_a_norm_is_an_obstacle_and_is_named():
    def post_norm(params, x):
        h = layer_norm(x, params["scale"], params["bias"])
        h = h + h @ params["query"] @ params["query"].T
        return h - h.mean(-1, keepdims=True)

    params = attention_params()
    found = smooth(post_norm, {k: params[k] for k in ("scale", "bias", "query")}, [X])
    assert all(group.kept for group in found.groups)

    def post_norm(params, x):
        h = layer_norm(x, params["scale"], params["bias"])
        h = h + jnp.tanh(h @ params["query"]) @ params["key"].T
        return h - h.mean(-1, keepdims=True)

    found = smooth(post_norm, {k: params[k] for k in ("scale", "bias", "query", "key")}, [X])
    reasons = {group.name: group.kept for group in found.groups}
    assert reasons["key"] == "tanh is not homogeneous"
    assert "mixes" in reasons["query"] or "runs over" in reasons["query"]


def test_a_channel_that_is_never_on_keeps_its_scale():
    params = attention_params()
    params["scale"] = params["scale"].at[5].set(0)
    params["bias"] = params["bias"].at[5].set(0)
    found = smooth(projections, params, [X]).params
    np.testing.assert_array_equal(found["query"][5], params["query"][5])
    assert np.isfinite(found["scale"]).all()


def test_arguments_that_do_not_fit_are_refused():
    params = attention_params()
    for strength in (-0.1, 1.5, np.nan):
        with pytest.raises(ValueError, match="strength must be a number from 0 to 1"):
            smooth(projections, params, [X], strength=strength)
    with pytest.raises(ValueError, match="batches is empty"):
        smooth(projections, params, [])
    with pytest.raises(ValueError, match="query"):
        smooth(projections, params, [X.at[0].set(jnp.nan)])
    with pytest.raises(ValueError, match="matches no leaf"):
        smooth(projections, params, [X], paths="querry")
