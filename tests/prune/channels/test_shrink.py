"""What goes with the parameters is cut with them, and training goes on as if it always had been."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcomp
from jaxcomp import prune, quantize, share
from jaxcomp import tree as tree_lib
from jaxcomp.prune.channels.shrink import shrink
from tests import methods

HIDDEN = np.array([0, 2, 3, 5, 6, 7])
KEPT = {
    "first/kernel": (None, HIDDEN),
    "first/bias": (HIDDEN,),
    "second/kernel": (HIDDEN, None),
}
PREFIXED = {f"params/{path}": kept for path, kept in KEPT.items()}


def model(weights, x):
    """ReLU, so that removed units, being zero, have no gradient either."""
    hidden = jax.nn.relu(x @ weights["first"]["kernel"] + weights["first"]["bias"])
    return hidden @ weights["second"]["kernel"] + weights["second"]["bias"]


def loss(weights, x, y):
    return jnp.mean((model(weights, x) - y) ** 2)


def masked(weights):
    """The same units set to zero."""
    mask = jnp.zeros(8).at[HIDDEN].set(1)
    first, second = weights["first"], weights["second"]
    return {
        "first": {"kernel": first["kernel"] * mask, "bias": first["bias"] * mask},
        "second": {"kernel": second["kernel"] * mask[:, None], "bias": second["bias"]},
    }


def assert_same(one, other, rtol=1e-5):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6)


kernels = {"first": {"kernel": True, "bias": False}, "second": {"kernel": True, "bias": False}}
OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adamw": lambda: optax.adamw(1e-2, weight_decay=0.1, mask=kernels),
    "lion": lambda: optax.lion(1e-3),
    "adafactor-unfactored": lambda: optax.adafactor(
        1e-2, factored=False, clipping_threshold=None, multiply_by_parameter_scale=False
    ),
    "chain": lambda: optax.chain(
        optax.clip_by_global_norm(0.5), optax.ema(0.9), optax.scale_by_adam(), optax.scale(-0.1)
    ),
    "schedule": lambda: optax.rmsprop(optax.cosine_decay_schedule(0.1, 20), momentum=0.9),
    "masked": lambda: optax.masked(optax.adam(1e-2), kernels),
    "masked-subtree": lambda: optax.masked(optax.adam(1e-2), {"first": True, "second": False}),
    "multi_transform": lambda: optax.multi_transform(
        {"slow": optax.adam(1e-3), "fast": optax.sgd(0.1, momentum=0.9)},
        {"first": "slow", "second": {"kernel": "fast", "bias": "slow"}},
    ),
    "inject": lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=1e-2),
    "multi_steps": lambda: optax.MultiSteps(optax.adam(1e-2), 2),
    "schedule_free": lambda: optax.contrib.schedule_free_adamw(1e-2),
    "finite": lambda: optax.apply_if_finite(optax.adam(1e-2), 3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_as_with_masked_weights(name):
    tx, params = OPTIMIZERS[name](), methods.params()
    x, y = methods.batch()

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params, x, y), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    params, state = step(params, state)
    params, state = step(params, state)
    params = masked(params)
    small, small_state = shrink(params, params, KEPT), shrink(state, params, KEPT)
    assert jax.eval_shape(tx.init, small) == jax.eval_shape(lambda: small_state)
    for _ in range(2):
        # Momenta of removed units may move their weights again: hold them at zero, as they are.
        full, state = step(params, state)
        params = masked(full)
        small, small_state = step(small, small_state)
        assert_same(shrink(params, params, KEPT), small)
        assert_same(shrink(state, params, KEPT), small_state)


def test_an_optimizer_of_one_collection():
    statistics = {"norm": {"mean": jnp.arange(8.0), "var": jnp.ones(8)}}
    variables = {"params": methods.params(), "batch_stats": statistics}
    kept = PREFIXED | {"batch_stats/norm/mean": (HIDDEN,), "batch_stats/norm/var": (HIDDEN,)}
    for name in ("adamw", "masked", "multi_transform", "multi_steps"):
        tx = OPTIMIZERS[name]()
        small = shrink(tx.init(variables["params"]), variables, kept)
        expected = tx.init(shrink(variables["params"], variables, kept))
        assert_same(small, expected)
    np.testing.assert_array_equal(
        shrink(variables["batch_stats"], variables, kept)["norm"]["mean"], HIDDEN
    )
    np.testing.assert_array_equal(
        shrink(variables, variables, kept)["batch_stats"]["norm"]["mean"], HIDDEN
    )


class StateWithStatistics(TrainState):
    batch_stats: Any = None
    average: Any = None


class Network(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(self.width)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(3)(x)


def test_a_train_state_of_linen():
    variables = Network(8).init(jax.random.key(0), jnp.ones((2, 6)))
    kept = {
        "params/Dense_0/kernel": (None, HIDDEN),
        "params/Dense_1/kernel": (HIDDEN, None),
        **{f"params/{path}": (HIDDEN,) for path in ("Dense_0/bias", "BatchNorm_0/scale")},
        "params/BatchNorm_0/bias": (HIDDEN,),
        "batch_stats/BatchNorm_0/mean": (HIDDEN,),
        "batch_stats/BatchNorm_0/var": (HIDDEN,),
    }
    create = lambda variables: StateWithStatistics.create(
        apply_fn=None,
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        average=variables["params"],
        tx=tx,
    )
    tx = optax.adamw(1e-3)
    small = shrink(create(variables), variables, kept)
    expected = create(Network(6).init(jax.random.key(0), jnp.ones((2, 6))))
    assert jax.tree.map(jnp.shape, small) == jax.tree.map(jnp.shape, expected)
    bias = variables["params"]["Dense_0"]["bias"]
    np.testing.assert_array_equal(small.params["Dense_0"]["bias"], bias[HIDDEN])
    only = {path: axes for path, axes in kept.items() if path.startswith("params")}
    with pytest.raises(ValueError, match=r"BatchNorm_0/mean: shape \(8,\) belongs to no"):
        shrink(create(variables), {"params": variables["params"]}, only)


# Masks; shapes that are static; a partition of a chain of masks and codebooks.
HARD = {"prune-layer", "quantize-groups", "partition"}


@pytest.mark.parametrize("case", [case for case in methods.CASES if case.name in HARD], ids=str)
def test_states_of_every_method(case):
    params = methods.params()
    x, y = methods.batch()
    tx = jaxcomp.wrap_optimizer(optax.adamw(1e-2), case.make())

    @jax.jit
    def step(params, state):
        seen = lambda p: loss(jaxcomp.compressed(p, state), x, y)
        updates, state = tx.update(jax.grad(seen)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(3):
        params, state = step(params, state)
    small, small_state = shrink(params, params, KEPT), shrink(state, params, KEPT)
    of_collection = shrink(state, {"params": params}, PREFIXED)
    jax.tree.map(np.testing.assert_array_equal, small_state, of_collection)
    fresh = jax.eval_shape(tx.init, small)
    assert jax.tree.structure(small_state) == jax.tree.structure(fresh)
    expected = tree_lib.flatten(fresh)
    for path, leaf in tree_lib.flatten(small_state).items():
        assert (leaf.shape, leaf.dtype) == (expected[path].shape, expected[path].dtype), path
    assert_same(small_state.compression.learned, state.compression.learned)
    if "quantize" not in case.name and "partition" not in case.name:
        # A quantizer's scale looks at all weights, cut ones too; all else is element by element.
        effective = shrink(jaxcomp.compressed(params, state), params, KEPT)
        assert_same(effective, jaxcomp.compressed(small, small_state))
    jax.eval_shape(step, small, small_state)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_removed_weights_are_counted_anew(scope):
    """After the cut the masks reach the schedule's sparsity of what is left, exactly."""
    params = methods.params()
    method = methods.pruner(scope)
    state = jaxcomp.wrap_optimizer(optax.sgd(0.1), method).init(params)
    generator = np.random.default_rng(0)
    masks = {
        p: generator.uniform(size=m.shape) < 0.5 for p, m in state.compression.buffers.masks.items()
    }
    buffers = state.compression.buffers._replace(
        masks=masks, sparsity=jnp.float32(0.6), step=jnp.int32(9)
    )
    state = state.replace(compression=jaxcomp.State({}, buffers))
    small_params, small = shrink(params, params, KEPT), shrink(state, params, KEPT).compression
    cut_masks = {path: cut(mask, KEPT[path]) for path, mask in masks.items()}
    assert_same(small.buffers.masks, cut_masks)
    after = method.update(small_params, small, None).buffers
    sizes = [mask.size for mask in cut_masks.values()]
    gone = [int(np.sum(~np.asarray(mask))) for mask in after.masks.values()]
    were = [int(np.sum(~mask)) for mask in cut_masks.values()]
    if scope == "layer":
        assert gone == [max(was, round(0.6 * size)) for was, size in zip(were, sizes, strict=True)]
    else:
        assert sum(gone) == round(0.6 * sum(sizes))
    for path, mask in cut_masks.items():
        assert not np.any(np.asarray(after.masks[path]) & ~mask)


