"""GPTQ: the paper's algorithm, on the matrices that layers really are."""

import itertools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcomp.arrays.elements import ELEMENTS, levels
from jaxcomp.model.matrices import MatrixForm
from jaxcomp.quantize.affine import encode, find_codes
from jaxcomp.quantize.formats import Format, GridFormat, PerChannel, PerGroup
from jaxcomp.quantize.post_training import gptq as gptq_file
from jaxcomp.quantize.post_training.gptq import gptq, gptq_leaf
from jaxcomp.quantize.post_training.gptq_matrix import gptq_matrix
from jaxcomp.quantize.post_training.round_to_nearest import round_to_nearest
from jaxcomp.quantize.post_training.walk import Task
from jaxcomp.quantize.scales import find_scales, spread_scales

FORMATS = {
    "int3": Format(3),
    "int2 affine groups": Format(2, symmetric=False, granularity=PerGroup(4)),
    "binary": Format(1, zero=False),
    "nf4 groups": GridFormat("nf4", PerGroup(4)),
    "mxfp4 of 4": GridFormat("float4_e2m1fn", PerGroup(4), scale_dtype="float8_e8m0fnu"),
}
FEATURES, OUTPUTS = 12, 5


def normal(*shape, seed=0):
    return jax.device_put(
        np.random.default_rng((seed, *shape)).normal(size=shape).astype(np.float32)
    )


def correlated(samples, features, seed=0):
    mix = normal(features, features, seed=99) / features**0.5
    return normal(samples, features, seed=seed) @ mix


def moment(x):
    x = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    return jnp.asarray(x.T @ x / len(x), jnp.float32)


def spread(weight, format):
    return spread_scales(find_scales(weight, format), weight.shape, format)


def solve(weight, second_moment, format, **options):
    scale, zero_point, _ = spread(weight, format)
    return gptq_matrix(weight, second_moment, scale, zero_point, format, **options)


def error(weight, values, second_moment):
    change = np.asarray(values, np.float64) - np.asarray(weight, np.float64)
    return np.einsum("io,ij,jo->o", change, np.asarray(second_moment, np.float64), change)


def task_of(shape, format):
    return Task("w", MatrixForm(shape, (0,), (1,)), format)


# The algorithm, against one written down from the paper.


def level_table(format, scale, zero_point):
    """What each code stands for: ``(codes, ...)`` in float64."""
    if isinstance(format, GridFormat):
        steps = np.asarray(levels(ELEMENTS[format.element]), np.float64)
    elif not format.zero:
        steps = 2.0 * np.arange(2**format.bits) - (2**format.bits - 1)
    else:
        steps = np.arange(2.0**format.bits)
        if format.symmetric:
            steps = np.where(steps == 0, np.nan, steps - 2 ** (format.bits - 1))
    steps = steps.reshape(-1, *[1] * np.ndim(scale))
    if zero_point is not None:
        steps = steps - np.asarray(zero_point, np.float64)
    return steps * np.asarray(scale, np.float64)


def literal(weight, second_moment, table, damping, order):
    """Column by column, the inverse updated after each (Frantar et al., 2022, equations 2, 3).

    Codes, and how far each weight was from falling to another level, in levels.
    """
    w = np.asarray(weight, np.float64).copy()
    h = np.asarray(second_moment, np.float64)
    inverse = np.linalg.inv(h + damping * np.mean(np.diag(h)) * np.eye(len(h)))
    walk = np.argsort(-np.diag(h), kind="stable") if order else np.arange(len(h))
    codes, margins = np.zeros(w.shape, int), np.zeros(w.shape)
    for i in walk:
        distance = np.abs(table[:, i] - w[i])
        codes[i] = np.nanargmin(distance, 0)
        two = np.sort(distance, 0)[:2]
        margins[i] = (two[1] - two[0]) / (two[1] + two[0])
        value = np.take_along_axis(table[:, i], codes[i][None], 0)[0]
        scaled = (w[i] - value) / inverse[i, i]
        w -= np.outer(inverse[:, i], scaled)
        inverse = inverse - np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
        inverse[i, :] = inverse[:, i] = 0
    return codes, margins, walk


