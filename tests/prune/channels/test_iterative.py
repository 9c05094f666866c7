"""Removal in steps: the counts of one shot, the choice of a plain loop, and resuming to the bit."""

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcomp import CheckpointError, load, prune, save
from jaxcomp.prune.channels import scores as channel_scores
from jaxcomp.prune.channels.iterative import channels_iteratively, expand
from jaxcomp.prune.channels.removal import channels
from jaxcomp.prune.channels.resume import FILE
from jaxcomp.prune.channels.selection import at_level, level_of, removal_order

X = np.random.default_rng(0).normal(size=(16, 5)).astype(np.float32)
Y = np.random.default_rng(1).normal(size=(16, 3)).astype(np.float32)


def mlp(params, x):
    hidden = jax.nn.relu(x @ params["w0"] + params["b0"])
    hidden = jax.nn.relu(hidden @ params["w1"] + params["b1"])
    return hidden @ params["w2"]


def mlp_params(seed=0, widths=(8, 12)):
    rng = np.random.default_rng(seed)
    first, second = widths
    shapes = {"w0": (5, first), "b0": (first,), "w1": (first, second), "b1": (second,)}
    shapes["w2"] = (second, 3)
    return {k: jax.device_put(rng.normal(size=n).astype(np.float32)) for k, n in shapes.items()}


def loss(params, x, y):
    return jnp.mean((mlp(params, x) - y) ** 2)


def magnitude(group):
    """L1 in NumPy, so that nothing is compiled."""
    return sum(np.abs(np.asarray(weight)).sum(1) for weight in group.weights.values())


def iterate(params=None, finetune=None, **how):
    params = mlp_params() if params is None else params
    how = {"score": magnitude, **how}
    return channels_iteratively(mlp, params, X, finetune=finetune or untouched, **how)