def test_a_codebook_as_long_as_a_cut_axis_stays():
    params = methods.params()
    state = jaxcomp.wrap_optimizer(optax.adam(1e-2), share.train(8, begin=9)).init(params)
    small = shrink(state, params, KEPT)
    assert small.compression.learned["second/kernel"].shape == (8,)
    assert small.inner[0].mu["second"]["kernel"].learned.shape == (8,)
    assert small.inner[0].mu["second"]["kernel"].weight.shape == (6, 4)
    tight = jaxcomp.wrap_optimizer(optax.adam(1e-2), share.train(30, begin=9)).init(params)
    with pytest.raises(ValueError, match=r"refuses the smaller .*: second/kernel: 30 clus"):
        shrink(tight, params, KEPT)
    with pytest.raises(ValueError, match="pass the whole state of wrap_optimizer"):
        shrink(state.inner, params, KEPT)
    with pytest.raises(ValueError, match="no part of the parameters given"):
        shrink(state, {"first": params["first"]}, {"first/bias": (HIDDEN,)})


def test_scales_that_are_learned_along_the_channels_are_cut():
    def init(params):
        leaves = tree_lib.select(params)
        scales = {p: {"scale": jnp.ones((1, w.shape[1]))} for p, w in leaves.items()}
        return jaxcomp.State(scales, ())

    method = jaxcomp.identity()._replace(
        init=init, update=lambda params, state, grads: state, project=None, apply_projected=None
    )
    params = methods.params()
    small = shrink(jaxcomp.wrap_optimizer(optax.adam(1e-2), method).init(params), params, KEPT)
    assert jax.tree.map(jnp.shape, small.compression.learned) == {
        "first/kernel": {"scale": (1, 6)},
        "second/kernel": {"scale": (1, 4)},
    }
    assert small.inner[0].nu["first"]["kernel"].learned["scale"].shape == (1, 6)