def value_of(codes, table):
    return np.take_along_axis(table, np.asarray(codes, int)[None], 0)[0]


@pytest.mark.parametrize(("name", "order"), [*((name, True) for name in FORMATS), ("int3", False)])
def test_the_algorithm_of_the_paper(name, order):
    format, h = FORMATS[name], moment(correlated(60, FEATURES))
    for seed in range(4):
        weight = normal(FEATURES, OUTPUTS, seed=seed)
        scale, zero_point, _ = spread(weight, format)
        table = level_table(format, scale, zero_point)
        codes, margins, walk = literal(weight, h, table, 0.01, order)
        found = np.asarray(solve(weight, h, format, order=order))
        # An output may differ from where two levels were equally near for it on.
        for o in range(OUTPUTS):
            different = [i for i in walk if found[i, o] != codes[i, o]]
            assert not different or margins[different[0], o] < 1e-3
        mine, other = (error(weight, value_of(c, table), h).sum() for c in (found, codes))
        np.testing.assert_allclose(mine, other, rtol=1e-2)


@pytest.mark.parametrize("name", FORMATS)
def test_inputs_that_say_nothing_of_each_other_leave_nothing_to_correct(name):
    format = FORMATS[name]
    weight = normal(FEATURES, OUTPUTS)
    nearest, _ = find_codes(weight, find_scales(weight, format), format)
    for h in (jnp.eye(FEATURES), jnp.diag(jnp.arange(FEATURES, dtype=jnp.float32))):
        np.testing.assert_array_equal(solve(weight, h, format), nearest)
    np.testing.assert_array_equal(solve(weight, jnp.zeros((FEATURES,) * 2), format), nearest)


