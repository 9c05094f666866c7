"""Cross-layer equalisation: its definition, the same function, what it gains and what it leaves."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.sharding import NamedSharding, PartitionSpec

from jaxcomp import tree as tree_lib
from jaxcomp.quantize.formats import Format, PerTensor
from jaxcomp.quantize.post_training.rescaling.equalize import equalize
from jaxcomp.quantize.post_training.round_to_nearest import round_to_nearest
from tests.model.cutting import difference
from tests.model.networks import networks
from tests.model.zoo import ZOO

# What is equalised in some networks of the zoo: the leaves divided, then those multiplied.
PAIRS = {
    "two heads": {("trunk/kernel trunk/bias", "policy/kernel value/kernel")},
    "glu": {("first/kernel first/bias", "head/kernel")},
    "vgg": {
        ("conv1/kernel conv1/bias", "conv2/kernel"),
        ("conv2/kernel conv2/bias", "dense/kernel"),
        ("dense/kernel dense/bias", "head/kernel"),
    },
    "llama half-split": {
        ("query/kernel", "key/kernel"),
        ("value/kernel", "out/kernel"),
        ("up/kernel", "down/kernel"),
    },
    "group norm": set(),
    "mlp softplus": set(),
}
SLOW = ("vgg", "llama half-split")
OTHERS = [name for name in ZOO if name not in PAIRS]


def mlp(params, x):
    for i in range(3):
        x = jax.nn.relu(x @ params[f"w{i}"] + params[f"b{i}"]) if i < 2 else x @ params["w2"]
    return x


def unbalanced(seed=0, width=12):
    rng = np.random.default_rng(seed)
    shapes = {
        "w0": (6, width),
        "b0": (width,),
        "w1": (width, width),
        "b1": (width,),
        "w2": (width, 3),
    }
    params = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    for i in range(2):
        wide = np.exp(2 * rng.normal(size=width))
        params[f"w{i}"] *= wide
        params[f"b{i}"] *= wide
        params[f"w{i + 1}"] /= wide[:, None]
    return {name: jnp.asarray(value, jnp.float32) for name, value in params.items()}


X = jnp.asarray(np.random.default_rng(9).normal(size=(32, 6)), jnp.float32)


def reference(params, rounds=500):
    """Equation 11 of the paper over both pairs in turn, in float64."""
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    for _ in range(rounds):
        for i in range(2):
            made, read = np.abs(p[f"w{i}"]).max(0), np.abs(p[f"w{i + 1}"]).max(1)
            s = made / np.sqrt(made * read)
            p[f"w{i}"], p[f"b{i}"] = p[f"w{i}"] / s, p[f"b{i}"] / s
            p[f"w{i + 1}"] = p[f"w{i + 1}"] * s[:, None]
    return p


def test_it_is_the_papers_iteration():
    params = unbalanced()
    found = equalize(mlp, params, [X], tolerance=1e-7)
    for name, expected in reference(params).items():
        np.testing.assert_allclose(found.params[name], expected, rtol=1e-4, atol=1e-6)
    # Both kernels of a pair have the same range in every channel.
    for i in range(2):
        made = np.abs(found.params[f"w{i}"]).max(0)
        read = np.abs(found.params[f"w{i + 1}"]).max(1)
        np.testing.assert_allclose(made, read, rtol=1e-4)
    assert all(group.after < group.before for group in found.groups if not group.kept)
    assert [group.name for group in found.groups if group.kept] == ["w0"]


@pytest.mark.parametrize("bits", [8, 4])
def test_a_scale_a_tensor_loses_much_less_on_unbalanced_channels(bits):
    params = unbalanced()
    even = equalize(mlp, params, [X]).params
    exact = np.asarray(mlp(params, X))
    assert difference(exact, mlp(even, X)) < 1e-5
    errors = []
    for each in (params, even):
        packed = round_to_nearest(mlp, each, None, Format(bits, granularity=PerTensor()))
        output = mlp({name: jnp.asarray(leaf) for name, leaf in packed.params.items()}, X)
        errors.append(np.square(np.asarray(output) - exact).mean() / np.square(exact).mean())
    assert errors[1] < errors[0] / 10


def check_case(name):
    case = ZOO[name]()
    found = equalize(case.apply_fn, case.params, [tuple(case.inputs)])
    run = jax.jit(case.apply_fn)
    outputs = run(case.params, *case.inputs), run(found.params, *case.inputs)
    assert difference(*outputs) < max(case.tolerance, 1e-5)
    assert jax.tree.structure(found.params) == jax.tree.structure(case.params)
    weights = [
        p for p, leaf in tree_lib.flatten(case.params).items() if tree_lib.is_weight(p, leaf)
    ]
    touched = {path for group in found.groups for path in (*group.divided, *group.multiplied)}
    # Nothing is passed over in silence.
    assert set(weights) <= touched | {group.name for group in found.groups}
    for group in found.groups:
        assert bool(group.kept) != bool(group.divided)
    return found


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in PAIRS],
)
def test_the_zoo_computes_the_same_and_the_pairs_are_those_derived_by_hand(name):
    found = check_case(name)
    strip = lambda paths: " ".join(sorted(path.removeprefix("params/") for path in paths))
    pairs = {(strip(g.divided), strip(g.multiplied)) for g in found.groups if not g.kept}
    sort = lambda words: " ".join(sorted(words.split()))
    assert pairs == {(sort(made), sort(read)) for made, read in PAIRS[name]}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_the_rest_of_the_zoo_computes_the_same(name):
    check_case(name)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(networks())
def test_random_networks_compute_the_same(drawn):
    found = equalize(drawn.apply_fn, drawn.params, [tuple(drawn.inputs)])
    run = jax.jit(drawn.apply_fn)
    before, after = run(drawn.params, *drawn.inputs), run(found.params, *drawn.inputs)
    assert difference(before, after) < 1e-4
    # What was worked out is exact: no trial had to refuse it.
    assert not any("tried with powers" in (group.kept or "") for group in found.groups)


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (3, 3), name="a")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True, name="bn")(x))
        return nn.Conv(4, (1, 1), name="b")(x)


def test_a_batch_norm_goes_along_without_its_variance():
    model, x = (
        Normed(),
        jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 5, 3)), jnp.float32),
    )
    rng = np.random.default_rng(1)
    variables = jax.tree.map(
        lambda leaf: jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), jnp.float32),
        jax.eval_shape(model.init, jax.random.key(0), x),
    )
    run = jax.jit(model.apply)
    found = equalize(run, variables, [x])
    (group,) = (group for group in found.groups if not group.kept)
    assert set(group.divided) == {
        "params/a/kernel",
        "params/a/bias",
        "params/bn/bias",
        "batch_stats/bn/mean",
    }
    assert group.multiplied == ("params/b/kernel",)
    before, after = tree_lib.flatten(variables), tree_lib.flatten(found.params)
    s = before["params/a/bias"] / after["params/a/bias"]
    np.testing.assert_allclose(
        after["batch_stats/bn/mean"] * s, before["batch_stats/bn/mean"], 1e-5
    )
    np.testing.assert_allclose(
        after["params/b/kernel"], before["params/b/kernel"] * s[:, None], 1e-5
    )
    for path in ("batch_stats/bn/var", "params/bn/scale"):
        assert after[path] is before[path]
    assert difference(run(variables, x), run(found.params, x)) < 1e-5


def test_a_residual_sum_moves_all_that_is_added_and_all_that_reads():
    def model(params, x):
        stem = jax.nn.relu(x @ params["stem"])
        return (stem + jax.nn.relu(stem @ params["up"]) @ params["down"]) @ params["head"]

    rng = np.random.default_rng(0)
    shapes = {"stem": (6, 5), "up": (5, 7), "down": (7, 5), "head": (5, 2)}
    params = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}
    found = equalize(model, params, [X])
    pairs = {(frozenset(g.divided), frozenset(g.multiplied)) for g in found.groups if not g.kept}
    assert pairs == {
        (frozenset({"stem", "down"}), frozenset({"up", "head"})),
        (frozenset({"up"}), frozenset({"down"})),
    }
    assert difference(model(params, X), model(found.params, X)) < 1e-5


@pytest.mark.parametrize(
    ("between", "words"),
    [
        (jax.nn.gelu, "tanh is not homogeneous"),
        (jnp.tanh, "tanh is not homogeneous"),
        (jax.nn.relu6, "min"),
        (lambda h: h + 1.0, "add mixes them"),
        (jax.nn.softmax, "exp is not homogeneous"),
        (lambda h: h - h.mean(-1, keepdims=True), "reduce_sum runs over them"),
        (lambda h: jnp.cumsum(h, 1), "cumsum"),
        (lambda h: h[:, ::-1], "rev"),
        (lambda h: jnp.round(h), "round is not homogeneous"),
        (lambda h: h.astype(jnp.int32).astype(jnp.float32), "convert_element_type rounds"),
        (lambda h: jnp.pad(h, ((0, 1), (0, 0)), constant_values=1.0), "pad is not homogeneous"),
    ],
)
def test_what_would_change_the_function_is_left_alone_and_named(between, words):
    params = {"a": unbalanced()["w0"], "c": unbalanced()["w2"]}
    found = equalize(lambda p, x: between(x @ p["a"]) @ p["c"], params, [X])
    assert found.params is params or found.params == params
    reasons = {group.name: group.kept for group in found.groups}
    assert words in reasons["c"]
    assert f"c: kept, {reasons['c']}" in str(found)


@pytest.mark.parametrize(
    "between",
    [
        jax.nn.leaky_relu,
        lambda h: jnp.where(h > 0, h, 0.0),
        lambda h: h * jnp.sign(h),
        lambda h: jnp.sqrt(jnp.square(h)),
        lambda h: h / 3 + jnp.abs(h),
        lambda h: jnp.concatenate([h[:2], jnp.maximum(h[2:], 0)]),
        lambda h: jax.lax.fori_loop(0, 3, lambda _, c: jax.nn.relu(c) + h, h),
        lambda h: jax.lax.cond(X[0, 0] > 0, jnp.abs, jax.nn.relu, h),
    ],
)
def test_what_is_positively_homogeneous_is_no_obstacle(between):
    params = {"a": unbalanced()["w0"], "c": unbalanced()["w2"]}
    model = lambda p, x: between(x @ p["a"]) @ p["c"]
    found = equalize(model, params, [X])
    (group,) = (group for group in found.groups if not group.kept)
    assert (group.divided, group.multiplied) == (("a",), ("c",))
    assert difference(model(params, X), model(found.params, X)) < 1e-5


def test_what_cannot_be_tried_exactly_is_refused():
    # Weights at the edge of float32: four times as much is infinite.
    params = {"a": jnp.full((6, 8), 2e-38), "c": jnp.full((8, 1), 3e38)}
    found = equalize(lambda p, x: (x @ p["a"]) @ p["c"], params, [jnp.ones((1, 6))])
    assert all(group.kept for group in found.groups)
    assert any("tried with powers of two" in (group.kept or "") for group in found.groups)


def test_dead_channels_dtypes_and_placement_stay():
    params = unbalanced()
    params["w0"] = params["w0"].at[:, 3].set(0)
    params = {k: v.astype(jnp.bfloat16) if k == "w1" else v for k, v in params.items()}
    mesh = jax.make_mesh((2,), ("model",))
    params["w0"] = jax.device_put(params["w0"], NamedSharding(mesh, PartitionSpec(None, "model")))
    replicated = NamedSharding(mesh, PartitionSpec())
    params = {k: v if k == "w0" else jax.device_put(v, replicated) for k, v in params.items()}
    found = equalize(mlp, params, [X]).params
    assert found["w1"].dtype == jnp.bfloat16
    assert found["w0"].sharding == params["w0"].sharding
    assert np.isfinite(found["w1"].astype(np.float32)).all()
    np.testing.assert_array_equal(np.asarray(found["w0"])[:, 3], 0)


def test_arguments_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="pattern 'w9' matches no leaf"):
        equalize(mlp, unbalanced(), [X], paths="w9")
    with pytest.raises(ValueError, match="w0: 1 of 72 values are NaN"):
        equalize(mlp, {**unbalanced(), "w0": unbalanced()["w0"].at[0, 0].set(jnp.nan)}, [X])
    with pytest.raises(ValueError, match="most_rounds"):
        equalize(mlp, unbalanced(), [X], most_rounds=0)
    found = equalize(lambda p, i: p["table"][i], {"table": jnp.ones((4, 3))}, [jnp.arange(2)])
    assert found.groups[0].kept == "no product reads it"
