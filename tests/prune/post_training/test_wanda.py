"""WANDA against its published definition, written with loops in numpy on matrices (out, in)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from jaxcomp.prune.masks import apply_masks
from jaxcomp.prune.post_training.wanda import wanda
from jaxcomp.prune.structures import NM

WIDTH, HEADS, SIZE = 8, 2, 4


def published(weight, x, removed=None, runs=None):
    """Algorithm 1 of the paper: ``weight`` (out, in), ``x`` (samples, in), both float64."""
    metric = np.abs(weight) * np.linalg.norm(x, axis=0)
    kept = np.ones(weight.shape, bool)
    for row in range(weight.shape[0]):
        if runs is None:
            kept[row, np.argsort(metric[row])[:removed]] = False
            continue
        n, m = runs
        for start in range(0, weight.shape[1], m):
            order = np.argsort(metric[row, start : start + m])
            kept[row, start + order[: m - n]] = False
    return kept


def attention():
    """Every layout of a matrix that the libraries have, in one model."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {
        "query": (WIDTH, HEADS, SIZE),
        "out": (HEADS, SIZE, WIDTH),
        "turned": (12, WIDTH),
        "down[0]": (12, 3),  # brackets mean something in patterns, and must not here
    }
    pairs = zip(shapes.items(), keys, strict=True)
    return {name: jax.random.normal(key, shape) for (name, shape), key in pairs}


def model(params, x):
    heads = jnp.tanh(jnp.einsum("nd,dhk->nhk", x, params["query"]))
    mixed = jnp.tanh(jnp.einsum("nhk,hkd->nd", heads, params["out"]))
    return jnp.tanh(mixed @ params["turned"].T) @ params["down[0]"]


def matrices_and_inputs(params, x):
    """Each leaf as (out, in), what it is multiplied by, and the way back to the leaf's shape."""
    p = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
    query = p["query"].reshape(WIDTH, HEADS * SIZE).T
    out = p["out"].reshape(HEADS * SIZE, WIDTH).T
    x = np.float64(x)
    heads = np.tanh(x @ query.T)
    mixed = np.tanh(heads @ out.T)
    hidden = np.tanh(mixed @ p["turned"].T)
    return {
        "query": (query, x, lambda m: m.T.reshape(WIDTH, HEADS, SIZE)),
        "out": (out, heads, lambda m: m.T.reshape(HEADS, SIZE, WIDTH)),
        "turned": (p["turned"], mixed, lambda m: m),
        "down[0]": (p["down[0]"].T, hidden, lambda m: m.T),
    }


def inputs():
    # Features of very different sizes, so that magnitude alone decides otherwise.
    scale = np.exp(np.random.default_rng(1).normal(size=WIDTH) * 2)
    return (np.random.default_rng(2).normal(size=(40, WIDTH)) * scale).astype(np.float32)


