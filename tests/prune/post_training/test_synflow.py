"""Synaptic flow against a float64 form in numpy, and the laws that the paper proves."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxcomp import tree as tree_lib
from jaxcomp.prune import scores
from jaxcomp.prune.masks import apply_masks
from jaxcomp.prune.post_training.synflow import synaptic_flow


def mlp(params, x):
    for name in sorted(params):
        x = jax.nn.relu(x @ params[name])
    return x


def network(widths, seed=0):
    generator = np.random.default_rng(seed)
    pairs = itertools.pairwise(widths)
    return {
        f"layer_{i}": jnp.asarray(generator.normal(size=pair), jnp.float32)
        for i, pair in enumerate(pairs)
    }


def numpy_scores(matrices):
    """|w| times the sum over all paths through it: all that comes before times all that follows."""
    before = [np.ones(matrices[0].shape[0])]
    for matrix in matrices:
        before.append(before[-1] @ matrix)
    after = [np.ones(matrices[-1].shape[1])]
    for matrix in reversed(matrices):
        after.append(matrix @ after[-1])
    after = after[::-1]
    return [
        matrix * before[i][:, None] * after[i + 1][None, :] for i, matrix in enumerate(matrices)
    ]


def numpy_masks(params, sparsity, rounds):
    """Algorithm 1, with sorts, in float64."""
    absolute = [np.abs(np.asarray(params[name], np.float64)) for name in sorted(params)]
    kept = [np.ones(matrix.shape, bool) for matrix in absolute]
    total = sum(matrix.size for matrix in absolute)
    for turn in range(1, rounds + 1):
        found = numpy_scores([matrix * mask for matrix, mask in zip(absolute, kept, strict=True)])
        flat = np.concatenate([np.ravel(f) for f in found])
        gone = ~np.concatenate([np.ravel(mask) for mask in kept])
        order = np.argsort(np.where(gone, -1, flat), kind="stable")
        count = int(np.floor(total * (1 - (1 - sparsity) ** (turn / rounds)) + 0.5))
        new = np.ones(total, bool)
        new[order[:count]] = False
        ends = np.cumsum([matrix.size for matrix in absolute])[:-1]
        parts = np.split(new, ends)
        kept = [part.reshape(matrix.shape) for part, matrix in zip(parts, absolute, strict=True)]
    return dict(zip(sorted(params), kept, strict=True))


@pytest.mark.parametrize(("sparsity", "rounds"), [(0.9, 1), (0.9, 20), (0.8, 2)])
def test_against_the_algorithm_in_float64(sparsity, rounds):
    params = network((6, 9, 7, 4))
    found = synaptic_flow(mlp, params, jnp.zeros((1, 6)), sparsity=sparsity, rounds=rounds)
    expected = numpy_masks(params, sparsity, rounds)
    assert list(found) == list(expected)
    for name, mask in expected.items():
        np.testing.assert_array_equal(found[name], mask, err_msg=name)


@settings(max_examples=8)
@given(st.integers(0, 1000))
def test_every_layer_holds_the_whole_flow(seed):
    """Conservation: the scores of a layer add up to R, and so do those into and out of a neuron."""
    params = network((5, 6, 3, 4), seed)
    positive = jax.tree.map(jnp.abs, params)
    flow = lambda p: jnp.sum(mlp(p, jnp.ones((1, 5))))
    found = jax.tree.map(scores.synaptic_flow, params, jax.grad(flow)(positive))
    total = float(flow(positive))
    for layer in found.values():
        np.testing.assert_allclose(np.sum(layer), total, rtol=1e-5)
    np.testing.assert_allclose(
        np.sum(found["layer_0"], axis=0), np.sum(found["layer_1"], axis=1), rtol=1e-4
    )


def test_many_rounds_keep_layers_alive_where_one_does_not():
    params = network((8, 64, 64, 64, 2), seed=3)
    x = jnp.zeros((1, 8))
    masks = synaptic_flow(mlp, params, x, sparsity=0.99, rounds=100)
    total = sum(mask.size for mask in masks.values())
    assert sum(int(jnp.sum(mask)) for mask in masks.values()) == round(total * 0.01)
    positive = jax.tree.map(jnp.abs, apply_masks(params, masks))
    assert float(jnp.sum(mlp(positive, jnp.ones((1, 8))))) > 0
    # Magnitude at the same sparsity leaves no path here: the law above is worth something.
    sizes = np.concatenate([np.abs(np.ravel(leaf)) for leaf in params.values()])
    threshold = np.quantile(sizes, 0.99)
    large = jax.tree.map(lambda w: jnp.where(jnp.abs(w) > threshold, jnp.abs(w), 0), params)
    assert float(jnp.sum(mlp(large, jnp.ones((1, 8))))) == 0


def test_signs_inputs_and_scales_of_layers_do_not_matter():
    params = network((6, 9, 7, 4))
    base = synaptic_flow(mlp, params, jnp.zeros((1, 6)), sparsity=0.8, rounds=5)
    changed = dict(params, layer_0=-params["layer_0"], layer_1=4 * params["layer_1"])
    x = jnp.full((1, 6), -7, jnp.bfloat16)
    again = synaptic_flow(mlp, changed, x, sparsity=0.8, rounds=5)
    for name in base:
        np.testing.assert_array_equal(base[name], again[name])


def test_what_went_does_not_come_back():
    """A gate that goes first leaves four weights of no score before it in the tree."""
    params = {"fan": jnp.array([[1.0, 5.0, 7.0]] * 4), "gate": jnp.full((1, 3), 90.0)}
    gated = lambda p, x: (x @ p["fan"]) * (p["gate"] / (p["gate"] + 9))
    x = jnp.zeros((1, 4))
    first = synaptic_flow(gated, params, x, sparsity=1 / 15, rounds=1)
    np.testing.assert_array_equal(first["gate"], [[False, True, True]])
    second = synaptic_flow(gated, params, x, sparsity=2 / 15, rounds=2)
    np.testing.assert_array_equal(second["gate"], [[False, True, True]])
    assert int(jnp.sum(~second["fan"])) == 1


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_sharded_weights(kind):
    mesh = jax.make_mesh((2,), ("model",), axis_types=(kind,))
    place = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))
    params, x = network((6, 8, 2)), jnp.zeros((1, 6))
    specs = {"layer_0": place(None, "model"), "layer_1": place("model", None)}
    sharded = {name: jax.device_put(leaf, specs[name]) for name, leaf in params.items()}

    def spread(p, x):
        hidden = jax.nn.relu(x @ p["layer_0"])
        # Explicit axes want to be told where a sum over them goes.
        return jnp.dot(hidden, p["layer_1"], out_sharding=place())

    found = synaptic_flow(
        spread if kind == AxisType.Explicit else mlp,
        sharded,
        jax.device_put(x, place()),
        sparsity=0.8,
        rounds=3,
    )
    for name, mask in synaptic_flow(mlp, params, x, sparsity=0.8, rounds=3).items():
        np.testing.assert_array_equal(found[name], mask)
        assert found[name].sharding.is_equivalent_to(sharded[name].sharding, 2)


class Small(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(4, (3, 3))(x)))
        return nn.Dense(3)(x.mean((1, 2)))


def test_a_linen_model_with_statistics_and_chosen_leaves():
    model, x = Small(), jnp.zeros((1, 6, 6, 2))
    variables = model.init(jax.random.key(0), x)
    masks = synaptic_flow(model.apply, variables, x, sparsity=0.5, rounds=4)
    assert list(masks) == ["params/Conv_0/kernel", "params/Dense_0/kernel"]
    assert sum(int(jnp.sum(~mask)) for mask in masks.values()) == (72 + 12) // 2
    some = synaptic_flow(model.apply, variables, x, sparsity=0.5, rounds=4, paths="*Conv_0/kernel")
    assert [int(jnp.sum(~mask)) for mask in some.values()] == [36]


def test_token_ids_are_used_as_they_are():
    params = {"table": jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), "head": jnp.eye(2)}
    apply = lambda p, ids: p["table"][ids] @ p["head"]
    masks = synaptic_flow(apply, params, np.array([1]), sparsity=0.4, rounds=1, paths="table")
    np.testing.assert_array_equal(masks["table"], [[False, False], [True, True], [True, True]])


def test_a_flow_that_overflows_is_refused_and_float64_holds_it():
    params, x = network((40,) * 28), jnp.zeros((1, 40))
    with pytest.raises(ValueError, match=r"round 0: the flow is inf, .* enable float64"):
        synaptic_flow(mlp, params, x, sparsity=0.9, rounds=2)
    with jax.enable_x64(True):
        double = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
        found = synaptic_flow(mlp, double, x, sparsity=0.9, rounds=2)
    for name, mask in numpy_masks(params, 0.9, 2).items():
        np.testing.assert_array_equal(found[name], mask)


def test_nothing_is_lost_on_the_way_back_at_the_edge_of_float32():
    params = network((40,) * 24)
    expected = numpy_masks(params, 0.5, 1)
    found = synaptic_flow(mlp, params, jnp.zeros((1, 40)), sparsity=0.5, rounds=1)
    wrong = sum(int(np.sum(found[name] != mask)) for name, mask in expected.items())
    assert wrong <= 4  # float32 may put a few neighbours in another order


def test_refusals():
    params, x = network((3, 4, 2)), jnp.zeros((1, 3))
    with pytest.raises(ValueError, match=r"in \[0, 1\), not 90"):
        synaptic_flow(mlp, params, x, sparsity=90)
    with pytest.raises(ValueError, match="rounds is 0"):
        synaptic_flow(mlp, params, x, sparsity=0.5, rounds=0)
    with pytest.raises(ValueError, match="pattern 'none' matches no leaf"):
        synaptic_flow(mlp, params, x, sparsity=0.5, paths="none")
    with pytest.raises(ValueError, match="layer_0: 12 of 12 values are NaN"):
        synaptic_flow(mlp, params | {"layer_0": jnp.full((3, 4), jnp.nan)}, x, sparsity=0.5)
    with pytest.raises(ValueError, match="round 0: the flow is 0"):
        synaptic_flow(mlp, params | {"layer_1": jnp.zeros((4, 2))}, x, sparsity=0.5)
    tiny = params | {"layer_1": 1e-3 * jnp.ones((4, 2))}
    skipping = lambda p, x: mlp({"layer_0": p["layer_0"]}, x).sum() + mlp(p, x).sum()
    with pytest.raises(ValueError, match="layer_1: all 8 weights would be removed"):
        synaptic_flow(skipping, tiny, x, sparsity=0.6, rounds=1)


def test_shares_of_nearly_nothing_are_still_ordered():
    """Weights small enough that the flow underflows unless it is divided out."""
    params = jax.tree.map(lambda leaf: leaf * 1e-9, network((6, 9, 7, 4)))
    found = synaptic_flow(mlp, params, jnp.zeros((1, 6)), sparsity=0.5, rounds=2)
    for name, mask in numpy_masks(params, 0.5, 2).items():
        np.testing.assert_array_equal(found[name], mask)
    assert list(tree_lib.flatten(found)) == list(params)
