"""Paths, patterns and selections."""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from flax.core import freeze
from hypothesis import given
from hypothesis import strategies as st

from jaxcomp import quantize, tree
from jaxcomp.quantize import Format


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3))(x)
        x = nn.BatchNorm(use_running_average=True)(x)
        x = nn.LayerNorm()(x)
        return nn.Dense(3)(x.reshape(len(x), -1)) + nn.Embed(5, 3)(jnp.zeros(1, int))


def weights_of(params):
    return list(tree.select(params))


def test_linen_variables_give_kernels_and_embeddings_only():
    variables = Linen().init(jax.random.key(0), jnp.ones((1, 4, 4, 1)))
    assert weights_of(variables) == [
        "params/Conv_0/kernel",
        "params/Dense_0/kernel",
        "params/Embed_0/embedding",
    ]
    assert weights_of(freeze(variables)) == weights_of(variables)


def test_flax_boxes_do_not_count_as_levels():
    layer = nn.Dense(
        3, kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), ("a", "b"))
    )
    params = layer.init(jax.random.key(0), jnp.ones((1, 2)))["params"]
    assert list(tree.flatten(params)) == ["bias", "kernel"]
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param)
    assert list(tree.flatten(state)) == ["bias", "kernel"]
    assert list(tree.flatten(nnx.to_pure_dict(state))) == ["bias", "kernel"]


def test_equinox_and_haiku_paths():
    linear = eqx.nn.MLP(2, 3, 4, 1, key=jax.random.key(0))
    params = eqx.filter(linear, eqx.is_array)
    assert weights_of(params) == ["layers/0/weight", "layers/1/weight"]
    net = hk.transform(lambda x: hk.nets.MLP([4, 3])(x))
    params = net.init(jax.random.key(0), jnp.ones((1, 2)))
    assert weights_of(params) == ["mlp/~/linear_0/w", "mlp/~/linear_1/w"]


def test_stacked_biases_and_norms_are_not_weights():
    params = {"kernel": jnp.ones((3, 2, 4)), "bias": jnp.ones((3, 4)), "scale": jnp.ones((3, 4))}
    assert weights_of(params) == ["kernel"]
    assert not tree.is_weight("count", jnp.ones((2, 2), jnp.int32))


def test_replace_keeps_other_leaves_as_the_same_objects():
    params = {"a": [jnp.ones(2), jnp.zeros(2)], "b": (jnp.ones(3), None)}
    new = tree.replace(params, {"a/1": "x"})
    assert new["a"][1] == "x"
    assert new["a"][0] is params["a"][0]
    assert new["b"][0] is params["b"][0]
    assert new["b"][1] is None


def test_compressed_leaves_stay_whole():
    params = {"kernel": quantize.encode(jnp.ones((2, 4)), Format(4)), "bias": jnp.ones(4)}
    assert list(tree.flatten(params)) == ["bias", "kernel"]
    assert not tree.is_weight("kernel", params["kernel"])
    with pytest.raises(TypeError, match="kernel: already compressed"):
        tree.check_weight("kernel", params["kernel"])


def test_unknown_paths_name_the_nearest():
    params = {"Dense_0": {"kernel": 1}, "Conv_0": {"kernel": 2}}
    with pytest.raises(
        ValueError, match=r"'Dense_0/kernle' is not in the tree; nearest: Dense_0/k"
    ):
        tree.replace(params, {"Dense_0/kernle": 0})
    with pytest.raises(ValueError, match=r"made for a tree with a leaf 'x'"):
        tree.take(params, ["x"])
    with pytest.raises(ValueError, match=r"pattern 'Dens_\*' matches no leaf; nearest: Dense_0"):
        tree.assign(["Dens_*"], tree.flatten(params))


def test_colliding_paths_are_refused():
    with pytest.raises(ValueError, match="two leaves have the path 'a/b'"):
        tree.flatten({"a": {"b": 1}, "a/b": 2})


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (jnp.array([1, 2]), "int32 is not a floating"),
        (3.0, "float is not a floating array"),
        (jnp.zeros((0, 3)), "no elements"),
        (jnp.array([jnp.inf, 1]), "1 of 2 values are NaN or infinite"),
    ],
)
def test_bad_weights_are_named(leaf, message):
    with pytest.raises((TypeError, ValueError), match=f"layer/kernel: .*{message}"):
        tree.check_weight("layer/kernel", leaf)


def test_a_selection_is_a_pytree_in_tree_order():
    leaves = tree.Leaves({"b": jnp.ones(2), "a": jnp.zeros(3)})
    doubled = jax.jit(lambda t: jax.tree.map(lambda x: 2 * x, t))(leaves)
    assert isinstance(doubled, tree.Leaves)
    assert list(doubled) == ["b", "a"]
    assert list(tree.select(tree.Leaves(bias=jnp.ones(3)))) == ["bias"]


names = st.text("ab*?/", min_size=1, max_size=4)


@given(
    st.lists(names, min_size=1, max_size=4, unique=True),
    st.lists(st.text("ab/", min_size=1, max_size=4), min_size=1, max_size=6, unique=True),
)
def test_the_first_matching_pattern_has_the_path(patterns, paths):
    unmatched = [p for p in patterns if not tree.matching(p, paths)]
    if unmatched:
        with pytest.raises(ValueError, match="matches no leaf"):
            tree.assign(patterns, paths)
        return
    found = tree.assign(patterns, paths)
    for path in paths:
        first = [p for p in patterns if path in tree.matching(p, paths)]
        assert found.get(path) == (first[0] if first else None)


def test_weights_closed_over_by_a_trace_are_checked_too():
    good, bad = {"kernel": jnp.ones((2, 3))}, {"kernel": jnp.full((2, 3), jnp.nan)}
    count = jax.jit(lambda: quantize.train(Format(4)).init(good).buffers.step)()
    assert int(count) == 0
    with pytest.raises(ValueError, match="kernel: 6 of 6 values are NaN"):
        jax.jit(lambda: quantize.train(Format(4)).init(bad).buffers.step)()