class Net(nn.Module):
    """Two convolutions with batch normalization, and a dense layer behind a mean."""

    @nn.compact
    def __call__(self, x, train=False):
        for width in (6, 8):
            x = nn.Conv(width, (3, 3))(x)
            x = jax.nn.softplus(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(3)(jnp.mean(x, (1, 2)))


IMAGES = np.random.default_rng(2).normal(size=(4, 6, 6, 2)).astype(np.float32)


def net(variables, x):
    return Net().apply(variables, x)


def net_variables():
    """Nothing is zero or one, statistics neither."""
    rng = np.random.default_rng(3)
    shapes = jax.eval_shape(Net().init, jax.random.key(3), IMAGES)
    return jax.tree.map(
        lambda leaf: jax.device_put(rng.uniform(0.2, 1.0, leaf.shape).astype(np.float32)), shapes
    )


def shaken(smaller, state, step):
    """A fine-tuning that moves every weight, by other amounts in every step."""
    rng = np.random.default_rng(step)
    factors = lambda leaf: rng.uniform(0.7, 1.4, leaf.shape).astype(np.float32)
    news = jax.tree.map(
        lambda leaf: jax.device_put(np.asarray(leaf) * factors(leaf)), smaller.params
    )
    return news, state


def untouched(smaller, state, step):
    return smaller.params, state


def shapes(tree):
    return jax.tree.map(jnp.shape, tree)


def assert_bits(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert type(a) is type(b)
        if isinstance(a, jax.Array):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
                assert jax.random.key_impl(a) == jax.random.key_impl(b)
                a, b = jax.random.key_data(a), jax.random.key_data(b)
            assert a.weak_type == b.weak_type
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


# An order that starts from channels that are gone.

scores_of = st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=12)
constraints = st.fixed_dictionaries(
    {"round_to": st.sampled_from([1, 2, 4]), "limits": st.sampled_from([None, {"*": 0.7}])}
)


@given(st.lists(scores_of, min_size=1, max_size=3), constraints, st.data())
def test_what_is_gone_stays_gone_and_counts_do_not_change(lists, how, data):
    scope = data.draw(st.sampled_from(["layer", "global"]))
    first = {f"group {i}": np.array(scores) for i, scores in enumerate(lists)}
    order = removal_order(first, scope, **how)
    begin = data.draw(st.integers(0, order.levels))
    kept = at_level(order, begin)
    other = {
        name: np.array(data.draw(st.lists(st.floats(-5, 5), min_size=n, max_size=n)))
        for name, n in ((name, len(scores)) for name, scores in first.items())
    }
    # Whatever a score makes of zeros is no matter.
    spoilt = {name: np.where(kept[name], other[name], np.nan) for name in other}
    on = removal_order(spoilt, scope, **how, gone={name: ~mask for name, mask in kept.items()})
    assert all((at_level(on, 0)[name] == kept[name]).all() for name in kept)
    for level in range(on.levels + 1):
        assert all((at_level(on, level)[name] <= kept[name]).all() for name in kept)
    sparsity = data.draw(st.floats(0, 0.99))
    at_once, later = (at_level(o, level_of(o, sparsity)) for o in (order, on))
    if scope == "layer":
        for name, mask in kept.items():
            assert later[name].sum() == min(mask.sum(), at_once[name].sum())
    elif how["round_to"] == 1:
        total = lambda masks: sum(int(mask.sum()) for mask in masks.values())
        assert total(later) == min(total(kept), total(at_once))


@given(st.lists(scores_of, min_size=1, max_size=3), st.data())
def test_global_order_against_a_plain_loop(lists, data):
    """The lowest score over the mean magnitude of what is left, one unit after the other."""
    scores = {f"group {i}": np.array(each) for i, each in enumerate(lists)}
    gone = {name: np.zeros(len(array), bool) for name, array in scores.items()}
    for mask in gone.values():
        mask[: data.draw(st.integers(0, len(mask) - 1))] = True
    order = removal_order(scores, "global", gone=gone)
    means = {n: np.mean(np.abs(a[~gone[n]])) or 1.0 for n, a in scores.items()}
    left = {name: ~mask for name, mask in gone.items()}
    for level in range(1, order.levels + 1):
        _, name, unit = min(
            (scores[name][unit] / means[name], name, unit)
            for name, mask in left.items()
            if mask.sum() > 1
            for unit in np.flatnonzero(mask)
        )
        found = at_level(order, level)
        differing = [n for n in left if (found[n] != left[n]).any()]
        assert len(differing) == 1
        assert left[differing[0]].sum() - found[differing[0]].sum() == 1
        (lost,) = np.flatnonzero(found[differing[0]] != left[differing[0]])
        taken = scores[differing[0]][lost] / means[differing[0]]
        np.testing.assert_allclose(taken, scores[name][unit] / means[name], rtol=1e-9, atol=1e-300)
        left = found


def test_what_is_gone_counts_in_no_mean():
    """Of a, 4 and 6 are left: 0.8 and 1.2 of their mean; b has 0.9 and 1.1."""
    scores = {"a": np.array([1e9, 4.0, 0.0, 6.0]), "b": np.array([0.9, 1.1])}
    order = removal_order(scores, "global", gone={"a": np.array([True, False, True, False])})
    assert at_level(order, 1)["a"].tolist() == [False, False, False, True]
    assert at_level(order, 1)["b"].all()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"gone": {"b": np.zeros(3, bool)}}, "gone names 'b'"),
        ({"gone": {"a": np.ones(3, bool)}}, "a: gone must be"),
        ({"gone": {"a": np.zeros(4, bool)}}, "a: gone must be"),
        ({"gone": {"a": np.array([1, 0, 0])}}, "a: gone must be"),
        ({"gone": {"a": np.arange(3) < 1}, "keep": ["a"]}, "1 of 3 units are gone already"),
        ({"gone": {"a": np.arange(3) < 2}, "limits": {"a": 0.4}}, "allow 1"),
    ],
)
def test_what_cannot_be_gone_is_refused(how, message):
    with pytest.raises(ValueError, match=message):
        removal_order({"a": np.arange(3.0)}, **how)


# The removal in steps.


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize(
    "goal",
    [
        {"sparsity": 0.5},
        {"sparsity": 0.7, "round_to": 2},
        {"sparsity": 0.6, "limits": {"w1*": 0.25}},
        {"budget": prune.Budget(flops=0.4)},
        {"budget": prune.Budget(parameters=60)},
    ],
)
def test_counts_are_those_of_one_shot(goal, scope):
    params = mlp_params()
    at_once = channels(mlp, params, X, score=magnitude, scope=scope, **goal)
    model, _ = iterate(params, finetune=shaken, steps=3, scope=scope, **goal)
    if scope == "layer":
        assert shapes(model.params) == shapes(at_once.params)
        assert model.after == at_once.after
    elif "budget" in goal:
        (kind,) = (k for k in ("flops", "parameters") if getattr(goal["budget"], k))
        limit = goal["budget"].limit(getattr(at_once.before, kind))
        assert getattr(model.after, kind) <= limit
    else:
        widths = [sum(m.params[b].size for b in ("b0", "b1")) for m in (model, at_once)]
        assert widths[0] == widths[1]


