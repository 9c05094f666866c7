"""Observing as a run: streaming, devices, what is refused and what is named."""

import collections
import functools
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcomp.model import progress as progress_lib
from jaxcomp.model import tapped
from jaxcomp.model.observe import _begin, _plan, _Seen, _step, observe
from jaxcomp.model.program import read
from jaxcomp.model.statistics import (
    Statistic,
    absmax,
    histogram,
    mean_square,
    minmax,
    second_moment,
)
from tests.model import zoo
from tests.users_programs import users_jit


def normal(*shape, seed=0):
    return jax.device_put(
        np.random.default_rng((seed, *shape)).normal(size=shape).astype(np.float32)
    )


PARAMS = {"first": normal(4, 6), "second": normal(6, 3)}


def mlp(params, x):
    return jnp.tanh(x @ params["first"]) @ params["second"]


# The function itself.


def outputs_beside(apply_fn, params, inputs, statistic):
    """The outputs of the very program that the statistic is taken in."""
    program = read(apply_fn, params, *inputs)
    plan = _plan(program, statistic, None)
    state = _begin(plan, statistic, None)

    def run(params, inputs, state):
        none = {key: jnp.zeros(entry.turns, jnp.int32) for key, entry in plan.entries.items()}
        entries = {key: (state[key], _Seen(n, n)) for key, n in none.items()}
        values = jax.tree.leaves((params, inputs))
        results, entries = tapped.run(program, values, plan.taps, entries)
        return jax.tree.unflatten(program.out_tree, results), entries

    return users_jit(run)(params, inputs, state)[0]


@pytest.mark.parametrize("name", ["mlp bfloat16", "branches", "loop", "vgg", "scanned remat"])
def test_outputs_are_bit_for_bit_those_of_the_function(name):
    case = zoo.ZOO[name]()
    inputs = tuple(case.inputs)
    found = outputs_beside(case.apply_fn, case.params, inputs, second_moment())
    expected = users_jit(case.apply_fn)(case.params, *inputs)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("name", ["tied autoencoder", "branches", "loop", "plain scan", "lstm"])
def test_every_leaf_has_a_value_or_a_reason(name):
    case = zoo.ZOO[name]()
    found = observe(case.apply_fn, case.params, [tuple(case.inputs)], absmax())
    named = {key.split("#")[0] for key in (*found, *found.unobserved)}
    assert named == set(read(case.apply_fn, case.params, *case.inputs).leaves)
    assert all(found.unobserved.values())


# Streams.


def test_the_split_into_batches_does_not_matter():
    x = np.asarray(normal(8, 4, seed=3))
    for statistic in (mean_square(), histogram()):
        whole = observe(mlp, PARAMS, [x], statistic)
        for parts in ([x[:4], x[4:]], [x[1:4], x[:1], x[4:]]):
            found = observe(mlp, PARAMS, parts, statistic)
            # A matrix product may be rounded otherwise in another shape.
            jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), found, whole)


def test_one_trace_a_shape_and_a_smaller_batch_counts_with_its_own_weight():
    traces = []

    def counted(params, x):
        traces.append(x.shape)
        return mlp(params, x)

    batches = [*(normal(4, 4, seed=seed) for seed in range(20)), normal(1, 4, seed=99)]
    found = observe(counted, PARAMS, batches, mean_square())
    assert traces == [(4, 4), (1, 4)]
    x = np.concatenate(batches).astype(np.float64)
    np.testing.assert_allclose(found["first"], np.mean(x**2, 0), rtol=1e-6)


def test_one_compilation_a_shape(caplog):
    batches = [np.asarray(normal(4, 4, seed=seed)) for seed in range(6)]
    with jax.log_compiles():
        observe(mlp, PARAMS, batches, mean_square())
    compiled = [m for m in caplog.messages if "Compiling" in m and "step" in m]
    assert len(compiled) == 1, compiled