@pytest.mark.parametrize("runs", [None, (2, 4)])
def test_every_layout_against_the_published_definition(runs):
    params, x = attention(), inputs()
    if runs is None:
        masks = wanda(model, params, iter([x[:10], x[10:]]), sparsity=0.5)
    else:
        masks = wanda(model, params, iter([x[:10], x[10:]]), structure=NM(*runs))
    assert list(masks) == sorted(params)
    differs = 0
    for name, (matrix, seen, back) in matrices_and_inputs(params, x).items():
        expected = back(published(matrix, seen, matrix.shape[1] // 2, runs))
        np.testing.assert_array_equal(masks[name], expected, err_msg=name)
        plain = back(published(matrix, np.ones((1, matrix.shape[1])), matrix.shape[1] // 2, runs))
        differs += int(np.sum(plain != expected))
    assert differs > 20  # the inputs had a say


def test_the_masks_prune_and_leaves_can_be_chosen():
    params, x = attention(), inputs()
    masks = wanda(model, params, [x], sparsity=0.75, paths=["turned", "que*"])
    assert list(masks) == ["query", "turned"]
    pruned = apply_masks(params, masks)
    np.testing.assert_array_equal(np.sum(pruned["turned"] != 0, axis=1), np.full(12, 2))
    np.testing.assert_array_equal(np.sum(pruned["query"] != 0, axis=0), np.full((2, 4), 2))
    assert pruned["out"] is params["out"]
    # Each choice is that of the dense model, whatever else is pruned.
    alone = wanda(model, params, [x], sparsity=0.75, paths="turned")
    np.testing.assert_array_equal(alone["turned"], masks["turned"])


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_loses_what_changes_its_outputs_least(groups):
    """The score is the change of the layer's output when one weight alone goes: measured here."""
    conv = nn.Conv(4, (3, 2), strides=2, feature_group_count=groups, use_bias=False)
    scale = np.exp(np.random.default_rng(0).normal(size=4) * 2)
    x = (np.random.default_rng(1).normal(size=(3, 5, 6, 4)) * scale).astype(np.float32)
    params = conv.init(jax.random.key(2), x)
    kernel = params["params"]["kernel"]
    dense = np.asarray(conv.apply(params, x), np.float64)

    def without(index):
        flat = kernel.ravel().at[index].set(0)
        return conv.apply({"params": {"kernel": flat.reshape(kernel.shape)}}, x)

    outputs = np.float64(jax.jit(jax.vmap(without))(jnp.arange(kernel.size)))
    change = np.sqrt(np.sum((outputs - dense) ** 2, axis=(1, 2, 3, 4))).reshape(-1, 4)
    expected = np.ones(change.shape, bool)
    for output in range(4):
        expected[np.argsort(change[:, output])[: len(change) // 2], output] = False
    masks = wanda(conv.apply, params, [x], sparsity=0.5)
    np.testing.assert_array_equal(masks["params/kernel"].reshape(-1, 4), expected)


def test_stacked_layers_and_experts_are_compared_apart():
    generator = np.random.default_rng(0)
    scale = np.exp(generator.normal(size=(3, 1, 8)))
    x = (generator.normal(size=(3, 20, 8)) * scale).astype(np.float32)
    experts = {"experts": generator.normal(size=(3, 8, 5)).astype(np.float32)}
    apply = lambda p, x: jnp.einsum("eni,eio->eno", x, p["experts"])
    masks = wanda(apply, experts, [x], sparsity=0.25)["experts"]
    for i in range(3):
        expected = published(np.float64(experts["experts"][i]).T, np.float64(x[i]), 2).T
        np.testing.assert_array_equal(masks[i], expected)
    layers = {"layers": jnp.float32(generator.normal(size=(3, 8, 8)) * scale[0, 0])}
    scanned = lambda p, x: jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["layers"])[0]
    masks = wanda(scanned, layers, [x[0]], structure=NM(2, 4))["layers"]
    hidden = np.float64(x[0])
    for i in range(3):
        layer = np.float64(layers["layers"][i])
        np.testing.assert_array_equal(masks[i], published(layer.T, hidden, runs=(2, 4)).T)
        hidden = np.tanh(hidden @ layer)


def test_sharded_weights_and_data():
    mesh = jax.make_mesh((2, 2), ("data", "model"))
    place = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))
    params, x = attention(), inputs()
    sharded = dict(params, turned=jax.device_put(params["turned"], place("model")))
    batches = [jax.device_put(x, place("data"))]
    masks = wanda(model, sharded, batches, sparsity=0.5, paths="turned")
    plain = wanda(model, params, [x], sparsity=0.5, paths="turned")
    np.testing.assert_array_equal(masks["turned"], plain["turned"])


def test_refusals():
    params, x = attention(), inputs()
    with pytest.raises(ValueError, match=r"pass sparsity, such as 0\.5, or structure"):
        wanda(model, params, [x])
    with pytest.raises(ValueError, match=r"in \[0, 1\), not 50"):
        wanda(model, params, [x], sparsity=50)
    with pytest.raises(ValueError, match="batches is empty"):
        wanda(model, params, [], sparsity=0.5)
    with pytest.raises(ValueError, match=r"query: .* needs an axis divisible by 3"):
        wanda(model, params, [x], structure=NM(1, 3), paths="query")
    bad = x.copy()
    bad[3, 2] = np.nan
    with pytest.raises(ValueError, match="batch 1: query is multiplied by 1 NaN"):
        wanda(model, params, [x, bad], sparsity=0.5, paths="query")
    broken = dict(params, out=params["out"].at[0, 0, 0].set(jnp.inf))
    with pytest.raises(ValueError, match="out: 1 of 64 values are NaN or infinite"):
        wanda(model, broken, [x], sparsity=0.5)

    def language(p, ids):
        return jnp.tanh(p["table"][ids] @ p["kernel"]) @ p["table"].T + p["shift"]

    table = {"table": jnp.ones((6, 4)), "kernel": jnp.eye(4), "shift": jnp.ones((1, 6))}
    ids = np.arange(5)
    with pytest.raises(ValueError, match=r"^table: its uses disagree .*\(1,\): name the leaves"):
        wanda(language, table, [ids], sparsity=0.5, paths="table")
    with pytest.raises(ValueError, match="shift: the model contracts nothing with it"):
        wanda(language, table, [ids], sparsity=0.5, paths="shift")
    assert list(wanda(language, table, [ids], sparsity=0.5, paths="kernel")) == ["kernel"]