def test_one_step_that_trains_nothing_is_one_shot():
    params = mlp_params()
    at_once = channels(mlp, params, X, score=magnitude, sparsity=0.5, scope="global")
    model, state = iterate(params, finetune=untouched, steps=1, sparsity=0.5, scope="global")
    assert state is None
    assert model.notes == at_once.notes
    assert_bits(model.params, at_once.params)
    assert_bits(model.masked, at_once.masked)


@pytest.mark.parametrize(
    ("sparsity", "widths"),
    [
        (0.75, [6, 4, 2]),
        ((0.5, 0.5, 0.75), [4, 4, 2]),
        (prune.cubic(0.75, begin=0, end=3), [4, 2, 2]),
    ],
)
def test_schedules(sparsity, widths):
    seen = []

    def finetune(smaller, state, step):
        seen.append((step, smaller.params["b0"].size))
        return smaller.params, state

    iterate(finetune=finetune, steps=3, sparsity=sparsity)
    assert seen == list(enumerate(widths))


@pytest.mark.parametrize("final", [prune.Budget(macs=0.25), prune.Budget(macs=35)])
def test_budgets_between_fall_evenly(final):
    params = mlp_params()
    dense = channels(mlp, params, X[:1], score=magnitude, sparsity=0.0).before.macs
    seen = []

    def finetune(smaller, state, step):
        seen.append(smaller.after.macs)
        return smaller.params, state

    how = {"score": magnitude, "scope": "global", "finetune": finetune, "steps": 4}
    channels_iteratively(mlp, params, X[:1], budget=final, **how)
    last = final.limit(dense)
    for cuts, macs in enumerate(seen, 1):
        between = dense - (dense - last) * cuts / 4
        # One more unit of the widest group than the budget needs, at most.
        assert between - 20 <= macs <= between
    seen.clear()
    given = [prune.Budget(macs=0.8), prune.Budget(parameters=0.5)]
    how["steps"] = 2
    model, _ = channels_iteratively(mlp, params, X[:1], budget=given, **how)
    assert seen[0] <= 0.8 * dense
    assert model.after.parameters <= 0.5 * model.before.parameters


def test_a_measured_budget_may_end_the_steps():
    given = [prune.Budget(macs=0.8), prune.Budget(milliseconds=10_000.0)]
    model, _ = iterate(finetune=untouched, steps=2, budget=given)
    assert model.after.macs <= 0.8 * model.before.macs
    assert "ms of 1e+04 ms" in model.notes[0]


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_masked_is_removed_after_several_steps(scope):
    seen = []

    def finetune(smaller, state, step):
        params, state = shaken(smaller, state, step)
        seen.append(dataclasses.replace(smaller, params=params))
        return params, state

    variables = net_variables()
    model, _ = channels_iteratively(
        net, variables, IMAGES, finetune=finetune, steps=2, sparsity=0.6, scope=scope
    )
    assert_bits(model.params, seen[-1].params)
    assert shapes(model.masked) == shapes(variables)
    full = net(model.masked, IMAGES)
    assert float(jnp.max(jnp.abs(full - net(variables, IMAGES)))) > 0.01
    found = jax.jit(model.apply)(model.params, IMAGES)
    np.testing.assert_allclose(found, full, rtol=1e-5, atol=1e-5)
    for earlier in seen[:-1]:
        whole = net(expand(earlier.params, variables, earlier.kept), IMAGES)
        found = jax.jit(earlier.apply)(earlier.params, IMAGES)
        np.testing.assert_allclose(found, whole, rtol=1e-5, atol=1e-5)


def grow(params, names):
    """What the fine-tuning of the next test does, to units by their first bias."""
    factor = jnp.where(jnp.isin(jnp.round(params["b0"]), jnp.array(names)), 10.0, 1.0)
    return {**params, "w0": params["w0"] * factor}


def test_later_steps_see_the_weights_that_were_fine_tuned():
    """By hand: of the units 1 to 8, one by one, the lowest goes; step 0 makes 2 and 3 large."""

    def model(p, x):
        return jax.nn.relu(x @ p["w0"] + p["b0"]) @ p["w1"]

    names = jnp.arange(1.0, 9.0)
    params = {"w0": jnp.tile(names, (3, 1)), "b0": names, "w1": jnp.ones((8, 2))}

    def finetune(smaller, state, step):
        return (grow(smaller.params, [2, 3]) if step == 0 else smaller.params), state

    x = jnp.ones((1, 3))
    found, _ = channels_iteratively(model, params, x, finetune=finetune, steps=4, sparsity=0.5)
    np.testing.assert_array_equal(found.kept["b0"][0], [1, 2, 6, 7])
    at_once = channels(model, params, x, sparsity=0.5)
    np.testing.assert_array_equal(at_once.kept["b0"][0], [4, 5, 6, 7])