@given(seed=st.integers(0, 10**6), samples=st.integers(1, 40), dead=st.integers(0, 3))
def test_no_output_is_worse_than_rounded_to_nearest(seed, samples, dead):
    """However few samples there are, and whatever never occurs."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(samples, FEATURES)) @ rng.normal(size=(FEATURES, FEATURES))
    x[:, rng.permutation(FEATURES)[:dead]] = 0
    x *= 10.0 ** rng.integers(-6, 6)
    weight = jnp.asarray(rng.normal(size=(FEATURES, OUTPUTS)), jnp.float32)
    format, h = list(FORMATS.values())[seed % 3], moment(x)
    leaf = gptq_leaf(task_of(weight.shape, format), weight, h)
    nearest = encode(weight, format)
    mine, theirs = (error(weight, each.decode(), h) for each in (leaf, nearest))
    size = error(weight, 0 * weight, h)
    assert np.all(mine <= theirs + 1e-5 * size)
    np.testing.assert_array_equal(leaf.scale, nearest.scale)


def test_between_the_nearest_and_the_best_of_all_roundings():
    format = Format(2)
    steps = np.array(list(itertools.product((-1, 0, 1), repeat=4)), np.float64).T
    gaps = []
    for seed in range(40):
        weight, h = normal(4, 3, seed=seed), moment(correlated(9, 4, seed=seed))
        scale = np.asarray(find_scales(weight, format).scale, np.float64)
        best = np.min(
            [
                [error(weight[:, o : o + 1], s[:, None] * scale[0, o], h)[0] for s in steps.T]
                for o in range(3)
            ],
            axis=1,
        )
        leaf = gptq_leaf(task_of((4, 3), format), weight, h)
        mine = error(weight, leaf.decode(), h)
        nearest = error(weight, encode(weight, format).decode(), h)
        assert np.all(best <= mine * (1 + 1e-5) + 1e-9)
        gaps.append([mine.sum() - best.sum(), nearest.sum() - best.sum()])
    mine, nearest = np.sum(gaps, 0)
    assert mine < 0.5 * nearest


def test_blocks_and_units_change_nothing():
    format, h = FORMATS["int3"], moment(correlated(60, FEATURES))
    weight = normal(FEATURES, OUTPUTS)
    whole = solve(weight, h, format)
    for block_size in (1, 5):
        np.testing.assert_array_equal(solve(weight, h, format, block_size=block_size), whole)
    np.testing.assert_array_equal(solve(weight, h * 2.0**-40, format), whole)
    np.testing.assert_array_equal(solve(weight, h * 2.0**40, format), whole)


def test_with_an_order_it_does_not_matter_how_features_are_numbered():
    format, h = FORMATS["int3"], moment(correlated(60, FEATURES))
    weight = normal(FEATURES, OUTPUTS)
    turned = np.random.default_rng(0).permutation(FEATURES)
    found = solve(weight[turned], h[turned][:, turned], format)
    np.testing.assert_array_equal(found, solve(weight, h, format)[turned])
    plain = solve(weight[turned], h[turned][:, turned], format, order=False)
    assert np.any(plain != solve(weight, h, format, order=False)[turned])


def test_it_can_be_compiled_and_mapped():
    format, h = FORMATS["int2 affine groups"], moment(correlated(60, FEATURES))
    weights = normal(3, FEATURES, OUTPUTS)
    spreads = [spread(weight, format) for weight in weights]
    scale, zero_point = (jnp.stack([s[k] for s in spreads]) for k in (0, 1))

    def run(weight, scale, zero_point, damping):
        return gptq_matrix(weight, h, scale, zero_point, format, damping=damping)

    found = jax.jit(jax.vmap(run, in_axes=(0, 0, 0, None)))(weights, scale, zero_point, 0.01)
    for i in range(3):
        np.testing.assert_array_equal(found[i], run(weights[i], scale[i], zero_point[i], 0.01))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"weight": jnp.ones((3, 2)).at[0, 0].set(jnp.nan)}, ValueError, "weight has NaN"),
        ({"second_moment": jnp.full((3, 3), jnp.inf)}, ValueError, "second_moment has NaN or inf"),
        ({"second_moment": jnp.eye(2)}, ValueError, r"weight \(3, 2\) and second moment \(2, 2\)"),
        ({"scale": jnp.ones((2, 2))}, ValueError, r"scale .* does not broadcast|Incompatible"),
        ({"damping": -1.0}, ValueError, "damping is -1.0"),
        ({"block_size": 0}, ValueError, "block_size is 0"),
    ],
)
def test_bad_matrices(change, error, words):
    call = {"weight": jnp.ones((3, 2)), "second_moment": jnp.eye(3), "scale": jnp.ones(1)}
    with pytest.raises(error, match=words):
        gptq_matrix(**call | {"zero_point": None, "format": FORMATS["int3"]} | change)


# On models: the right moments reach the right matrices.

PARAMS = {"w0": normal(6, 8), "b0": normal(8), "w1": normal(8, 6, seed=1), "w2": normal(6, 8)}
BATCHES = [correlated(20, 6), correlated(20, 6, seed=1)]
FORMAT = Format(3, granularity=PerChannel((1,)))


def mlp(p, x):
    return jnp.sin(jax.nn.relu(x @ p["w0"] + p["b0"]) @ p["w1"]) @ p["w2"]


@pytest.fixture(scope="module")
def quantized():
    return gptq(mlp, PARAMS, BATCHES, FORMAT)


def assert_bits(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def assert_solved(values, weight, second_moment, group=None):
    """Values are those of 3 bits by the paper's algorithm, or in some outputs the nearest."""
    w, values = np.asarray(weight, np.float64), np.asarray(values, np.float64)
    size = group or len(w)
    scale = np.repeat(np.abs(w).reshape(-1, size, w.shape[1]).max(1) / 3, size, 0)
    table = np.stack([step * scale for step in (-3, -2, -1, 0, 1, 2, 3)])
    codes, margins, walk = literal(w, second_moment, table, 0.01, True)
    nearest = np.argmin(np.abs(table - w), 0)
    errors = [error(w, value_of(c, table), second_moment) for c in (codes, nearest)]
    found = np.round(values / scale).astype(int) + 3
    np.testing.assert_allclose(values, value_of(found, table), rtol=1e-5, atol=1e-6)
    for o in range(w.shape[1]):
        if np.isclose(errors[0][o], errors[1][o], rtol=1e-3) and np.all(found == nearest):
            continue
        expected = codes if errors[0][o] < errors[1][o] else nearest
        different = [i for i in walk if found[i, o] != expected[i, o]]
        assert not different or margins[different[0], o] < 1e-3


