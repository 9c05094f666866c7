"""BatchNorm folded into the layer before it: the same function, and what can be said of leaves."""

import functools

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxcomp import quantize
from jaxcomp import tree as tree_lib
from jaxcomp.quantize import Format, PerChannel, PerTensor
from jaxcomp.quantize.training.batch_norm import fold_batch_norm, freeze_batch_norm

RNG = np.random.default_rng(0)
IMAGES = jnp.asarray(RNG.normal(size=(2, 6, 6, 3)), jnp.float32)


class Net(nn.Module):
    """Convolutions with and without bias, depthwise, dense; norms with and without parameters."""

    @nn.compact
    def __call__(self, x):
        norm = functools.partial(nn.BatchNorm, use_running_average=True)
        x = nn.relu(norm(epsilon=1e-3, name="n0")(nn.Conv(8, (3, 3), name="c0")(x)))
        y = nn.Conv(8, (3, 3), feature_group_count=8, use_bias=False, name="c1")(x)
        y = nn.relu(norm(name="n1", use_scale=False)(y))
        y = norm(name="n2", use_bias=False)(nn.Conv(8, (1, 1), name="c2")(y))
        x = nn.relu(norm(name="behind_a_sum")(x + y))
        x = norm(name="behind_a_relu")(x)
        x = x.mean((1, 2))
        x = norm(name="n3", use_bias=False, use_scale=False)(nn.Dense(5, name="d0")(x))
        z = nn.Dense(5, name="used_twice")(x)
        return norm(name="n4")(z) + z


def randomized(tree):
    """Statistics of a network that was trained: no norm is near the identity, signs differ."""

    def one(path, leaf):
        if path.endswith("var"):
            return jnp.asarray(RNG.uniform(0.2, 3, leaf.shape), leaf.dtype)
        return jnp.asarray(RNG.normal(size=leaf.shape), leaf.dtype)

    return tree_lib.replace(tree, {p: one(p, leaf) for p, leaf in tree_lib.flatten(tree).items()})


@functools.cache
def folded_net():
    variables = randomized(jax.eval_shape(Net().init, jax.random.key(0), IMAGES))
    return variables, fold_batch_norm(Net().apply, variables, IMAGES)


def test_the_function_stays_and_every_norm_is_told():
    variables, result = folded_net()
    assert jax.tree.structure(result.variables) == jax.tree.structure(variables)
    x = jnp.asarray(RNG.normal(size=IMAGES.shape), jnp.float32)
    before, after = Net().apply(variables, x), Net().apply(result.variables, x)
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4)
    names = {path.rsplit("/", 1)[-1]: kernel for path, kernel in result.folded}
    assert names == {f"n{i}": f"params/{k}/kernel" for i, k in enumerate(("c0", "c1", "c2", "d0"))}
    kept = {path.rsplit("/", 1)[-1]: reason for path, reason in result.kept}
    assert kept.keys() == {"behind_a_sum", "behind_a_relu", "n4"}
    assert "add" in kept["behind_a_sum"]
    assert "max" in kept["behind_a_relu"]
    assert "used elsewhere" in kept["n4"]
    assert all(name in str(result) for name in (*names, *kept))


def test_a_folded_norm_is_an_identity_and_a_shift():
    variables, result = folded_net()
    old, new = (tree_lib.flatten(tree) for tree in (variables, result.variables))
    for name, epsilon in (("n0", 1e-3), ("n1", 1e-5), ("n2", 1e-5), ("n3", 1e-5)):
        np.testing.assert_allclose(new[f"batch_stats/{name}/var"], 1 - epsilon, rtol=1e-6)
        if f"params/{name}/scale" in new:
            np.testing.assert_array_equal(new[f"params/{name}/scale"], 1)
        if f"params/{name}/bias" in new:
            np.testing.assert_array_equal(new[f"batch_stats/{name}/mean"], 0)
    # In float64, by the definition.
    wide = {path: np.asarray(leaf, np.float64) for path, leaf in old.items()}
    factor = wide["params/n0/scale"] / np.sqrt(wide["batch_stats/n0/var"] + 1e-3)
    for got, want in (
        ("params/c0/kernel", wide["params/c0/kernel"] * factor),
        ("params/c0/bias", wide["params/c0/bias"] * factor),
        ("params/n0/bias", wide["params/n0/bias"] - wide["batch_stats/n0/mean"] * factor),
        (
            "params/c1/kernel",
            wide["params/c1/kernel"] / np.sqrt(wide["batch_stats/n1/var"] + 1e-5),
        ),
    ):
        np.testing.assert_allclose(new[got], want, rtol=1e-5, atol=1e-6)
    untouched = [path for path in new if "behind" in path or "used_twice" in path or "n4" in path]
    assert untouched
    assert all(new[path] is old[path] for path in untouched)