@pytest.mark.parametrize("name", ["l1", "taylor", "fisher"])
def test_the_choice_against_a_plain_loop(name):
    """Scores of the small network by itself, in float64, by a loop that never pads or masks."""
    params = mlp_params(7)
    rng = np.random.default_rng(8)
    factors = [rng.uniform(0.2, 3.0, 12) for _ in range(2)]
    batches = [(X[:8], Y[:8]), (X[8:], Y[8:])]

    def finetune(smaller, state, step):
        tuned = dict(smaller.params)
        for bias in ("b0", "b1"):
            kept = smaller.kept[bias][0]
            tuned[bias] = tuned[bias] * factors[step][kept].astype(np.float32)
        return tuned, state

    how = {} if name == "l1" else {"loss": loss, "batches": lambda: iter(batches)}
    model, _ = iterate(params, finetune=finetune, steps=2, sparsity=0.6,
        score=getattr(channel_scores, name), **how,
    )  # fmt: skip

    small = {path: np.asarray(leaf, np.float64) for path, leaf in params.items()}
    names = {"b0": np.arange(8), "b1": np.arange(12)}
    slices = {"b0": [("w0", 1), ("b0", 0), ("w1", 0)], "b1": [("w1", 1), ("b1", 0), ("w2", 0)]}
    for step in range(2):
        gradients = [plain_gradient(small, *batch) for batch in batches]
        scores = {}
        for group, parts in slices.items():
            scores[group] = np.zeros(len(names[group]))
            for path, axis in parts:
                others = tuple(i for i in range(small[path].ndim) if i != axis)
                g, w = [gradient[path] for gradient in gradients], small[path]
                terms = {"l1": abs(w), "taylor": sum(g) * w, "fisher": sum(x**2 for x in g) * w**2}
                scores[group] += terms[name].sum(others)
        for group, parts in slices.items():
            size = {"b0": 8, "b1": 12}[group]
            stays = size - int(np.floor(0.6 * (step + 1) / 2 * size + 0.5))
            best = np.sort(np.argsort(abs(scores[group]))[-stays:])
            names[group] = names[group][best]
            for path, axis in parts:
                small[path] = np.take(small[path], best, axis)
        for group in slices:
            small[group] = small[group] * factors[step][names[group]]
    for group, kept in names.items():
        np.testing.assert_array_equal(model.kept[group][0], kept)
    for path, leaf in small.items():
        np.testing.assert_allclose(model.params[path], leaf, rtol=1e-5)


def plain_gradient(p, x, y):
    """Of the mean square, in NumPy."""
    a = x @ p["w0"] + p["b0"]
    b = np.maximum(a, 0) @ p["w1"] + p["b1"]
    out = np.maximum(b, 0) @ p["w2"]
    d = 2 * (out - y) / out.size
    db = (d @ p["w2"].T) * (b > 0)
    da = (db @ p["w1"].T) * (a > 0)
    return {
        "w2": np.maximum(b, 0).T @ d, "b1": db.sum(0), "w1": np.maximum(a, 0).T @ db,
        "b0": da.sum(0), "w0": x.T @ da,
    }  # fmt: skip


def test_a_score_of_gradients_alone_sees_none_of_what_is_gone():
    """Softplus of zero is not zero: the masked model has gradients where the smaller has none."""

    def model(p, x):
        return jax.nn.softplus(jax.nn.softplus(x @ p["w0"]) @ p["w1"]) @ p["w2"]

    def own_loss(p, x, y):
        return jnp.mean((model(p, x) - y) ** 2)

    seen = []

    @prune.needs("gradients")
    def score(group):
        if group.name == "w1[1]":
            jax.debug.callback(lambda g: seen.append(np.asarray(g)), group.gradients["w1", 1])
        return sum(jnp.sum(jnp.abs(w), axis=1) for w in group.weights.values())

    params = {k: v for k, v in mlp_params().items() if k[0] == "w"}
    cuts = []

    def finetune(smaller, state, step):
        cuts.append(smaller)
        return smaller.params, state

    channels_iteratively(
        model, params, X, finetune=finetune, steps=2, sparsity=0.5,
        score=score, loss=own_loss, batches=[(X, Y)],
    )  # fmt: skip
    jax.effects_barrier()
    smaller = cuts[0]
    gradient = jax.jit(jax.grad(smaller.rewrite(own_loss)))(smaller.params, X, Y)
    expected = expand(gradient, params, smaller.kept)["w1"].T
    np.testing.assert_allclose(seen[1], expected, rtol=1e-4, atol=1e-6)
    assert np.any(expected == 0)
    assert np.all(seen[0] != 0)