def test_each_layer_is_rounded_by_what_it_sees(quantized):
    x = jnp.concatenate(BATCHES)
    for sequential in (True, False):
        found = quantized
        if not sequential:
            found = gptq(mlp, PARAMS, BATCHES, FORMAT, sequential=False, at_once=3)
        first = found.params["w0"].decode() if sequential else PARAMS["w0"]
        assert_solved(found.params["w0"].decode(), PARAMS["w0"], moment(x))
        hidden = jax.nn.relu(x @ first + PARAMS["b0"])
        assert_solved(found.params["w1"].decode(), PARAMS["w1"], moment(hidden))
    assert found.params["b0"] is PARAMS["b0"]


def test_the_outputs_are_nearer_than_those_rounded_to_nearest(quantized):
    nearest = round_to_nearest(mlp, PARAMS, BATCHES, FORMAT)
    held = correlated(200, 6, seed=7)
    goal = mlp(PARAMS, held)
    errors = [
        float(jnp.mean((mlp(p, held) - goal) ** 2)) for p in (quantized.params, nearest.params)
    ]
    assert errors[0] < 0.9 * errors[1]
    assert all(
        a.output_error < b.output_error and a.nbytes == b.nbytes
        for a, b in zip(quantized.leaves, nearest.leaves, strict=True)
    )


def test_leaves_of_one_shape_are_one_program(quantized):
    shapes = {leaf.shape for leaf in quantized.leaves}
    assert len(shapes) == 2 < len(quantized.leaves)
    gptq_file._round_leaf.clear_cache()
    for damping in (0.02, 0.03):
        gptq(mlp, PARAMS, BATCHES[:1], FORMAT, damping=damping, at_once=3)
        assert gptq_file._round_leaf._cache_size() == len(shapes)


def patches(x, size, stride, padding):
    """What each position of a window covers: (positions, height, width, channels)."""
    x = np.pad(np.asarray(x, np.float64), ((0, 0), padding, padding, (0, 0)))
    rows = range(0, x.shape[1] - size + 1, stride)
    return np.stack([x[:, i : i + size, j : j + size] for i in rows for j in rows], 1).reshape(
        -1, size, size, x.shape[-1]
    )


def test_a_strided_padded_grouped_convolution_is_its_patches():
    kernel, x = normal(3, 3, 2, 6), normal(2, 7, 7, 4)

    def conv(p, x):
        return lax.conv_general_dilated(
            x,
            p["k"],
            (2, 2),
            ((1, 0), (1, 0)),
            feature_group_count=2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    rules = Format(3, granularity=PerGroup(6))
    found = gptq(conv, {"k": kernel}, [x], rules).params["k"].decode()
    seen = patches(x, 3, 2, (1, 0))
    for group in range(2):
        x_of = seen[..., 2 * group : 2 * group + 2].reshape(len(seen), -1)
        mine = np.s_[..., 3 * group : 3 * group + 3]
        assert_solved(found[mine].reshape(18, 3), kernel[mine].reshape(18, 3), moment(x_of), 6)


def test_stacks_experts_and_attention_kernels():
    params = {"stack": normal(3, 4, 4), "experts": normal(4, 2, 4), "out": normal(2, 4, 3)}

    def model(p, x):
        x = lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, p["stack"])[0]
        heads = jnp.einsum("bi,ieo->beo", x, p["experts"])
        return jnp.einsum("bhk,hkd->bd", heads, p["out"])

    x = correlated(30, 4)
    rules = {"out": Format(3, granularity=PerGroup(8)), "*": Format(3, granularity=PerGroup(2))}
    found = gptq(model, params, [x], rules, sequential=False, at_once=3).params
    stack, experts, out = (np.asarray(found[path]) for path in ("stack", "experts", "out"))
    hidden = [x]
    for w in params["stack"]:
        hidden.append(jnp.sin(hidden[-1] @ w))
    for i in range(3):
        assert_solved(stack[i], params["stack"][i], moment(hidden[i]), 2)
    for i in range(2):
        assert_solved(experts[:, i], params["experts"][:, i], moment(hidden[3]), 2)
    heads = jnp.einsum("bi,ieo->beo", hidden[3], params["experts"]).reshape(30, 8)
    assert_solved(out.reshape(8, 3), params["out"].reshape(8, 3), moment(heads))