def test_batches_are_taken_one_at_a_time_and_not_kept():
    given, most = [], []

    def stream():
        for seed in range(10):
            batch = np.array(normal(64, 4, seed=seed))
            given.append(weakref.ref(batch))
            yield batch
            del batch
            gc.collect()
            most.append(sum(one() is not None for one in given))

    observe(mlp, PARAMS, stream(), mean_square())
    assert len(most) == 10
    assert max(most) <= 2


def test_state_is_updated_in_place():
    program = read(mlp, PARAMS, normal(4, 4))
    plan = _plan(program, second_moment(), None)
    step = _step(plan, second_moment(), None)
    state = _begin(plan, second_moment(), None)
    step(state, PARAMS, (normal(4, 4),))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_what_an_item_is():
    class Pair(collections.namedtuple("Pair", "left right")):
        pass

    def two(params, x, y):
        return (x + y) @ params

    def one(params, pair):
        return two(params, pair.left, pair.right)

    w, x, y = normal(4, 3), normal(2, 4), normal(2, 4, seed=1)
    expected = np.abs(x + y).max(0)
    np.testing.assert_array_equal(observe(two, w, [(x, y)], absmax())[""], expected)
    np.testing.assert_array_equal(observe(one, w, iter([Pair(x, y)]), absmax())[""], expected)


def test_a_statistic_of_ones_own():
    def measure(x):
        axes = tuple(range(x.ndim - 1))
        return jnp.stack([jnp.sum(x > 0, axes), jnp.sum(x <= 0, axes)])

    positive = Statistic(
        name="positive",
        init=lambda features: jnp.zeros((2, features), jnp.int32),
        measure=measure,
        merge=jnp.add,
        finish=lambda state: state[0] / state.sum(0),
    )
    x = normal(8, 4)
    found = observe(lambda w, x: x @ w, normal(4, 2), [x, x - 1], positive)[""]
    expected = (np.mean(x > 0, 0) + np.mean(x - 1 > 0, 0)) / 2
    np.testing.assert_allclose(found, expected, rtol=1e-6)


# Devices.


def sharded(kind, spec, x):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
    place = lambda a, s: jax.device_put(a, NamedSharding(mesh, s))
    params = {"first": place(PARAMS["first"], P(None, "model")), "second": PARAMS["second"]}
    params["second"] = place(params["second"], P("model", None) if kind == AxisType.Auto else P())
    return params, place(x, spec)


def model(params, x):
    hidden = jnp.tanh(x @ params["first"])
    mesh = jax.typeof(hidden).sharding.mesh
    if mesh._any_axis_explicit:
        hidden = jax.sharding.reshard(hidden, NamedSharding(mesh, P("data")))
    return hidden @ params["second"]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize(
    "statistic", [minmax(), second_moment(), histogram()], ids=lambda s: s.name
)
def test_sharded_inputs_give_the_same_statistics_everywhere(kind, statistic):
    batches = [np.asarray(normal(8, 6, 4, seed=seed)) for seed in range(3)]
    alone = observe(model, PARAMS, batches, statistic)
    params, _ = sharded(kind, P("data"), batches[0])
    spread = [sharded(kind, P("data"), x)[1] for x in batches]
    found = observe(model, params, spread, statistic)
    assert list(found) == list(alone)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), dict(alone), dict(found))
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize("spec", [P("data"), P(None, "data")], ids=["batch", "sequence"])
@pytest.mark.parametrize(
    "statistic", [absmax(), second_moment(), histogram()], ids=lambda s: s.name
)
def test_statistics_do_not_gather_the_batch(spec, statistic):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x = jax.device_put(normal(16, 16, 4), NamedSharding(mesh, spec))
    place = NamedSharding(mesh, P())
    params = jax.device_put(PARAMS, place)
    plan = _plan(read(mlp, params, x), statistic, None)
    step = _step(plan, statistic, place)
    state = _begin(plan, statistic, place)
    text = step.lower(state, params, (x,)).compile().as_text()
    assert "all-reduce" in text
    assert not [word for word in ("all-gather", "all-to-all", "collective-permute") if word in text]