TX = optax.chain(
    optax.clip(1.0),
    optax.adamw(1e-2, weight_decay=0.1),
    optax.masked(optax.ema(0.9), {"w0": True, "b0": False, "w1": True, "b1": True, "w2": True}),
)


@jax.jit
def train_step(params, state, mask):
    """The function is that of any widths."""
    updates, state = TX.update(jax.grad(loss)(params, X, Y), state, params)
    return jax.tree.map(lambda p, u, m: (p + u) * m, params, updates, mask), state


def train(params, state, mask=None):
    mask = mask or jax.tree.map(np.ones_like, params)
    for _ in range(3):
        params, state = train_step(params, state, mask)
    return params, state


def test_optimizer_goes_on_as_that_of_the_masked_model():
    params = mlp_params()
    cuts = []

    def finetune(smaller, state, step):
        cuts.append(smaller)
        return train(smaller.params, state)

    model, state = iterate(params, finetune=finetune, steps=3, sparsity=0.6, state=TX.init(params))
    full_state = TX.init(params)
    for smaller in cuts:
        mask = expand(jax.tree.map(np.ones_like, smaller.params), params, smaller.kept)
        params = jax.tree.map(jnp.multiply, params, mask)
        params, full_state = train(params, full_state, mask)
    adam, reference = state[1][0], cuts[-1].shrink(full_state)[1][0]
    assert int(adam.count) == 9
    for found, wanted in (
        (model.masked, params),
        (adam.mu, reference.mu),
        (adam.nu, reference.nu),
        (state[2], cuts[-1].shrink(full_state)[2]),
    ):
        assert shapes(found) == shapes(wanted)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_statistics_of_a_training_step_go_on():
    """Batch statistics come from the cut training step, and the last cut scores see them."""

    def train_step(variables, x):
        out, updated = Net().apply(variables, x, train=True, mutable=["batch_stats"])
        return jnp.mean(out**2), {**variables, **updated}

    def finetune(smaller, state, step):
        value, variables = jax.jit(smaller.rewrite(train_step))(smaller.params, IMAGES)
        return variables, [*state, float(value)]

    model, values = channels_iteratively(
        net, net_variables(), IMAGES, finetune=finetune, steps=2, sparsity=0.5, state=[]
    )
    assert len(set(values)) == 2
    assert model.params["batch_stats"]["BatchNorm_1"]["mean"].shape == (4,)
    np.testing.assert_allclose(
        model.apply(model.params, IMAGES), net(model.masked, IMAGES), rtol=1e-5, atol=1e-5
    )


# Resuming.


class Killed(Exception):
    """Stands for whatever ends a process."""


def varied_state(params):
    return {
        "optimizer": TX.init(params),
        "average": jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params),
        "key": jax.random.key(5, impl="rbg"),
        "keys": jax.random.split(jax.random.key(6), 3),
        "raw key": jax.random.PRNGKey(7),
        "epoch": 0,
        "rate": 0.1,
        "name": "run",
        "done": False,
        "nothing": (None, {}, ()),
        "weak": jnp.asarray(0.5),
        "weak row": jnp.full((3,), 2.0),
        "host": np.array([1.5, -0.0]),
        "scalar": np.float64(1 / 3),
        "count": jnp.int32(3),
    }


def mixed(old, new):
    numbers = 0.9 * np.asarray(old, np.float32) + 0.1 * np.asarray(new, np.float32)
    return jnp.asarray(numbers.astype(old.dtype))


def varied_finetune(log=None, end=None):
    def finetune(smaller, state, step):
        if step == end:
            raise Killed
        if log is not None:
            log.append(step)
        key, own = jax.random.split(state["key"])
        params, optimizer = train(smaller.params, state["optimizer"])
        noise = jax.random.normal(own, params["b0"].shape, jnp.float32)
        params = {**params, "b0": params["b0"] + 0.1 * noise * state["weak"]}
        return params, {
            **state,
            "optimizer": optimizer,
            "average": jax.tree.map(mixed, state["average"], params),
            "key": key,
            "epoch": state["epoch"] + 1,
            "rate": state["rate"] * 0.7,
            "weak": state["weak"] * 0.9,
            "weak row": state["weak row"] * 0.9,
            "scalar": state["scalar"] * 3,
        }

    return finetune


