"""Uses of parameters: roles and exact positions, through everything that may stand in between."""

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxcomp.model.program import read
from jaxcomp.model.uses import find_uses

F32 = np.float32


def ones(*shape):
    return np.ones(shape, F32)


def seen(function, params, *inputs):
    """Every use in short: path, kind, roles and trips."""
    return [
        (use.path, use.kind, " ".join(use.roles), use.trips)
        for use in find_uses(read(function, params, *inputs))
    ]


DATA = ones(2, 3)


def roles(function, *shape, inputs: Any = DATA):
    """The roles at the only use of the only leaf."""
    ((_, kind, words, _),) = seen(lambda p, x: function(p["w"], x), {"w": ones(*shape)}, inputs)
    return kind, words


@pytest.mark.parametrize(
    ("function", "shape", "expected"),
    [
        (lambda w, x: x @ w, (3, 4), "input output"),
        (lambda w, x: x @ w.T, (4, 3), "output input"),
        (lambda w, x: w @ x.T, (4, 3), "output input"),
        (lambda w, x: x @ w.astype(jnp.bfloat16), (3, 4), "input output"),
        (lambda w, x: x @ w.reshape(3, 4), (3, 2, 2), "input output output"),
        (lambda w, x: x @ w.reshape(3, 4), (12,), "other"),
        (lambda w, x: x @ jnp.tile(w, (1, 2)), (3, 4), "input output"),
        (lambda w, x: x @ jnp.stack([w, jnp.ones((3, 4))], 1)[:, 0], (3, 4), "input output"),
        (lambda w, x: x.reshape(2, 1, 3) @ w, (2, 3, 4), "batch input output"),
        (lambda w, x: x @ w[1], (5, 3, 4), "stack input output"),
        (
            lambda w, x: x @ lax.dynamic_index_in_dim(w, 1, keepdims=False),
            (5, 3, 4),
            "stack input output",
        ),
        (lambda w, x: x @ (w / jnp.linalg.norm(w, axis=0)), (3, 4), "input output"),
        (lambda w, x: x @ jax.nn.softmax(w - w.mean(), 0), (3, 4), "input output"),
        (lambda w, x: x @ (w * np.tri(3, 4, dtype=F32)), (3, 4), "input output"),
        (lambda w, x: x @ jnp.where(w > 0, 1.0, -1.0), (3, 4), "input output"),
        (lambda w, x: x @ lax.stop_gradient(jnp.flip(w, 0)), (3, 4), "input output"),
        (lambda w, x: x @ jnp.diag(jnp.ones(3)) @ w, (3, 4), "input output"),
        (lambda w, x: x @ w.sum(0), (5, 3, 4), "other input output"),
        (lambda w, x: x @ jnp.pad(w, ((0, 0), (1, 2))), (3, 4), "input output"),
        (lambda w, x: jax.checkpoint(lambda w: x @ w)(w), (3, 4), "input output"),
        (lambda w, x: jax.jit(jax.jit(lambda w: x @ w))(w), (3, 4), "input output"),
        (lambda w, x: jnp.einsum("bi,ohi->boh", x, w), (4, 2, 3), "output output input"),
        (lambda w, x: jnp.einsum("bi,hid->bhd", x, w), (2, 3, 4), "output input output"),
        (lambda w, x: jax.nn.one_hot(jnp.int32(x[0]), 5) @ w, (5, 4), "input output"),
        (lambda w, x: lax.optimization_barrier((x, w))[1] + x, (3,), "output"),
        (lambda w, x: x @ jax.device_put(w), (3, 4), "input output"),
    ],
)
def test_what_stands_between_leaf_and_use(function, shape, expected):
    assert roles(function, *shape)[1] == expected


def test_a_weight_on_both_sides_of_one_operand_has_two_uses():
    found = seen(lambda p, x: x @ (p @ p.T), ones(3, 4), ones(2, 3))
    assert {words for _, _, words, _ in found} == {"input other", "output other"}

    def stacked(p, x):
        return x @ jnp.stack([p["a"], p["b"]])[1]

    assert [use[0] for use in seen(stacked, {"a": ones(3, 4), "b": ones(3, 4)}, DATA)] == ["b"]


IMAGE = ones(2, 6, 6, 4)


def convolve(w, x, spec=("NHWC", "HWIO", "NHWC"), groups=1):
    return lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=spec, feature_group_count=groups
    )