# What is refused.


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_named(value):
    batches = [np.array(normal(3, 4, seed=seed)) for seed in range(4)]
    batches[2][1, 2] = value
    with pytest.raises(ValueError, match="batch 2: first is multiplied by 1 NaN or infinite"):
        observe(mlp, PARAMS, batches, histogram())
    broken = {"first": PARAMS["first"].at[0, 0].set(value), "second": PARAMS["second"]}
    if np.isnan(value):
        with pytest.raises(ValueError, match="batch 0: second is multiplied by 3 NaN"):
            observe(mlp, broken, batches[:1], absmax())


def test_what_is_not_finite_stops_the_run_at_once():
    taken = []

    def stream():
        for number in range(20):
            taken.append(number)
            yield jnp.full((2, 4), np.nan if number == 3 else 1.0)

    with pytest.raises(ValueError, match="batch 3: first"):
        observe(mlp, PARAMS, stream(), absmax())
    assert max(taken) <= 4


def test_a_nan_in_one_layer_of_a_scan_is_seen():
    def scanned(params, x):
        return lax.scan(lambda x, w: (jnp.log(x) @ w, None), x, params)[0]

    with pytest.raises(ValueError, match="layers is multiplied by 4 NaN or infinite"):
        observe(
            lambda p, x: scanned(p["layers"], x),
            {"layers": -jnp.ones((2, 2, 2))},
            [jnp.full((2, 2), 2.0)],
            absmax(),
        )


def test_overflow_is_named():
    with pytest.raises(ValueError, match="first: mean_square overflows float32"):
        observe(mlp, PARAMS, [jnp.full((1, 4), 1e30)], mean_square())


def test_wrong_batches():
    with pytest.raises(ValueError, match="batches is empty"):
        observe(mlp, PARAMS, iter(()), absmax())
    with pytest.raises(TypeError, match="one array"):
        observe(mlp, PARAMS, normal(3, 4), absmax())

    def by_size(params, x):
        return mlp(params, x) if len(x) > 1 else x @ params["first"]

    with pytest.raises(ValueError, match="batch 1: second is used in another way"):
        observe(by_size, PARAMS, [normal(2, 4), normal(1, 4)], absmax())


def test_empty_batches_count_nothing():
    found = observe(mlp, PARAMS, [jnp.zeros((0, 4)), jnp.ones((2, 4))], absmax())
    np.testing.assert_array_equal(found["first"], np.ones(4))
    found = observe(mlp, PARAMS, [jnp.zeros((0, 4))], absmax())
    assert set(found.unobserved) == {"first", "second"}
    image = {"kernel": jnp.ones((3, 3, 2, 4))}
    run = lambda p, x: jax.lax.conv_general_dilated(
        x, p["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    found = observe(run, image, [jnp.zeros((0, 5, 5, 2)), jnp.ones((1, 5, 5, 2))], absmax())
    np.testing.assert_array_equal(found["kernel"], np.ones(2))
    found = observe(run, image, [jnp.zeros((0, 5, 5, 2))], second_moment())
    assert set(found.unobserved) == {"kernel"}


def test_patterns():
    found = observe(mlp, PARAMS, [normal(2, 4)], absmax(), paths="sec*")
    assert list(found) == ["second"]
    assert not found.unobserved
    with pytest.raises(ValueError, match=r"'third' matches no leaf.*nearest"):
        observe(mlp, PARAMS, [normal(2, 4)], absmax(), paths=["first", "third"])
    with pytest.raises(ValueError, match="no use can be observed with absmax: b: add contracts"):
        observe(lambda p, x: x + p["b"], {"b": jnp.ones(4)}, [normal(2, 4)], absmax())


# What is named.


def mesh_of_two():
    return jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])


def per_device(w, x):
    function = lambda w, x: x @ w
    return jax.shard_map(
        function, mesh=mesh_of_two(), in_specs=(P(), P("data")), out_specs=P("data")
    )(w, x)