def varied_call():
    params = mlp_params()
    how = {"sparsity": 0.75, "scope": "global", "limits": {"w0*": 0.6, "w1*": 0.65}}
    return params, {"steps": 3, "state": varied_state(params), **how}


@pytest.fixture(scope="module")
def whole():
    """The call without an interruption and without a file."""
    params, how = varied_call()
    return iterate(params, finetune=varied_finetune(), **how)


@pytest.mark.parametrize("end", [0, 1, 2])
def test_resumed_to_the_bit(tmp_path, whole, end):
    params, how = varied_call()
    how["directory"] = tmp_path / "made" / "here"
    with pytest.raises(Killed):
        iterate(params, finetune=varied_finetune(end=end), **how)
    log = []
    resumed = iterate(params, finetune=varied_finetune(log), **how)
    assert log == list(range(end, 3))
    again = iterate(params, finetune=varied_finetune(log), **how)
    assert log == list(range(end, 3))
    assert whole.model.notes
    for found in (resumed, again):
        assert_bits(found.state, whole.state)
        assert_bits(found.model.params, whole.model.params)
        assert_bits(found.model.masked, whole.model.masked)
        assert found.model.notes == whole.model.notes
        assert str(found.model) == str(whole.model)
    assert os.listdir(how["directory"]) == [FILE]


SCRIPT = """
    import os, signal, sys
    from tests.prune.channels.test_iterative import iterate, varied_call, varied_finetune
    params, how = varied_call()
    finetune = varied_finetune()
    def killed(smaller, state, step):
        if step == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return finetune(smaller, state, step)
    iterate(params, finetune=killed, directory=sys.argv[1], **how)
"""


def test_resumed_after_a_kill(tmp_path, whole):
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=os.getcwd())
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    params, how = varied_call()
    log = []
    resumed = iterate(params, finetune=varied_finetune(log), directory=tmp_path, **how)
    assert log == [1, 2]
    assert_bits(resumed.state, whole.state)
    assert_bits(resumed.model.params, whole.model.params)


@pytest.fixture(scope="module")
def first_step(tmp_path_factory):
    """What a call leaves that ends after its first step."""
    directory = tmp_path_factory.mktemp("first")
    how = {"steps": 3, "sparsity": 0.6, "state": {"momentum": mlp_params(1)}}

    def finetune(smaller, state, step):
        if step == 1:
            raise Killed
        return smaller.params, state

    with pytest.raises(Killed):
        iterate(finetune=finetune, directory=directory, **how)
    return how, (directory / FILE).read_bytes()


@pytest.fixture
def stopped(first_step, tmp_path):
    how, sound = first_step
    (tmp_path / FILE).write_bytes(sound)
    return dict(how), tmp_path / FILE


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"steps": 4}, "another number of steps: 3, now 4"),
        ({"sparsity": 0.5}, "another sparsity or budget"),
        ({"sparsity": None, "budget": prune.Budget(macs=0.5)}, "another sparsity or budget"),
        ({"scope": "global"}, "another scope: layer, now global"),
        ({"round_to": 2}, "another round_to"),
        ({"keep": ["w0*"]}, "another keep"),
        ({"limits": {"w0*": 0.5}}, "another limits"),
        ({"renormalize": True}, "another renormalize"),
        ({"score": channel_scores.l2}, "another score: magnitude, now l2"),
        ({"params": mlp_params(2)}, "another params/b0: jax float32"),
        ({"params": mlp_params(0, (8, 10))}, "another set of channels: .*12.*, now .*10"),
        ({"state": {"momentum": mlp_params(2)}}, "another state/momentum/b0"),
        ({"state": None}, "another state/momentum/b0: .*, now absent"),
    ],
)
def test_the_file_of_another_call_is_refused(stopped, tmp_path, other, message):
    how, file = stopped
    before = file.read_bytes()
    how.update(other)
    params = how.pop("params", mlp_params())
    with pytest.raises(ValueError, match=message) as caught:
        iterate(params, finetune=untouched, directory=tmp_path, **how)
    assert str(file) in str(caught.value)
    assert file.read_bytes() == before