@pytest.mark.parametrize(
    ("function", "shape", "expected"),
    [
        (convolve, (3, 3, 4, 8), "kernel kernel input output"),
        (
            functools.partial(convolve, spec=("NHWC", "OIHW", "NHWC")),
            (8, 4, 3, 3),
            "output input kernel kernel",
        ),
        (functools.partial(convolve, groups=2), (3, 3, 2, 8), "kernel kernel input output"),
        (functools.partial(convolve, groups=4), (3, 3, 1, 4), "kernel kernel input output"),
        (
            lambda w, x: convolve(w.transpose(1, 2, 3, 0), x),
            (8, 3, 3, 4),
            "output kernel kernel input",
        ),
        (
            lambda w, x: lax.conv_transpose(x, w, (2, 2), "SAME"),
            (3, 3, 4, 8),
            "kernel kernel input output",
        ),
        (jax.vmap(convolve, (0, None)), (5, 3, 3, 4, 8), "output kernel kernel input output"),
    ],
)
def test_convolutions(function, shape, expected):
    assert roles(function, *shape, inputs=IMAGE) == ("conv", expected)


def test_a_convolution_of_many_models_keeps_their_axis_apart():
    images = ones(5, *IMAGE.shape)
    assert roles(jax.vmap(convolve), 5, 3, 3, 4, 8, inputs=images)[1] == (
        "batch kernel kernel input output"
    )
    depthwise = jax.vmap(functools.partial(convolve, groups=4))
    assert roles(depthwise, 5, 3, 3, 1, 8, inputs=images)[1] == "batch kernel kernel input output"


def test_vmapped_models_have_a_batch_axis():
    kind, words = roles(jax.vmap(lambda w, x: x @ w), 5, 3, 4, inputs=ones(5, 2, 3))
    assert (kind, words) == ("dot", "batch input output")


@pytest.mark.parametrize(
    ("function", "kind", "expected"),
    [
        (lambda w, x: w[x], "gather", "input output"),
        (lambda w, x: jnp.take(w, x, axis=1), "gather", "output input"),
        (lambda w, x: lax.dynamic_slice(w, (x[0], 0), (1, 4)), "gather", "input output"),
        (lambda w, x: w[jnp.arange(2)] + x, "elementwise", "other output"),
        (lambda w, x: w[:2] + x, "elementwise", "output output"),
        (lambda w, x: lax.sort(w + 0) * x[0], "other", "other other"),
        (lambda w, x: jnp.cumsum(w, 0) * x[0], "other", "other other"),
        (lambda w, x: (w, x), "other", "other other"),
        (lambda w, x: jnp.concatenate([w, jnp.float32(x)]), "other", "other other"),
    ],
)
def test_look_ups_and_the_rest(function, kind, expected):
    assert roles(
        function,
        5,
        4,
        inputs=np.zeros((2, 4), np.int32)[:, :4] if kind != "gather" else np.zeros(3, np.int32),
    ) == (kind, expected)


def test_other_uses_name_the_operation():
    def names(function):
        program = read(function, ones(4, 3), ones(4, 3))
        return [use.op.name for use in find_uses(program)]

    assert names(lambda w, x: jnp.cumsum(w, 0) * x) == ["cumsum"]
    assert names(lambda w, x: (w, x)) == ["output"]
    assert names(lambda w, x: jnp.linalg.qr(w)[0] * x) == ["qr"]


def test_a_leaf_that_only_dead_code_reads_has_no_use():
    def model(p, x):
        _ = x @ p["dead"]
        return x @ p["live"]

    params = {"dead": ones(3, 4), "live": ones(3, 4), "absent": ones(2)}
    assert [path for path, *_ in seen(model, params, ones(2, 3))] == ["live"]


def test_tied_weights_have_several_uses():
    def model(p, tokens):
        return p["embedding"][tokens] @ p["embedding"].T

    assert seen(model, {"embedding": ones(9, 4)}, np.zeros(3, np.int32)) == [
        ("embedding", "gather", "input output", 1),
        ("embedding", "dot", "output input", 1),
    ]


def test_straight_through_and_custom_rules():
    @jax.custom_jvp
    def rounded(w):
        return jnp.round(w)

    rounded.defjvp(lambda primals, tangents: (rounded(*primals), tangents[0]))

    @jax.custom_vjp
    def signed(w):
        return jnp.sign(w).T

    signed.defvjp(lambda w: (signed(w), None), lambda _, g: (g.T,))

    def model(p, x):
        return x @ rounded(p["a"]) + x @ signed(p["b"])

    assert seen(model, {"a": ones(3, 4), "b": ones(4, 3)}, ones(2, 3)) == [
        ("a", "dot", "input output", 1),
        ("b", "dot", "output input", 1),
    ]