def condition(w, x):
    return lax.while_loop(lambda x: jnp.sum(x @ w) > 1e9, lambda x: x + 1, x)


def indexed(w, x):
    at = jnp.argmax(x[0])
    return x @ lax.dynamic_index_in_dim(w.reshape(2, 2, 4), at % 2, keepdims=False).T


def shuffled_layers(w, x):
    layers = w.reshape(2, 2, 4)[::-1]
    return lax.scan(lambda h, w: (h + x @ w.T, None), jnp.zeros((2, 2)), layers)[0]


def reversed_layers(w, x):
    layers = w.reshape(4, 1, 4)[::-1]
    return lax.scan(lambda h, w: (h + x @ w.T, None), jnp.zeros((2, 1)), layers)[0]


def counted_layers(w, x):
    return lax.fori_loop(0, 4, lambda i, h: h + x @ w[i], jnp.zeros(2))


NAMED = {
    "layers turned around": (reversed_layers, "only the running program knows"),
    "layers by a counter": (counted_layers, "only the running program knows"),
    "shard_map": (per_device, "inside shard_map"),
    "condition of a while loop": (condition, "condition of a while loop"),
    "part of the inputs": (lambda w, x: x[:, :2] @ w[:2], "a part of its axis 0"),
    "repeated": (
        lambda w, x: jnp.tile(x, 2) @ jnp.concatenate([w, w]),
        "padded, repeated or mixed",
    ),
    "mixed": (lambda w, x: x @ jnp.cumsum(w, 0), "cumsum"),
    "an index of the data": (indexed, "mixed with others before dynamic_slice"),
    "layers in another order": (shuffled_layers, "mixed with others before dot_general"),
    "element-wise": (lambda w, x: x[0, 0] * w, "mul contracts nothing with it"),
    "unused": (lambda w, x: x, "no output depends on it"),
    "returned": (lambda w, x: w.T, "it is returned as it is"),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_use_that_cannot_be_observed_is_named(name):
    function, words = NAMED[name]
    params = {"seen": normal(4, 4), "w": normal(4, 4)}
    both = lambda params, x: (x @ params["seen"], function(params["w"], x))
    found = observe(both, params, [normal(2, 4)], mean_square())
    assert list(found) == ["seen"]
    (reason,) = [reason for key, reason in found.unobserved.items() if key.startswith("w")]
    assert words in reason
    assert len(reason) > 20


# Around it.


def test_the_result_is_a_tree():
    found = observe(mlp, PARAMS | {"bias": jnp.ones(3)}, [normal(2, 4)], minmax())
    doubled = jax.tree.map(lambda leaf: 2 * leaf, found)
    np.testing.assert_array_equal(doubled["first"].maximum, 2 * found["first"].maximum)
    assert doubled.unobserved == found.unobserved == {"bias": "no output depends on it"}


def test_progress_is_shown_when_asked_for_or_on_a_slow_terminal(capsys, monkeypatch):
    def said(progress):
        assert list(progress_lib.watched([1, 2, 3], "reading", progress)) == [1, 2, 3]
        out, err = capsys.readouterr()
        assert not out
        return err

    assert not said(None)
    assert not said(False)
    assert "reading" in said(True)
    assert "3/3" in said(True)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert not said(None)
    monkeypatch.setattr(progress_lib, "_PATIENCE", -1.0)
    assert "reading" in said(None)
    assert not said(False)


def test_observing_hands_progress_on(capsys):
    observe(mlp, PARAMS, [normal(2, 4)] * 3, absmax(), progress=True)
    assert "3/3" in capsys.readouterr().err


def test_a_progress_bar_ends_with_what_it_watches(capsys):
    def fails():
        yield 1
        raise RuntimeError("mid-way")

    with pytest.raises(RuntimeError, match="mid-way"):
        list(progress_lib.watched(fails(), "reading", True))
    assert list(progress_lib.watched(iter("ab"), "reading", True)) == ["a", "b"]
    capsys.readouterr()
