"""AdaRound: near the best of all roundings, its gradient, and whole leaves in any layout."""

import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxcomp.model.matrices import MatrixForm, to_matrix
from jaxcomp.quantize import Format, PerChannel, PerGroup, encode
from jaxcomp.quantize.formats import GridFormat
from jaxcomp.quantize.post_training.adaround import adaround, adaround_leaf
from jaxcomp.quantize.post_training.adaround_matrix import (
    adaround_matrix,
    move_alone,
    neighbours,
    relaxed_gradient,
)
from jaxcomp.quantize.post_training.walk import Task
from jaxcomp.quantize.rounding import element_values
from jaxcomp.quantize.scales import find_scales, spread_scales

FEATURES, OUTPUTS = 10, 4
FORM = MatrixForm((FEATURES, OUTPUTS), (0,), (1,))


def problem(seed=0, features=FEATURES, outputs=OUTPUTS):
    """Weights, and the second moment of strongly correlated inputs."""
    rng = np.random.default_rng(seed)
    mix = 0.3 * np.eye(features) + rng.normal(size=(features, features)) / features**0.5
    x = rng.normal(size=(4 * features, features)) @ mix * np.exp(rng.normal(size=features) / 2)
    weights = rng.normal(size=(features, outputs))
    return jnp.asarray(weights, jnp.float32), jnp.asarray(x.T @ x / len(x), jnp.float32)


def wide(x):
    return np.asarray(x, np.float64)


def error(weights, values, moment):
    d = wide(weights) - wide(values)
    return np.sum(d * (wide(moment) @ d), axis=0)


def test_near_the_best_of_all_roundings():
    format, ratios = Format(3), []
    run = jax.jit(adaround_matrix, static_argnums=4)
    choices = np.array(list(itertools.product([0, 1], repeat=FEATURES))).T
    for seed in range(6):
        weights, moment = problem(seed)
        scale = np.abs(wide(weights)).max(0) / 3
        low = np.floor(wide(weights) / scale)
        best = []
        for j in range(OUTPUTS):
            every = np.clip(low[:, j : j + 1] + choices, -3, 3) * scale[j]
            best.append(error(weights[:, j : j + 1], every, moment).min())
        spread = jnp.broadcast_to(jnp.asarray(scale, jnp.float32), weights.shape)
        codes = run(weights, moment, spread, None, format)
        values = (np.asarray(codes, int) - 4) * scale
        rounded = np.clip(np.round(wide(weights) / scale), -3, 3) * scale
        got, nearest = error(weights, values, moment), error(weights, rounded, moment)
        assert np.all(got <= nearest * (1 + 1e-5))
        assert np.all(got >= np.array(best) * (1 - 1e-4))
        assert np.all(np.abs(values - wide(weights)) < scale * (1 + 1e-5))
        ratios += list((got - best) / (nearest - best + 1e-12))
    # Of what rounding to nearest loses against the best of all 1,024, little is left.
    assert np.mean(ratios) < 0.15


def test_the_gradient_is_that_of_finite_differences():
    rng = np.random.default_rng(0)
    v, residual, step = rng.normal(size=(3, 5, 3))
    step = np.abs(step)
    _, moment = problem(1, 5)
    penalty = np.abs(rng.normal(size=(5, 3)))

    def loss(v, beta):
        h = np.clip(1.2 / (1 + np.exp(-v)) - 0.1, 0, 1)
        d = residual - h * step
        return np.sum(d * (wide(moment) @ d)) + np.sum(penalty * (1 - np.abs(2 * h - 1) ** beta))

    v[0, 0], v[1, 1] = 9.0, -9.0
    for beta in (2.0, 5.0):
        expected = np.zeros_like(v)
        for at in np.ndindex(*v.shape):
            move = np.zeros_like(v)
            move[at] = 1e-5
            expected[at] = (loss(v + move, beta) - loss(v - move, beta)) / 2e-5
        arrays = (jnp.asarray(x, jnp.float32) for x in (v, residual, step))
        got = relaxed_gradient(*arrays, moment, jnp.asarray(penalty, jnp.float32), beta)
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)
        assert got[0, 0] == got[1, 1] == 0


def test_no_single_move_is_left_that_helps():
    weights, moment = problem(3)
    step = jnp.full(weights.shape, 0.5)
    low = jnp.floor(weights / step) * step
    up = move_alone(weights - low > 0.25, weights - low, step, moment)
    here = error(weights, low + jnp.where(up, step, 0), moment)
    for row in range(FEATURES):
        moved = error(weights, low + jnp.where(up.at[row].set(~up[row]), step, 0), moment)
        assert np.all(moved >= here * (1 - 1e-4))