def test_codes_and_scales_both_reach_the_product():
    def model(p, x):
        return x @ (p["codes"].astype(F32) * p["scale"])

    params = {"codes": np.ones((3, 4), np.int8), "scale": ones(1, 4)}
    assert seen(model, params, ones(2, 3)) == [
        ("codes", "dot", "input output", 1),
        ("scale", "dot", "other output", 1),
    ]


def test_low_rank_factors_multiplied_first():
    def model(p, x):
        return x @ (p["base"] + p["a"] @ p["b"])

    params = {"base": ones(3, 4), "a": ones(3, 2), "b": ones(2, 4)}
    assert sorted(seen(model, params, ones(5, 3))) == [
        ("a", "dot", "input other", 1),
        ("b", "dot", "other output", 1),
        ("base", "dot", "input output", 1),
    ]


def test_a_scan_over_layers_walks_the_stack():
    def model(p, x):
        def layer(h, leaf):
            return jnp.tanh(h @ leaf["kernel"] + leaf["bias"]) @ p["shared"], None

        return lax.scan(layer, x, {"kernel": p["kernel"], "bias": p["bias"]})[0]

    params = {"kernel": ones(5, 3, 4), "bias": ones(5, 4), "shared": ones(4, 3)}
    assert seen(model, params, ones(2, 3)) == [
        ("kernel", "dot", "stack input output", 5),
        ("bias", "elementwise", "stack output", 5),
        ("shared", "dot", "input output", 5),
    ]


def test_a_scan_that_only_prepares_weights_keeps_their_axes():
    def model(w, x):
        _, prepared = lax.scan(lambda c, leaf: (c, leaf.T * 2), 0, w)
        return jnp.einsum("bi,loi->blo", x, prepared)

    assert roles(lambda w, x: model(w, x), 5, 3, 4)[1] == "output input output"


def test_recurrent_networks():
    def model(p, x):
        def cell(h, xt):
            return jnp.tanh(h @ p["hidden"] + xt @ p["input"]), None

        return lax.scan(cell, jnp.broadcast_to(p["start"], (2, 4)), x)[0]

    params = {"hidden": ones(4, 4), "input": ones(3, 4), "start": ones(4)}
    assert sorted(seen(model, params, ones(7, 2, 3))) == [
        ("hidden", "dot", "input output", 7),
        ("input", "dot", "input output", 7),
        ("start", "other", "other", 1),
    ]


def test_weights_carried_around_a_loop_stay_weights():
    def model(p, x):
        def body(i, carry):
            w, h = carry
            return w, h @ w[i]

        return lax.fori_loop(0, 5, body, (p, x))[1]

    assert seen(model, ones(5, 3, 3), ones(2, 3)) == [("", "dot", "stack input output", 5)]


def test_a_carry_that_is_never_the_same_is_reported_and_not_guessed():
    def model(w, x):
        def body(carry, _):
            w, h = carry
            return (jnp.roll(w, 1, 0), h @ w), None

        return lax.scan(body, (w, x), None, 3)[0][1]

    # The rows move from turn to turn, the columns stay.
    assert seen(model, ones(40, 40), ones(2, 40)) == [("", "dot", "other output", 3)]


def test_while_loops_run_an_unknown_number_of_times():
    def model(p, x):
        def body(h):
            return jnp.tanh(h @ p["body"])

        return lax.while_loop(lambda h: (h @ p["test"]).sum() > 1, body, x)

    assert seen(model, {"body": ones(3, 3), "test": ones(3, 1)}, ones(2, 3)) == [
        ("test", "dot", "input output", None),
        ("body", "dot", "input output", None),
    ]


def test_branches():
    def model(p, x):
        return lax.cond(x.sum() > 0, lambda: x @ p["yes"], lambda: x @ p["no"].T)

    assert sorted(seen(model, {"yes": ones(3, 4), "no": ones(4, 3)}, ones(2, 3))) == [
        ("no", "dot", "output input", 1),
        ("yes", "dot", "input output", 1),
    ]