def test_scales_for_each_channel_do_not_notice_and_a_single_one_does():
    """What is said of quantization: the effect of rounding is the same, or not."""
    variables, result = folded_net()

    def moved(tree, granularity):
        kernels = {
            path: quantize.fake_quant(leaf, Format(4, granularity=granularity))
            for path, leaf in tree_lib.flatten(tree).items()
            if path.split("/")[1] in ("c0", "c1", "c2", "d0") and path.endswith("kernel")
        }
        return Net().apply(tree_lib.replace(tree, kernels), IMAGES)

    channel = [moved(tree, PerChannel(-1)) for tree in (variables, result.variables)]
    np.testing.assert_allclose(*channel, rtol=1e-3, atol=1e-3)
    single = [moved(tree, PerTensor()) for tree in (variables, result.variables)]
    assert float(jnp.max(jnp.abs(single[0] - single[1]))) > 0.05


class Twin(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(4, 6, rngs=rngs)
        self.norm = nnx.BatchNorm(6, use_running_average=True, epsilon=0.01, rngs=rngs)
        self.out = nnx.Linear(6, 2, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.norm(self.dense(x))))


def test_nnx():
    graph, state = nnx.split(Twin(nnx.Rngs(0)))
    state = randomized(state)
    x = jnp.asarray(RNG.normal(size=(5, 4)), jnp.float32)
    apply_fn = lambda state, x: nnx.merge(graph, state)(x)
    result = fold_batch_norm(apply_fn, state, x)
    assert result.folded == (("norm", "dense/kernel"),)
    assert jax.tree.structure(result.variables) == jax.tree.structure(state)
    np.testing.assert_allclose(apply_fn(result.variables, x), apply_fn(state, x), rtol=1e-4)


def haiku_net():
    """Statistics in a tree of their own, with axes of one position."""

    def net(x, train=False):
        x = hk.BatchNorm(True, True, 0.9, eps=0.02)(hk.Conv2D(4, 3)(x), is_training=train)
        return hk.Linear(2)(jax.nn.relu(x))

    model = hk.without_apply_rng(hk.transform_with_state(net))
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, True), IMAGES)
    return lambda v, x: model.apply(*v, x)[0], variables, IMAGES, "0/conv2_d/w"


def equinox_net():
    """Vmapped over examples, each with channels first; a quotient, scale and bias behind it."""

    class Model(eqx.Module):
        conv: eqx.nn.Conv2d
        norm: eqx.nn.BatchNorm

        def __init__(self, key):
            self.conv = eqx.nn.Conv2d(3, 4, 3, key=key)
            self.norm = eqx.nn.BatchNorm(4, "batch", mode="ema")

        def __call__(self, x, state):
            y, _ = self.norm(self.conv(x), state, inference=True)
            return jax.nn.relu(y)

    arrays, static = eqx.partition(eqx.nn.make_with_state(Model)(jax.random.key(0)), eqx.is_array)

    def apply_fn(arrays, x):
        model, state = eqx.combine(arrays, static)
        return jax.vmap(lambda x: model(x, state), axis_name="batch")(x)

    return apply_fn, arrays, jnp.moveaxis(IMAGES, -1, 1), "0/conv/weight"


@pytest.mark.parametrize("make", [haiku_net, equinox_net])
def test_other_frameworks(make):
    apply_fn, variables, x, kernel = make()

    def one(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.ones(leaf.shape, leaf.dtype)
        return jnp.asarray(RNG.uniform(0.3, 2, leaf.shape), leaf.dtype)

    variables = jax.tree.map(one, variables)
    result = fold_batch_norm(apply_fn, variables, x)
    assert [path for _, path in result.folded] == [kernel]
    assert result.kept == ()
    before, after = apply_fn(variables, x), apply_fn(result.variables, x)
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4)
    old, new = (tree_lib.flatten(tree)[kernel] for tree in (variables, result.variables))
    assert not np.allclose(old, new, rtol=0.01)