def test_damaged_files_are_refused(stopped, tmp_path):
    how, file = stopped
    sound = file.read_bytes()
    again = lambda: iterate(finetune=untouched, directory=tmp_path, **how)
    for damaged in (sound[:-1], sound[: len(sound) // 2], b"", sound[:200] + b"x" + sound[201:]):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=FILE):
            again()
    file.write_bytes(sound)
    again()


@pytest.mark.parametrize(
    "lie",
    [
        lambda tree: tree.update(format=2),
        lambda tree: tree.pop("notes"),
        lambda tree: tree.update(call=3),
        lambda tree: tree.update(done="many"),
        lambda tree: tree.update(done=7),
        lambda tree: tree.update(done=0),
        lambda tree: tree["units"].update({"w9[1]": jnp.ones(8, bool)}),
        lambda tree: tree["units"].update({"w0[1]": jnp.ones(9, bool)}),
        lambda tree: tree["units"].update({"w0[1]": jnp.zeros(8, bool)}),
        lambda tree: tree["units"].update({"w0[1]": jnp.ones(8)}),
        lambda tree: tree["units"].update({"w0[1]": jnp.arange(8) < 3}),
        lambda tree: tree["units"].update({"w0[1]": 3}),
        lambda tree: tree["params"].pop(),
        lambda tree: tree["params"][0].pop(),
        lambda tree: tree["params"][0].__setitem__(1, "pickle"),
        lambda tree: tree["params"][0].__setitem__(2, jnp.ones(3)),
        lambda tree: tree["params"][0].__setitem__(1, "python"),
        lambda tree: tree["state"][0].__setitem__(1, "key threefry2x32"),
        lambda tree: tree.update(state={"a": 1}),
    ],
)
def test_sound_files_that_lie_are_refused(stopped, tmp_path, lie):
    how, file = stopped
    tree = load(file)
    lie(tree)
    save(file, tree)
    with pytest.raises(CheckpointError, match=FILE):
        iterate(finetune=untouched, directory=tmp_path, **how)


def test_a_state_that_cannot_be_restored_is_refused(tmp_path):
    calls = []

    def started(smaller, state, step):
        calls.append(step)
        return smaller.params, optax.adam(1e-3).init(smaller.params)

    how = {"steps": 2, "sparsity": 0.5}
    with pytest.raises(ValueError, match=r"pass state= as finetune returns it"):
        iterate(finetune=started, directory=tmp_path, **how)
    assert os.listdir(tmp_path) == []
    with pytest.raises(TypeError, match="state/f: function cannot be written"):
        iterate(finetune=started, directory=tmp_path, state={"f": mlp}, **how)
    assert calls == [0]
    # Without a file it may be whatever the user likes.
    _, state = iterate(finetune=started, **how)
    assert state[0].mu["b0"].shape == (4,)


# Refusals.


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({}, ValueError, "give sparsity="),
        ({"sparsity": 0.5, "budget": prune.Budget(macs=0.5)}, ValueError, "give sparsity="),
        ({"sparsity": 0.5, "steps": 0}, ValueError, "steps must be at least 1, not 0"),
        ({"sparsity": 1.0}, ValueError, "sparsity is the fraction"),
        ({"sparsity": [0.5, 0.2]}, ValueError, "sparsity falls from 0.5 to 0.2"),
        ({"sparsity": [0.5]}, ValueError, "sparsity: 1 given for 2 steps"),
        ({"sparsity": lambda cuts: 2 * cuts}, ValueError, "sparsity is the fraction"),
        ({"budget": prune.Budget(milliseconds=3)}, ValueError, "one for each step"),
        ({"budget": [prune.Budget(macs=0.5)]}, ValueError, "budget: 1 given for 2 steps"),
        (
            {"budget": [prune.Budget(macs=0.3), prune.Budget(macs=0.5)]},
            ValueError,
            "budget rises from",
        ),
        ({"budget": prune.Budget(macs=1)}, ValueError, "cannot be met"),
        ({"budget": [prune.Budget(macs=0.9), prune.Budget(macs=1)]}, ValueError, "cannot be met"),
        ({"sparsity": 0.5, "batches": iter([(X, Y)])}, TypeError, "batches: list_iterator can be"),
        ({"sparsity": 0.5, "keep": ["nothing"]}, ValueError, "pattern 'nothing' matches no"),
    ],
)
def test_refused_before_anything_is_fine_tuned(how, error, message):
    def never(smaller, state, step):
        raise AssertionError

    how = {"steps": 2, **how}
    if "batches" in how:
        how |= {"loss": loss, "score": channel_scores.taylor}
    with pytest.raises(error, match=message):
        iterate(finetune=never, **how)


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (lambda p: p, TypeError, r"finetune must return \(params, state\), not dict"),
        (lambda p: (p, None, 1), TypeError, r"finetune must return \(params, state\), not tuple"),
        (lambda p: ({"w0": p["w0"]}, None), ValueError, "structure"),
        (lambda p: ({**p, "b0": jnp.ones(8)}, None), ValueError, r"b0: finetune returned .*\(8,\)"),
        (lambda p: ({**p, "b0": p["b0"].astype(jnp.float16)}, None), ValueError, "b0: .*float16"),
        (lambda p: ({**p, "b0": 1.0}, None), ValueError, "b0: finetune returned None None"),
        (lambda p: ({**p, "b0": p["b0"] * jnp.nan}, None), ValueError, "6 of 8 scores are NaN"),
    ],
)
def test_what_finetune_may_not_return(returned, error, message):
    with pytest.raises(error, match=message):
        iterate(finetune=lambda smaller, state, step: returned(smaller.params),
            steps=2, sparsity=0.5,
        )  # fmt: skip