def test_a_branch_that_chooses_a_weight_by_the_data_is_a_use():
    def model(p, x):
        return x @ lax.cond(x.sum() > 0, lambda: p["yes"], lambda: p["no"])

    found = seen(model, {"yes": ones(3, 4), "no": ones(3, 4)}, ones(2, 3))
    assert sorted(found) == [("no", "other", "other other", 1), ("yes", "other", "other other", 1)]


def test_a_branch_that_chooses_a_weight_by_a_constant_is_followed():
    def model(p, x):
        index = jnp.argmax(jnp.array([1.0, 2.0]))
        return x @ lax.switch(index, [lambda: p["a"], lambda: p["b"].T])

    assert sorted(seen(model, {"a": ones(3, 4), "b": ones(4, 3)}, ones(2, 3))) == [
        ("a", "dot", "input output", 1),
        ("b", "dot", "output input", 1),
    ]


def mesh(*shape):
    return jax.make_mesh(shape, ("a", "b")[: len(shape)], axis_types=(AxisType.Auto,) * len(shape))


def test_sharded_functions():
    def local(w, x):
        return x @ lax.all_gather(w, "a", axis=0, tiled=True)

    model = jax.shard_map(
        local, mesh=mesh(4, 2), in_specs=(P("a"), P("b")), out_specs=P("b"), check_vma=False
    )
    (use,) = find_uses(read(model, ones(8, 6), ones(4, 8)))
    assert (use.roles, use.trips) == (("input", "output"), 8)
    assert use.axes[0] is not None
    assert use.axes[0].positions()[0].tolist() == list(range(8))


def test_a_shard_is_not_taken_for_the_whole():
    model = jax.shard_map(
        lambda w, x: x @ w, mesh=mesh(4), in_specs=(P(None, "a"), P()), out_specs=P(None, "a")
    )
    (use,) = find_uses(read(model, ones(3, 8), ones(2, 3)))
    assert use.roles == ("input", "output")
    assert use.axes[1] is None


def test_sharding_constraints_change_nothing():
    sharding = jax.sharding.NamedSharding(mesh(8), P("a"))

    def model(w, x):
        return x @ lax.with_sharding_constraint(w, sharding)

    assert roles(model, 8, 4, inputs=ones(2, 8))[1] == "input output"


# An array whose every element says where in the leaf it comes from; what does not is -1.


def _divisors(n):
    return [d for d in range(1, n + 1) if n % d == 0]


@st.composite
def steps(draw, shape):
    """One structural operation on an array of ``shape``, and the new shape."""
    rank = len(shape)
    kind = draw(
        st.sampled_from(
            ["transpose", "reshape", "slice", "rev", "concat", "pad", "expand", "split", "stride"]
        )
    )
    axis = draw(st.integers(0, rank - 1))
    size = shape[axis]
    if kind == "transpose":
        order = draw(st.permutations(range(rank)))
        return lambda w: w.transpose(order)
    if kind == "reshape":
        new, left = [], math.prod(shape)
        while left > 1 and len(new) < 3:
            new.append(draw(st.sampled_from(_divisors(left))))
            left //= new[-1]
        return lambda w: w.reshape(*new, left)
    if kind in {"slice", "stride"}:
        start = draw(st.integers(0, size - 1))
        stop = draw(st.integers(start + 1, size))
        step = draw(st.integers(1, 3)) if kind == "stride" else 1
        return lambda w: lax.slice_in_dim(w, start, stop, step, axis)
    if kind == "rev":
        return lambda w: jnp.flip(w, axis)
    if kind == "concat":
        before, after = draw(st.integers(0, 2)), draw(st.integers(0, 2))
        filler = lambda n: -np.ones([n if i == axis else s for i, s in enumerate(shape)], np.int32)
        return lambda w: jnp.concatenate([filler(before), w, filler(after)], axis)
    if kind == "pad":
        low, high = draw(st.integers(-1, 2)), draw(st.integers(0, 2))
        low = low if size > 1 else max(low, 0)
        pads = [(low, high, 0) if i == axis else (0, 0, 0) for i in range(rank)]
        return lambda w: lax.pad(w, np.int32(-1), pads)
    if kind == "split":
        parts = draw(st.sampled_from(_divisors(size)))
        which = draw(st.integers(0, parts - 1))
        return lambda w: jnp.split(w, parts, axis)[which]
    return lambda w: jnp.broadcast_to(jnp.expand_dims(w, axis), (*shape[:axis], 2, *shape[axis:]))