def test_factored_statistics_are_refused_by_path():
    params = methods.params()
    factored = optax.adafactor(1e-2, min_dim_size_to_factor=2).init(params)
    with pytest.raises(ValueError, match=r"v_row/first/kernel: shape \(\d,\) seems .*tx.init"):
        shrink(factored, params, KEPT)
    with pytest.raises(ValueError, match=r"mu/first/bias/0: shape \(8,\) belongs to no .*tx.init"):
        shrink(optax.sm3(0.1).init(params), params, KEPT)
    # Nothing is cut of what it belongs to.
    assert_same(shrink(factored, params, {"first/bias": (None,)}), factored)
    whole = {"other": params["second"], **params}
    untouched = optax.adafactor(1e-2, min_dim_size_to_factor=2).init({"other": params["second"]})
    assert_same(shrink(untouched, whole, KEPT), untouched)


def test_what_belongs_to_nothing():
    params = methods.params()
    tree = {"step": jnp.int32(3), "key": jax.random.PRNGKey(0), "typed": jax.random.key(1), "n": 8}
    assert shrink(tree, params, KEPT) is not None
    for name, leaf in shrink(tree, params, KEPT).items():
        assert leaf is tree[name]
    with pytest.raises(ValueError, match=r"rates: shape \(8,\) belongs to no parameter"):
        shrink({"rates": jnp.ones(8)}, params, KEPT)
    assert shrink({"rates": jnp.ones(7)}, params, KEPT)["rates"].shape == (7,)
    packed = quantize.encode(params["first"]["kernel"], quantize.Format(4))
    with pytest.raises(TypeError, match=r"first/kernel: compressed .* decode it"):
        shrink({"first": {"kernel": packed}}, params, KEPT)


def twins():
    """Two layers that only their paths tell apart, and a third of the same name further down."""
    square = jnp.arange(16.0).reshape(4, 4)
    params = {"a": {"w": square}, "b": {"w": square}, "block": {"a": {"w": square}}}
    kept = {
        "a/w": (np.array([0]), None),
        "b/w": (np.array([0, 1]), None),
        "block/a/w": (np.array([0, 1, 2]), None),
    }
    return params, kept