FORMATS = [
    Format(3, symmetric=False, granularity=PerGroup(5)),
    Format(2, zero=False),
    GridFormat("float4_e2m1fn", PerGroup(5), scale_dtype="float8_e4m3fn", tensor_scale=True),
    GridFormat("nf4"),
]


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_the_neighbours_of_every_format(format):
    """A weight lies between them, and no level lies between."""
    weights, _ = problem(4)
    spread = spread_scales(find_scales(weights, format), weights.shape, format)
    found = jax.jit(neighbours, static_argnums=3)(weights, spread.scale, spread.zero_point, format)
    codes = jnp.arange(2**format.bits, dtype=jnp.uint8)[:, None, None]
    at = (jnp.broadcast_to(x, (len(codes), *weights.shape)) for x in (codes, spread.scale))
    levels = wide(element_values(*at, spread.zero_point, format))
    w, base, step = wide(weights), wide(found.base), wide(found.step)
    below = np.max(np.where(levels <= w, levels, -np.inf), axis=0)
    above = np.min(np.where(levels >= w, levels, np.inf), axis=0)
    inside = np.isfinite(below) & np.isfinite(above)
    assert inside.sum() > 30
    np.testing.assert_allclose(base[inside], below[inside], rtol=1e-6)
    np.testing.assert_allclose((base + step)[inside], above[inside], rtol=1e-5, atol=1e-6)
    assert np.all(step[~inside] == 0)


def test_neighbours_of_all_float8_numbers():
    values = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    table = np.unique(values[np.isfinite(values)])
    middle = jnp.asarray((table[1:] * 0.75 + table[:-1] * 0.25)[:, None])
    format = GridFormat("float8_e4m3fn")
    found = jax.jit(neighbours, static_argnums=3)(middle, jnp.ones(()), None, format)
    np.testing.assert_array_equal(found.base[:, 0], table[:-1])
    np.testing.assert_array_equal((found.base + found.step)[:, 0], table[1:])


@pytest.mark.parametrize("format", [FORMATS[0], FORMATS[2]], ids=str)
def test_leaves_gain_and_are_the_same_each_time(format):
    weights, moment = problem(5)
    task = Task("w", FORM, format)
    leaf = adaround_leaf(task, weights, moment)
    plain = encode(weights, format)
    assert jax.tree.structure(leaf) == jax.tree.structure(plain)
    np.testing.assert_array_equal(leaf.scale, plain.scale)
    assert (
        error(weights, leaf.decode(), moment).sum()
        < 0.9 * error(weights, plain.decode(), moment).sum()
    )
    jax.tree.map(np.testing.assert_array_equal, leaf, adaround_leaf(task, weights, moment))
    larger = adaround_leaf(task, weights, moment * 2.0**20)
    jax.tree.map(np.testing.assert_array_equal, leaf, larger)


def test_what_nothing_can_gain_is_to_nearest():
    weights, moment = problem(6)
    plain = encode(weights, FORMATS[0])
    task = Task("w", FORM, FORMATS[0])
    for inputs in (jnp.diag(jnp.diagonal(moment)), 0 * moment, None):
        leaf = adaround_leaf(task, weights, inputs)
        jax.tree.map(np.testing.assert_array_equal, leaf, plain)


def test_stacked_grouped_convolutions():
    form = MatrixForm((2, 3, 4, 6), (1, 2), (3,), (0,), inner=2, kernel_axes=(1,))
    leaf = jnp.asarray(np.random.default_rng(0).normal(size=form.shape), jnp.float32)
    moments = jnp.stack([problem(seed, 12, 1)[1] for seed in range(4)]).reshape(2, 2, 12, 12)
    format = Format(3, granularity=PerChannel((0, 3)))
    found = adaround_leaf(Task("w", form, format), leaf, moments, 100)

    def errors(values):
        d = wide(to_matrix(form, values - leaf))
        return np.sum(d * np.matmul(wide(moments), d), axis=-2)

    before, after = errors(encode(leaf, format).decode()), errors(found.decode())
    assert np.all(after <= before * (1 + 1e-5))
    assert after.sum() < 0.9 * before.sum()


def model(p, x):
    return jnp.tanh(x @ p["w0"]) @ p["w1"]


PARAMS = {"w0": problem(0)[0] / 4, "w1": problem(1, OUTPUTS, 3)[0]}


def test_a_model_layer_by_layer_and_on_from_its_files(tmp_path):
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(FEATURES, FEATURES))
    batches = [jnp.asarray(rng.normal(size=(30, FEATURES)) @ mix, jnp.float32) for _ in range(2)]
    passes = []

    def broken():
        passes.append(1)
        if len(passes) == 3:
            raise KeyboardInterrupt
        return batches

    options = {"steps": 50, "directory": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        adaround(model, PARAMS, broken, Format(3), **options)
    found = adaround(model, PARAMS, broken, Format(3), **options)
    x = wide(jnp.concatenate(batches))
    moment = jnp.asarray(x.T @ x / len(x), jnp.float32)
    first = adaround_leaf(
        Task("w0", FORM, Format(3, granularity=PerChannel((1,)))), PARAMS["w0"], moment, 50
    )
    np.testing.assert_array_equal(found.params["w0"].decode(), first.decode())
    size = error(PARAMS["w0"], 0 * PARAMS["w0"], moment).sum()
    lost = error(PARAMS["w0"], first.decode(), moment).sum()
    np.testing.assert_allclose(found.leaves[0].output_error, lost / size, rtol=1e-3)
    with pytest.raises(ValueError, match="another steps"):
        adaround(model, PARAMS, batches, Format(3), steps=51, directory=tmp_path)


def test_numbers_are_checked():
    for name, value in (("steps", -1), ("learning_rate", -0.1), ("penalty", float("nan"))):
        with pytest.raises(ValueError, match=name):
            adaround(model, PARAMS, [jnp.ones((2, FEATURES))], Format(3), **{name: value})