@st.composite
def chains(draw):
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=3)))
    chosen, now = [], shape
    for _ in range(draw(st.integers(1, 5))):
        if len(now) > 4 or math.prod(now) > 500:
            break
        step = draw(steps(now))
        chosen.append(step)
        now = jax.eval_shape(step, jax.ShapeDtypeStruct(now, np.int32)).shape
    return shape, lambda w: functools.reduce(lambda value, step: step(value), chosen, w)


def check_positions(shape, use, operand):
    """The positions that a use claims, against where the elements really are."""
    known = [(axis, m.positions()) for axis, m in enumerate(use.axes) if m is not None]
    reached = set()
    for steps_ in itertools.product(*(range(len(positions)) for _, (positions, _) in known)):
        index: list = [slice(None)] * operand.ndim
        for step, (_, (_, where)) in zip(steps_, known, strict=True):
            for operand_axis, at in where.items():
                before = 0 if isinstance(index[operand_axis], slice) else index[operand_axis]
                index[operand_axis] = before + at[step]
        found = operand[tuple(index)]
        elements = np.unravel_index(found[found >= 0], shape)
        for step, (axis, (positions, _)) in zip(steps_, known, strict=True):
            assert (elements[axis] == positions[step]).all()
        reached |= set(found[found >= 0].ravel().tolist())
    assert reached == set(operand[operand >= 0].ravel().tolist())


def test_what_lies_before_a_leaf_is_counted_once():
    def change(w):
        rows = jnp.concatenate([w, -jnp.ones((1, 2, 6), w.dtype)]).reshape(48)
        return jnp.concatenate([-jnp.ones(1, w.dtype), rows])

    operand = np.asarray(change(np.arange(36, dtype=np.int32).reshape(3, 2, 6)))
    (use,) = find_uses(read(lambda w, x: change(w) * x, np.zeros((3, 2, 6), np.int32), operand))
    assert all(axis is not None for axis in use.axes)
    check_positions((3, 2, 6), use, operand)


def test_what_shares_an_axis_with_unknown_positions_is_unknown():
    def change(w):
        row = -jnp.ones((1, 4), w.dtype)
        return jnp.flip(jnp.concatenate([w.reshape(2, 4), row]), 0)

    operand = np.asarray(change(np.arange(8, dtype=np.int32).reshape(4, 2)))
    (use,) = find_uses(read(lambda w, x: change(w) * x, np.zeros((4, 2), np.int32), operand))
    check_positions((4, 2), use, operand)


@given(chains())
@settings(max_examples=80)
def test_positions_are_where_the_elements_are(case):
    shape, change = case
    operand = np.asarray(change(np.arange(math.prod(shape), dtype=np.int32).reshape(shape)))
    if operand.size == 0 or (operand < 0).all():
        return
    found = find_uses(read(lambda w, x: change(w) * x, np.zeros(shape, np.int32), operand))
    assert len(found) == 1
    check_positions(shape, found[0], operand)


@pytest.mark.parametrize(
    ("shape", "change"),
    [
        ((6, 4), lambda w: w.reshape(2, 3, 2, 2).transpose(1, 0, 3, 2)),
        (
            (3, 8),
            lambda w: (
                w.reshape(3, 2, 4)[:, 1].reshape(2, 6).T.reshape(12)
                if False
                else w.reshape(3, 2, 4)[:, 1]
            ),
        ),
        ((3, 12), lambda w: jnp.split(w, 3, axis=1)[1].reshape(3, 2, 2)),
        ((2, 3, 4), lambda w: w.transpose(1, 0, 2).reshape(3, 8)[:, 4:]),
        ((5, 4), lambda w: jnp.concatenate([-jnp.ones((2, 4), jnp.int32), w])[2:]),
    ],
)
def test_every_axis_of_these_is_followed(shape, change):
    operand = np.asarray(change(np.arange(math.prod(shape), dtype=np.int32).reshape(shape)))
    (use,) = find_uses(read(lambda w, x: change(w) * x, np.zeros(shape, np.int32), operand))
    assert None not in use.axes
    check_positions(shape, use, operand)


def test_a_reshape_across_axes_that_do_not_fit_gives_up_only_those():
    def change(w):
        return w.reshape(3, 2, 5)

    (use,) = find_uses(read(lambda w, x: change(w) * x, ones(2, 3, 5), ones(3, 2, 5)))
    assert use.roles == ("other", "other", "output")
    assert use.axes[:2] == (None, None)