def test_twins_are_told_apart_by_structure_and_path():
    params, kept = twins()
    assert jax.tree.map(len, shrink(optax.ema(0.9).init(params).ema, params, kept)) == {
        "a": {"w": 1},
        "b": {"w": 2},
        "block": {"a": {"w": 3}},
    }
    part = lambda tree: jax.tree.map(len, shrink(tree, params, kept))
    assert part({"mu": {"b": {"w": params["b"]["w"]}}}) == {"mu": {"b": {"w": 2}}}
    assert part({"mu": {"block/a/w": params["b"]["w"]}}) == {"mu": {"block/a/w": 3}}
    # Its neighbour is of the root alone.
    near = {"masks": {"a/w": params["a"]["w"], "b/w": params["b"]["w"]}}
    assert part(near) == {"masks": {"a/w": 1, "b/w": 2}}
    for bare in ({"mu": {"w": params["a"]["w"]}}, {"mu": {"a": {"w": params["a"]["w"]}}}):
        with pytest.raises(ValueError, match=r"mu/.*w: .*a/w.* fit alike and are cut differently"):
            shrink(bare, params, kept)
    same = dict.fromkeys(kept, kept["a/w"])
    assert shrink({"mu": {"w": params["a"]["w"]}}, params, same)["mu"]["w"].shape == (1, 4)


@st.composite
def crowded(draw):
    """Trees of few names and few shapes, full of look-alikes, each leaf cut at random."""
    names = st.sampled_from(["a", "b", "w"])
    leaf = st.sampled_from([(2,), (3,), (2, 2)])
    inner = st.recursive(leaf, lambda x: st.dictionaries(names, x, min_size=1), max_leaves=6)
    tree = draw(st.dictionaries(names, inner, min_size=1))
    tree = {"params": tree} if draw(st.booleans()) else {"w": tree, "c": (3,)}
    is_shape = lambda node: isinstance(node, tuple)
    params = jax.tree.map(lambda s: np.arange(np.prod(s) * 1.0).reshape(s), tree, is_leaf=is_shape)
    kept = {}
    for path, array in tree_lib.flatten(params).items():
        options = st.sampled_from([None, np.array([0]), np.array([1])])
        kept[path] = tuple(draw(options) for _ in array.shape)
    return params, kept


def cut(array, axes):
    for axis, positions in enumerate(axes):
        array = array if positions is None else np.take(array, positions, axis)
    return array


@settings(max_examples=50)
@given(st.data(), crowded())
def test_among_look_alikes_it_is_right_or_refuses(data, case):
    params, kept = case
    oracle = tree_lib.replace(
        params, {p: cut(a, kept[p]) for p, a in tree_lib.flatten(params).items()}
    )
    assert_same(shrink(params, params, kept), oracle)
    momenta = lambda tree: (np.int32(1), {"mu": tree, "nu": {"w": tree}}, ())
    assert_same(shrink(momenta(params), params, kept), momenta(oracle))
    chosen = data.draw(st.sets(st.sampled_from(sorted(kept)), min_size=1))
    gaps = {path: optax.MaskedNode() for path in kept if path not in chosen}
    branch = data.draw(st.sampled_from(sorted(k for k in params if isinstance(params[k], dict))))
    for some in (
        lambda tree: momenta(tree_lib.replace(tree, gaps)),
        lambda tree: {"masks": {path: tree_lib.flatten(tree)[path] for path in chosen}},
        lambda tree: momenta(tree[branch]),
        lambda tree: {"average": {branch: tree[branch]}},
    ):
        try:
            found = shrink(some(params), params, kept)
        except ValueError as error:
            if "cut differently" not in str(error) and "make a new state" not in str(error):
                raise
        else:
            assert_same(found, some(oracle))


def test_nnx():
    class Perceptron(nnx.Module):
        def __init__(self, width, rngs):
            self.first = nnx.Linear(6, width, rngs=rngs)
            self.second = nnx.Linear(width, 4, rngs=rngs)

    make = lambda width: nnx.Optimizer(
        Perceptron(width, nnx.Rngs(0)), optax.adam(1e-3), wrt=nnx.Param
    )
    shapes = lambda tree: [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]
    params = nnx.state(Perceptron(8, nnx.Rngs(0)), nnx.Param)
    assert shapes(shrink(params, params, KEPT)) == shapes(
        nnx.state(Perceptron(6, nnx.Rngs(0)), nnx.Param)
    )
    assert shapes(shrink(nnx.state(make(8)), params, KEPT)) == shapes(nnx.state(make(6)))