def same_leaves(a, b):
    return all(x is y for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def plain(variables, x, axis=-1):
    """Written by hand: a kernel stored (output, input), a quotient, scale and bias after it."""
    shape = [-1 if at == axis % 2 else 1 for at in range(2)]
    v = {name: leaf.reshape(shape) for name, leaf in variables["norm"].items()}
    y = jax.checkpoint(lambda x: (x @ variables["kernel"].T - v["mean"]) / jnp.sqrt(v["var"] + 0.1))
    return jnp.tanh(y(x) * v["scale"] + v["bias"])


def leaves(size):
    norm = {name: jnp.zeros(size) for name in ("mean", "var", "scale", "bias")}
    return randomized({"kernel": jnp.zeros((4, 3)), "norm": norm})


def test_quotients_transposed_kernels_and_rematerialization():
    variables, x = leaves(4), jnp.asarray(RNG.normal(size=(5, 3)), jnp.float32)
    result = fold_batch_norm(plain, variables, x)
    assert result.folded == (("norm", "kernel"),)
    np.testing.assert_allclose(plain(result.variables, x), plain(variables, x), rtol=1e-4)
    wide = {k: np.asarray(v, np.float64) for k, v in variables["norm"].items()}
    factor = wide["scale"] / np.sqrt(wide["var"] + 0.1)
    want = np.asarray(variables["kernel"], np.float64) * factor[:, None]
    np.testing.assert_allclose(result.variables["kernel"], want, rtol=1e-5)


def test_a_norm_over_the_batch_axis_is_no_norm_of_channels():
    variables, x = leaves(5), jnp.asarray(RNG.normal(size=(5, 3)), jnp.float32)
    result = fold_batch_norm(functools.partial(plain, axis=0), variables, x)
    assert result.folded == ()
    assert "another axis" in result.kept[0][1]
    assert same_leaves(variables, result.variables)


def test_in_a_loop_it_stays_and_says_so():
    def apply_fn(variables, x):
        def body(x, layer):
            y = x @ layer["kernel"] - layer["mean"]
            return y * jax.lax.rsqrt(layer["var"] + 1e-5), None

        return jax.lax.scan(body, x, variables)[0]

    variables = {"kernel": jnp.ones((2, 3, 3)), "mean": jnp.ones((2, 3)), "var": jnp.ones((2, 3))}
    result = fold_batch_norm(apply_fn, variables, jnp.ones((4, 3)))
    assert result.folded == ()
    assert result.kept == (("var", "it is inside a loop (scan)"),)


def test_a_kernel_that_is_not_linear_in_its_leaf_is_found_out():
    """Standardized weights: multiplying the leaf does nothing."""

    def apply_fn(variables, x):
        kernel = variables["kernel"]
        kernel = kernel / jnp.sqrt(jnp.sum(kernel**2, 0, keepdims=True))
        return (x @ kernel - variables["mean"]) * jax.lax.rsqrt(variables["var"] + 1e-5)

    variables = randomized({"kernel": jnp.zeros((3, 4)), "mean": jnp.zeros(4), "var": jnp.zeros(4)})
    result = fold_batch_norm(apply_fn, variables, jnp.ones((2, 3)))
    assert result.folded == ()
    assert result.kept[0][0] == "var"
    assert same_leaves(variables, result.variables)


def test_what_is_refused():
    with pytest.raises(ValueError, match="inference mode"):
        fold_batch_norm(lambda p, x: x @ p, jnp.ones((2, 2)), jnp.ones((3, 2)))
    train = lambda v, x: nn.BatchNorm(use_running_average=False).apply(v, x, mutable=True)[0]
    variables = nn.BatchNorm(use_running_average=True).init(jax.random.key(0), jnp.ones((3, 2)))
    with pytest.raises(ValueError, match="inference mode"):
        fold_batch_norm(train, variables, jnp.ones((3, 2)))
    bad = leaves(4)
    bad["norm"]["mean"] = bad["norm"]["mean"] * jnp.nan
    with pytest.raises(ValueError, match="not finite"):
        fold_batch_norm(plain, bad, jnp.ones((5, 3)))
    with pytest.raises(ValueError, match="tolerance is -1"):
        fold_batch_norm(plain, leaves(4), jnp.ones((5, 3)), tolerance=-1)


def test_statistics_freeze_inside_a_compiled_step():
    @jax.jit
    def step(stats, count, x):
        new = {"mean": 0.9 * stats["mean"] + 0.1 * x}
        return freeze_batch_norm(stats, new, count, 3), count + 1

    stats, count = {"mean": jnp.float32(0)}, jnp.int32(0)
    found = []
    for _ in range(6):
        stats, count = step(stats, count, jnp.float32(1))
        found.append(float(stats["mean"]))
    np.testing.assert_allclose(found[:3], [0.1, 0.19, 0.271], rtol=1e-6)
    assert found[3:] == [found[2]] * 3
    assert step._cache_size() == 1