def test_a_tied_embedding_and_one_that_is_not():
    params = {"embed": normal(9, 4), "other": normal(9, 4, seed=1)}
    model = lambda p, i: jnp.tanh(p["embed"][i] + p["other"][i]) @ p["embed"].T
    ids = jnp.arange(9)
    found = gptq(model, params, [ids], Format(3), at_once=2).params
    assert_bits(found["other"], encode(params["other"], Format(3)))
    hidden = jnp.tanh(params["embed"] + params["other"])
    assert_solved(found["embed"].decode().T, params["embed"].T, moment(hidden))


def test_bfloat16_weights():
    params = {"w": normal(6, 5).astype(jnp.bfloat16)}
    found = gptq(lambda p, x: x @ p["w"], params, BATCHES, FORMAT).params["w"]
    assert found.dtype == jnp.bfloat16
    h, weight = moment(jnp.concatenate(BATCHES)), params["w"].astype(jnp.float32)
    nearest = encode(params["w"], FORMAT).decode()
    assert error(weight, found.decode(), h).sum() < 0.9 * error(weight, nearest, h).sum()


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_weights_and_batches(kind, quantized):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(kind,))
    params = {
        "w0": jax.device_put(PARAMS["w0"], NamedSharding(mesh, P(None, "d"))),
        "b0": jax.device_put(PARAMS["b0"], NamedSharding(mesh, P("d"))),
    }
    batches = [jax.device_put(x, NamedSharding(mesh, P("d"))) for x in BATCHES]

    def model(p, x):
        if kind == AxisType.Explicit:
            p = {path: jax.sharding.reshard(leaf, P()) for path, leaf in p.items()}
        return jax.nn.relu(x @ p["w0"] + p["b0"])

    with jax.set_mesh(mesh):
        found = gptq(model, params, batches, FORMAT)
    assert_bits(found.params["w0"], quantized.params["w0"])
    assert found.params["w0"].scale.sharding == NamedSharding(mesh, P(None, "d"))


class Killed(Exception):
    pass


def killed_after(passes):
    left = [passes]

    def batches():
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return iter(BATCHES)

    return batches


def test_a_killed_walk_goes_on(tmp_path, quantized):
    where = tmp_path / "walk"
    with pytest.raises(Killed):
        gptq(mlp, PARAMS, killed_after(3), FORMAT, directory=where)
    assert len(os.listdir(where)) == 3
    resumed = gptq(mlp, PARAMS, killed_after(2), FORMAT, directory=where)
    assert_bits(resumed.params, quantized.params)
    assert resumed.leaves == quantized.leaves
    for change, words in [
        ({"order": False}, "another order: True, now False"),
        ({"damping": 0.1}, "another damping: 0.01, now 0.1"),
        ({"block_size": 4}, "another block_size: 128, now 4"),
    ]:
        with pytest.raises(ValueError, match=rf"{words}.*pass another directory"):
            gptq(mlp, PARAMS, BATCHES, FORMAT, directory=where, **change)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"batches": None}, TypeError, "batches is None|batches"),
        ({"batches": []}, ValueError, "batches is empty"),
        ({"batches": iter(BATCHES)}, TypeError, "can be read only once"),
        ({"damping": -0.1}, ValueError, "damping is -0.1"),
        ({"block_size": 0}, ValueError, "block_size is 0"),
        ({"params": PARAMS | {"w1": jnp.full((8, 6), jnp.nan)}}, ValueError, "w1: 48 of 48"),
        ({"rules": Format(3, granularity=PerGroup(4))}, ValueError, "w0: groups of 4 .*3 or 6"),
    ],
)
def test_bad_calls(change, error, words):
    call = {"params": PARAMS, "batches": BATCHES, "rules": FORMAT} | change
    params, batches, rules = (call.pop(name) for name in ("params", "batches", "rules"))
    with pytest.raises(error, match=words):
        gptq(mlp, params, batches, rules, **call)
