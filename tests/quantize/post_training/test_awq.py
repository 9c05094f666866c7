"""AWQ: its searches against an exhaustive float64 form, and whole models in any layout."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcomp.arrays.rescaled import RescaledArray
from jaxcomp.model.matrices import MatrixForm, to_matrix
from jaxcomp.quantize import Format, PerChannel, PerGroup, PerTensor, encode
from jaxcomp.quantize.formats import GridFormat, PerBlock
from jaxcomp.quantize.post_training.awq import awq, awq_leaf, multiplier_shape
from jaxcomp.quantize.post_training.awq_matrix import parts, search_clipping, search_exponents
from jaxcomp.quantize.post_training.layout import by_group, like_scale, scale_layout
from jaxcomp.quantize.post_training.walk import Task
from jaxcomp.quantize.scales import find_scales, spread_scales

FEATURES, OUTPUTS = 16, 6
FORM = MatrixForm((FEATURES, OUTPUTS), (0,), (1,))


def problem(seed=0, features=FEATURES, outputs=OUTPUTS, spread=1.0):
    """Weights, and the second moment of correlated inputs of unlike sizes."""
    rng = np.random.default_rng(seed)
    mix = np.eye(features) + rng.normal(size=(features, features)) / features**0.5
    x = rng.normal(size=(4 * features, features)) @ mix * np.exp(spread * rng.normal(size=features))
    weights = jnp.asarray(rng.normal(size=(features, outputs)), jnp.float32)
    return weights, jnp.asarray(x.T @ x / len(x), jnp.float32)


def wide(x):
    return np.asarray(x, np.float64)


def error(weights, values, moment):
    d = wide(weights) - wide(values)
    return float(np.sum(d * (wide(moment) @ d)))


def nearest(weights, size, bits, part=1.0):
    """Symmetric rounding in groups of rows, float64; ``part`` of each range."""
    top = 2 ** (bits - 1) - 1
    groups = wide(weights).reshape(-1, size, weights.shape[1])
    scale = np.abs(groups).max(1, keepdims=True) / top * part
    return (np.clip(np.round(groups / scale), -top, top) * scale).reshape(weights.shape)


def bfloat16(x):
    return np.asarray(jnp.asarray(x, jnp.float32).astype(jnp.bfloat16), np.float64)


@pytest.mark.parametrize("seed", range(4))
def test_the_best_exponent_is_that_of_an_exhaustive_search(seed):
    (weights, moment), size = problem(seed), 4
    granularity = PerGroup(size, -2)
    leaf = awq_leaf(Task("w", FORM, Format(4, granularity=granularity)), weights, moment, 20, 1)
    rms = np.sqrt(np.diag(wide(moment)))
    found = []
    for exponent in np.arange(20) / 20:
        s = (rms / rms.max()) ** exponent
        by = bfloat16(np.sqrt(s.max() * s.min()) / s)[:, None]
        found.append(error(weights, nearest(wide(weights) / by, size, 4) * by, moment))
    best = int(np.argmin(found))
    assert best > 0
    np.testing.assert_allclose(error(weights, leaf.decode(), moment), found[best], rtol=1e-3)
    s = (rms / rms.max()) ** (best / 20)
    expected = bfloat16(np.sqrt(s.max() * s.min()) / s)
    np.testing.assert_array_equal(np.asarray(leaf.multiplier[:, 0], np.float64), expected)


@pytest.mark.parametrize("seed", range(3))
def test_clipping_of_each_output_is_the_best_of_all(seed):
    weights, moment = problem(seed)
    leaf = awq_leaf(Task("w", FORM, Format(3)), weights, moment, 1, 10)
    for j in range(OUTPUTS):
        column = wide(weights[:, j : j + 1])
        tried = [
            error(column, nearest(column, FEATURES, 3, p), moment) for p in 1 - np.arange(10) / 20
        ]
        np.testing.assert_allclose(
            error(column, leaf.decode()[:, j : j + 1], moment), min(tried), rtol=1e-3
        )


def test_clipping_in_groups_walks_downhill_and_stops_well():
    weights, moment = problem(5)
    size, count = 8, 6
    leaf = awq_leaf(
        Task("w", FORM, Format(3, granularity=PerGroup(size))), weights, moment, 1, count
    )
    tried = np.asarray(parts(count, 3))
    for j in range(OUTPUTS):
        column = wide(weights[:, j : j + 1])
        halves = [[nearest(half, size, 3, p) for p in tried] for half in np.split(column, 2)]

        def pair(a, b, column=column, halves=halves):
            return error(column, np.concatenate([halves[0][a], halves[1][b]]), moment)

        first = int(np.argmin([pair(a, 0) for a in range(count)]))
        second = int(np.argmin([pair(first, b) for b in range(count)]))
        got = error(column, leaf.decode()[:, j : j + 1], moment)
        np.testing.assert_allclose(got, pair(first, second), rtol=1e-3)
        assert got <= pair(0, 0) * (1 + 1e-5)
        everything = [pair(a, b) for a, b in itertools.product(range(count), repeat=2)]
        assert min(everything) <= got * (1 + 1e-5)


FORMATS = [
    Format(3, symmetric=False, granularity=PerGroup(4)),
    Format(1, zero=False),
    Format(4, granularity=PerBlock((4, 3)), scale_dtype="bfloat16"),
    GridFormat("float4_e2m1fn", PerGroup(8), scale_dtype="float8_e4m3fn", tensor_scale=True),
]


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_never_worse_than_to_nearest(format):
    for seed, spread in ((0, 1.0), (1, 0.0), (2, 3.0)):
        weights, moment = problem(seed, spread=spread)
        plain = error(weights, encode(weights, format).decode(), moment)
        got = error(
            weights, awq_leaf(Task("w", FORM, format), weights, moment, 8, 8).decode(), moment
        )
        assert got <= plain * (1 + 1e-5)
        if spread == 1:
            assert got < 0.9 * plain


@given(seed=st.integers(0, 999), power=st.integers(-8, 8))
@settings(max_examples=8)
def test_scaled_weights_and_inputs_are_the_same_choices(seed, power):
    weights, moment = problem(seed)
    task = Task("w", FORM, Format(4, granularity=PerGroup(4)))
    leaf = awq_leaf(task, weights, moment, 8, 8)
    larger = awq_leaf(task, weights * 2.0**power, moment * 4.0, 8, 8)
    np.testing.assert_array_equal(larger.decode(), leaf.decode() * 2.0**power)


def test_what_loses_nothing_stays_plain():
    weights = np.round(np.random.default_rng(0).uniform(-6, 6, (FEATURES, OUTPUTS)))
    weights[0] = 7
    _, moment = problem()
    plain = encode(jnp.asarray(weights, jnp.float32), Format(4))
    for inputs in (moment, 0 * moment, None):
        leaf = awq_leaf(Task("w", FORM, Format(4)), jnp.asarray(weights, jnp.float32), inputs)
        assert jax.tree.structure(leaf) == jax.tree.structure(plain)
        jax.tree.map(np.testing.assert_array_equal, leaf, plain)


def test_the_multiplier_is_counted_and_small():
    weights, moment = problem(spread=2.0)
    leaf = awq_leaf(Task("w", FORM, Format(4)), weights.astype(jnp.bfloat16), moment)
    assert isinstance(leaf, RescaledArray)
    assert leaf.dtype == leaf.decode().dtype == jnp.bfloat16
    plain = encode(weights, Format(4))
    assert leaf.nbytes == plain.nbytes + 2 * FEATURES


def test_inputs_that_never_come_do_no_harm():
    weights, moment = problem(spread=2.0)
    moment = moment.at[:3].set(0).at[:, :3].set(0)
    leaf = awq_leaf(Task("w", FORM, Format(4, granularity=PerGroup(4))), weights, moment, 8, 8)
    assert np.all(np.isfinite(leaf.decode()))


LAYOUTS = {
    "in out": (MatrixForm((8, 6), (0,), (1,)), PerGroup(4)),
    "out in": (MatrixForm((6, 8), (1,), (0,)), PerGroup(4, -1)),
    "heads in": (MatrixForm((8, 2, 3), (0,), (1, 2)), PerChannel((1, 2))),
    "heads out": (MatrixForm((2, 4, 6), (0, 1), (2,)), PerGroup(4)),
    "layers": (MatrixForm((3, 8, 6), (1,), (2,), (0,)), PerChannel((0, 2))),
    "experts": (MatrixForm((8, 3, 6), (0,), (2,), (1,)), PerGroup(2, 0)),
    "conv": (MatrixForm((2, 2, 4, 6), (0, 1, 2), (3,), kernel_axes=(0, 1)), PerGroup(2)),
    "grouped conv": (
        MatrixForm((2, 2, 4, 6), (0, 1, 2), (3,), inner=2, kernel_axes=(0, 1)),
        PerTensor(),
    ),
    "mixed groups": (
        MatrixForm((2, 4, 6), (0, 1), (2,), (), 2, (0, 2, 4, 1, 3, 5), (0,)),
        PerGroup(3, -1),
    ),
    "blocks": (MatrixForm((8, 6), (0,), (1,)), PerBlock((4, 2))),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_who_shares_a_scale_in_every_layout(name):
    form, granularity = LAYOUTS[name]
    format = Format(4, granularity=granularity)
    leaf = jnp.asarray(np.random.default_rng(0).normal(size=form.shape), jnp.float32)
    scales = find_scales(leaf, format)
    layout = scale_layout(form, format)
    grouped = np.asarray(by_group(form, layout, spread_scales(scales, form.shape, format).scale))
    assert len(np.unique(grouped)) == scales.scale.size
    back = like_scale(form, format, layout, jnp.asarray(grouped), scales.scale)
    np.testing.assert_array_equal(back, scales.scale)
    # Entries share a scale exactly where group and mates are the same.
    assert layout.sharing * layout.groups == scales.scale.size
    for number in range(layout.sharing):
        for group in range(layout.groups):
            at = np.broadcast_to(layout.mates == number, (*layout.mates.shape,))
            assert len(np.unique(grouped[:, group][at])) == 1


@pytest.mark.parametrize("name", ["heads out", "experts", "grouped conv", "mixed groups"])
def test_every_layout_gains_by_its_own_inputs(name):
    form, granularity = LAYOUTS[name]
    rng = np.random.default_rng(1)
    leaf = jnp.asarray(rng.normal(size=form.shape), jnp.float32)
    stack = int(np.prod(form.groups, dtype=int))
    moments = jnp.stack([problem(s, form.features, 1, 1.5)[1] for s in range(stack)])
    moments = moments.reshape(*form.groups, form.features, form.features)
    format = Format(3, granularity=granularity)
    found = awq_leaf(Task("w", form, format), leaf, moments, 8, 4)

    def total(values):
        d = wide(to_matrix(form, values - leaf))
        return float(np.sum(d * np.matmul(wide(moments), d)))

    assert total(found.decode()) < total(encode(leaf, format).decode())
    if isinstance(found, RescaledArray):
        assert found.multiplier.shape == multiplier_shape(form)
        for axis in form.outer_axes:
            assert found.multiplier.shape[axis] == form.shape[axis]
        for axis in form.kernel_axes:
            assert found.multiplier.shape[axis] == 1


def test_multipliers_of_grouped_convolutions_are_one_a_group():
    assert multiplier_shape(LAYOUTS["grouped conv"][0]) == (1, 1, 4, 2)
    assert multiplier_shape(LAYOUTS["mixed groups"][0]) == (1, 4, 6)
    assert multiplier_shape(LAYOUTS["layers"][0]) == (3, 8, 1)
    depthwise = MatrixForm((3, 3, 1, 4), (0, 1, 2), (3,), inner=4, kernel_axes=(0, 1))
    _, moment = problem(0, 9)
    leaf = jnp.asarray(np.random.default_rng(0).normal(size=depthwise.shape), jnp.float32)
    found = awq_leaf(Task("w", depthwise, Format(4)), leaf, jnp.stack([moment] * 4), 8, 1)
    # One channel a matrix has nothing to be finer than.
    assert not isinstance(found, RescaledArray)


def mlp(p, x):
    return jnp.tanh(x @ p["w0"]) @ p["w1"]


PARAMS = {"w0": problem(0)[0] / 8, "w1": problem(1, OUTPUTS, 4)[0]}


def inputs(seed, count=40):
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(FEATURES, FEATURES)) / 4
    return jnp.asarray(rng.normal(size=(count, FEATURES)) @ mix * np.exp(rng.normal(size=FEATURES)))


BATCHES = [inputs(3), inputs(3) ** 2]
FORMAT = Format(3, granularity=PerGroup(2))


@pytest.fixture(scope="module")
def quantized():
    return awq(mlp, PARAMS, BATCHES, FORMAT, exponents=8, clippings=4)


def test_a_model_is_quantized_layer_by_layer(quantized):
    x = np.concatenate(BATCHES).astype(np.float64)
    moment = lambda x: jnp.asarray(x.T @ x / len(x), jnp.float32)
    first = awq_leaf(Task("w0", FORM, FORMAT), PARAMS["w0"], moment(x), 8, 4)
    np.testing.assert_allclose(quantized.params["w0"].decode(), first.decode(), rtol=1e-5)
    report = quantized.leaves[0]
    size = error(PARAMS["w0"], 0 * PARAMS["w0"], moment(x))
    expected = error(PARAMS["w0"], first.decode(), moment(x)) / size
    np.testing.assert_allclose(report.output_error, expected, rtol=1e-3)
    assert report.bits == 8 * quantized.params["w0"].nbytes / PARAMS["w0"].size
    assert "rescaled by 16" in report.form
    hidden = np.tanh(x @ np.asarray(first.decode(), np.float64))
    task = Task("w1", MatrixForm((OUTPUTS, 4), (0,), (1,)), FORMAT)
    second = awq_leaf(task, PARAMS["w1"], moment(hidden), 8, 4)
    np.testing.assert_allclose(quantized.params["w1"].decode(), second.decode(), rtol=1e-4)


def test_the_quantized_model_runs_inside_jit_and_loses_less(quantized):
    x = jnp.concatenate(BATCHES)

    @jax.jit
    def run(params):
        return jnp.tanh(x @ jnp.asarray(params["w0"])) @ jnp.asarray(params["w1"])

    plain = {path: encode(leaf, FORMAT) for path, leaf in PARAMS.items()}
    lost = [float(jnp.mean((run(PARAMS) - run(p)) ** 2)) for p in (plain, quantized.params)]
    assert lost[1] < 0.8 * lost[0]


def test_it_goes_on_where_it_was_broken_off(tmp_path, quantized):
    passes = []

    def batches():
        passes.append(1)
        if len(passes) == 3:
            raise KeyboardInterrupt
        return BATCHES

    options = {"exponents": 8, "clippings": 4, "directory": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        awq(mlp, PARAMS, batches, FORMAT, **options)
    found = awq(mlp, PARAMS, batches, FORMAT, **options)
    jax.tree.map(np.testing.assert_array_equal, found.params, quantized.params)
    with pytest.raises(ValueError, match="another clippings"):
        awq(mlp, PARAMS, BATCHES, FORMAT, **{**options, "clippings": 5})


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_leaves_give_the_same(kind):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(kind,))
    weights, moment = problem()
    task = Task("w", FORM, FORMAT)
    placed = jax.device_put(weights, NamedSharding(mesh, P("x")))
    everywhere = jax.device_put(moment, NamedSharding(mesh, P()))
    found = awq_leaf(task, placed, everywhere, 8, 4)
    expected = awq_leaf(task, weights, moment, 8, 4)
    np.testing.assert_allclose(found.decode(), expected.decode(), rtol=1e-5)


@pytest.mark.parametrize("name", ["exponents", "clippings"])
def test_counts_are_checked(name):
    with pytest.raises(ValueError, match=f"{name} is 0"):
        awq(mlp, PARAMS, BATCHES, FORMAT, **{name: 0})
    # With the run-time type checks installed, the signature speaks first.
    with pytest.raises(TypeError, match=name):
        awq(mlp, PARAMS, BATCHES, FORMAT, **{name: 2.5})


def test_searches_are_pure_and_jit():
    weights, moment = problem()
    run = jax.jit(
        lambda w, h: search_exponents(w[None], h[None], jnp.round, np.arange(FEATURES), 4)
    )
    found = run(weights, moment)
    assert found.errors.shape == (4, 1)
    assert found.multiplier.shape == (1, FEATURES)
    layout = scale_layout(FORM, Format(4))
    scales = jnp.ones((3, 1, 1, OUTPUTS)) * jnp.array([1.0, 0.5, 0.25])[:, None, None, None]
    chosen = jax.jit(lambda *given: search_clipping(*given, None, layout, Format(4)))(
        weights[None], moment[None], scales
    )
    assert chosen.shape == (1, 1, OUTPUTS)
    assert set(np.unique(chosen)) <= {0, 1, 2}