def test_equinox_leaves_gaps_where_there_is_nothing_to_train():
    eqx = pytest.importorskip("equinox")
    shapes = lambda tree: [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]
    mlp = lambda width: eqx.nn.MLP(6, 4, width, 1, key=jax.random.key(0))
    kept = {
        "layers/0/weight": (HIDDEN, None),
        "layers/0/bias": (HIDDEN,),
        "layers/1/weight": (None, HIDDEN),
    }
    start = lambda net: optax.adam(1e-3).init(eqx.filter(net, eqx.is_inexact_array))
    big = mlp(8)
    assert shapes(shrink(start(big), big, kept)) == shapes(start(mlp(6)))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_arrays_keep_what_divides(kind):
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(kind, kind))
    params = {"kernel": jnp.arange(64.0).reshape(8, 8), "bias": jnp.arange(8.0)}
    placed = {
        "kernel": jax.device_put(params["kernel"], NamedSharding(mesh, P("x", "y"))),
        "bias": jax.device_put(params["bias"], NamedSharding(mesh, P(("x", "y")))),
    }
    four, six = np.array([1, 3, 5, 7]), np.array([0, 1, 2, 3, 4, 6])
    for kept, kernel, bias in (
        ({"kernel": (six, four), "bias": (four,)}, P("x", "y"), P(None)),
        ({"kernel": (four, six), "bias": (six,)}, P("x", None), P(None)),
    ):
        small = shrink(placed, params, kept)
        assert_same(small, shrink(params, params, kept))
        assert small["kernel"].sharding == NamedSharding(mesh, kernel)
        assert small["bias"].sharding.is_equivalent_to(NamedSharding(mesh, bias), 1)
        jitted = jax.jit(functools.partial(shrink, like_params=params, kept=kept))
        assert_same(jitted(placed), small)
        struct = shrink(jax.eval_shape(lambda: placed), params, kept)
        assert jax.tree.map(jnp.shape, struct) == jax.tree.map(jnp.shape, small)


def test_arrays_keep_their_kind():
    params = {"kernel": np.ones((2, 3), np.float16), "bias": np.zeros(3, bool)}
    kept = {"kernel": (None, HIDDEN[:2]), "bias": (HIDDEN[:2],)}
    small = shrink(params, params, kept)
    assert all(isinstance(leaf, np.ndarray) for leaf in small.values())
    assert (small["kernel"].dtype, small["bias"].dtype) == (np.float16, bool)
    assert small["kernel"].shape == (2, 2)
    untouched = {"kernel": params["kernel"]}
    assert shrink(untouched, params, {})["kernel"] is params["kernel"]


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        ({"first/kernle": (None, HIDDEN)}, "'first/kernle' is not a parameter; nearest: first/ker"),
        ({"first/kernel": (HIDDEN,)}, r"first/kernel: 1 axes in `kept`, but the shape is \(6, 8\)"),
        ({"first/bias": (np.array([0, 8]),)}, "first/bias: axis 0 of size 8 cannot keep"),
        ({"first/bias": (np.array([-1]),)}, "cannot keep"),
        ({"first/bias": (np.array([1, 1]),)}, "each once"),
        ({"first/bias": (np.array([], int),)}, "at least one"),
        ({"first/bias": (np.ones(8, bool),)}, "as integers"),
    ],
)
def test_bad_cuts(kept, words):
    params = methods.params()
    with pytest.raises(ValueError, match=words):
        shrink(params, params, kept)


def test_pruning_goes_on_after_the_cut():
    method = prune.gradual(prune.scores.magnitude, prune.cubic(0.5, begin=0, end=6), every=1)
    tx = jaxcomp.wrap_optimizer(optax.sgd(0.0), method)
    params = methods.params()
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(3):
        params, state = step(params, state)
    small, state = shrink(params, params, KEPT), shrink(state, params, KEPT)
    for _ in range(6):
        small, state = step(small, state)
    for name in ("first", "second"):
        size = small[name]["kernel"].size
        assert int(jnp.sum(small[name]["kernel"] == 0)) == size // 2