# Putting parameters back.


@settings(max_examples=20)
@given(st.data())
def test_expand_undoes_shrink(data):
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    dtype = data.draw(st.sampled_from([np.float32, np.int32, np.bool_, jnp.bfloat16, np.complex64]))
    kept = tuple(
        data.draw(
            st.none()
            | st.lists(st.integers(0, n - 1), min_size=1, unique=True).map(lambda p: np.sort(p))
        )
        for n in shape
    )
    values = np.random.default_rng(0).normal(size=shape) * 10
    leaf = jnp.asarray(values.astype(dtype))
    small = prune.shrink({"a": leaf}, {"a": leaf}, {"a": kept})
    whole = expand(small, {"a": leaf}, {"a": kept})["a"]
    inside = np.ix_(*[np.arange(n) if k is None else k for n, k in zip(shape, kept, strict=True)])
    reference = np.zeros(shape, leaf.dtype)
    reference[inside] = np.asarray(leaf)[inside]
    assert whole.dtype == leaf.dtype
    np.testing.assert_array_equal(np.asarray(whole), reference)
    assert_bits(prune.shrink({"a": whole}, {"a": leaf}, {"a": kept}), small)


def test_expand_names_what_does_not_fit():
    full = {"a": jnp.ones((2, 3))}
    kept = {"a": (None, np.array([0, 2]))}
    with pytest.raises(ValueError, match=r"a: shape \(2, 3\), but the cut gave \(2, 2\)"):
        expand(full, full, kept)
    with pytest.raises(ValueError, match="'a' is missing"):
        expand({"b": jnp.ones(3)}, full, kept)


def meshed(axis_type):
    mesh = jax.make_mesh((2,), ("model",), axis_types=(axis_type,))
    specs = {"w0": P(None, "model"), "b0": P("model"), "w1": P("model", None), "b1": P(), "w2": P()}
    params = mlp_params().items()
    return mesh, {k: jax.device_put(v, NamedSharding(mesh, specs[k])) for k, v in params}


def test_sharded_parameters(tmp_path):
    _, laid = meshed(AxisType.Auto)
    how = {"finetune": untouched, "steps": 2, "sparsity": 0.5}
    plain = iterate(**how).model.params
    found = iterate(laid, directory=tmp_path, **how).model.params
    again = iterate(laid, directory=tmp_path, **how).model.params
    for name, leaf in plain.items():
        np.testing.assert_array_equal(found[name], leaf)
        np.testing.assert_array_equal(again[name], leaf)
        assert len(again[name].devices()) == len(found[name].devices()) == 2


def test_expand_on_explicit_axes():
    mesh, laid = meshed(AxisType.Explicit)
    at = np.array([0, 3, 5, 6])
    kept = {"w0": (None, at), "b0": (at,), "w1": (at, None)}
    with jax.set_mesh(mesh):
        whole = expand(prune.shrink(laid, laid, kept), laid, kept)
    reference = expand(prune.shrink(mlp_params(), laid, kept), laid, kept)
    for name, leaf in reference.items():
        np.testing.assert_array_equal(whole[name], leaf)
        assert jax.typeof(whole[name]).sharding.spec == jax.typeof(laid[name]).sharding.spec
