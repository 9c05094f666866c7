"""Which activations are rounded: names, patterns, and what is left out and why."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxcomp.quantize import Format, PerChannel, PerTensor, fake_quant
from jaxcomp.quantize.activations.bounds import Bounds
from jaxcomp.quantize.activations.dynamic import activations

X = jnp.linspace(-1.0, 2.0, 12).reshape(4, 3)
W = {name: jnp.linspace(-1.0, 1.5, 9).reshape(3, 3) for name in ("query", "key", "out")}
INT4 = Format(4, granularity=PerTensor())


def attend(params, x):
    with jax.named_scope("attend"):
        scores = jax.nn.softmax((x @ params["query"]) @ (x @ params["key"]).T)
        return x + (scores @ x) @ params["out"]


SCORES = ["attend/dot_general#3/lhs", "attend/dot_general#3/rhs"]
VALUES = ["attend/dot_general#4/lhs", "attend/dot_general#4/rhs"]


def test_every_data_operand_of_a_product_is_a_point():
    run = activations(attend, W, X, format=INT4)
    assert list(run.points) == ["query", "key", *SCORES, *VALUES, "out"]
    assert run.points["out"].shape == (4, 3)
    assert not run.left_out
    told = str(run)
    assert all(name in told for name in run.points)

    q = lambda x: fake_quant(x, INT4)
    scores = jax.nn.softmax(q(q(X) @ W["query"]) @ q((q(X) @ W["key"]).T))
    expected = X + q(q(scores) @ q(X)) @ W["out"]
    np.testing.assert_allclose(run(W, X), expected, rtol=1e-5, atol=1e-5)


def test_patterns_choose_among_the_products_and_rules_give_formats():
    run = activations(attend, W, X, format=INT4, points=["*/lhs", "out"])
    assert list(run.points) == [SCORES[0], VALUES[0], "out"]
    assert set(run.left_out) == {"query", "key", SCORES[1], VALUES[1]}
    assert run.left_out["query"] == "no pattern matches it"

    eight = Format(8, granularity=PerTensor())
    run = activations(attend, W, X, format=INT4, points={"out": eight, "key": None, "*": INT4})
    assert run.points["out"].format == eight
    assert run.points["query"].format == INT4
    assert run.left_out == {"key": "left alone by the rule 'key'"}
    assert "left out: key: left alone" in str(run)


def test_a_pattern_that_names_no_product_names_other_inputs():
    run = activations(attend, W, X, format=INT4, points="attend/add/*")
    assert list(run.points) == ["attend/add/0", "attend/add/1"]
    plain = attend(W, X) - X
    expected = fake_quant(X, INT4) + fake_quant(plain, INT4)
    np.testing.assert_allclose(run(W, X), expected, rtol=1e-5, atol=1e-5)
    both = activations(attend, W, X, format=INT4, points=["*", "attend/add/0"])
    assert {"query", "out", "attend/add/0"} <= set(both.points)


def test_products_that_cannot_be_rounded_say_why():
    def model(params, x, i):
        x = jax.lax.while_loop(lambda h: (h @ params["a"]).sum() > 1e9, lambda h: 2 * h, x)
        both = params["a"] @ params["b"]
        ints = i @ jnp.ones((3, 3), jnp.int32)
        unused = x @ params["c"]
        del unused
        return x @ both + ints

    params = {name: jnp.eye(3) for name in "abc"}
    run = activations(model, params, X, jnp.ones((4, 3), jnp.int32), format=INT4)
    assert list(run.points) == ["a#2"]
    reasons = {name: reason.split()[0:3] for name, reason in run.left_out.items()}
    assert reasons == {
        "a": ["it", "is", "used"],
        "dot_general#2": ["none", "of", "the"],
        "dot_general#3/lhs": ["int32", "is", "not"],
        "dot_general#4/lhs": ["no", "output", "depends"],
    }


def test_inside_shard_map_each_device_would_round_its_own_part():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))

    def model(params, x):
        inner = jax.shard_map(
            lambda x: x @ params["inner"], mesh=mesh, in_specs=P("data"), out_specs=P("data")
        )
        return inner(x) @ params["outer"]

    run = activations(model, {"inner": jnp.eye(3), "outer": jnp.eye(3)}, X, format=INT4)
    assert list(run.points) == ["outer"]
    (reason,) = run.left_out.values()
    assert "shard_map" in reason


@jax.custom_vjp
def _scaled(x, w):
    return x @ w


_scaled.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: (7 * g @ kept[1].T, kept[0].T @ g))


def test_a_derivative_of_its_own_is_not_lost_unless_the_point_is_named():
    def model(params, x):
        return _scaled(x, params["key"]) @ params["out"]

    def slope(run):
        return jax.grad(lambda x: run(W, x).sum())(X)

    run = activations(model, W, X, format=INT4)
    assert list(run.points) == ["out"]
    assert "whose own derivative would be lost" in run.left_out["key"]
    np.testing.assert_allclose(slope(run), slope(model), rtol=1e-5)
    named = activations(model, W, X, format=INT4, points=["key", "*"])
    assert list(named.points) == ["key", "out"]
    np.testing.assert_allclose(7 * slope(named), slope(model), rtol=1e-5)


def test_messages():
    with pytest.raises(ValueError, match=r"'quary' matches nothing; nearest: query"):
        activations(attend, W, X, format=INT4, points="quary")
    with pytest.raises(ValueError, match=r"'key' matches only what earlier patterns took"):
        activations(attend, W, X, format=INT4, points=["*", "key"])
    with pytest.raises(ValueError, match=r"query: .* gives axis 1 of shape \(4, 3\) scales"):
        activations(attend, W, X, format=Format(8))
    with pytest.raises(ValueError, match="names every axis"):
        activations(attend, W, X, format=Format(8, granularity=PerChannel((0, 1))))
    untyped = inspect.unwrap(activations)
    with pytest.raises(TypeError, match="format must be"):
        untyped(attend, W, X, format=8)
    with pytest.raises(TypeError, match="'out' must have a format or None"):
        untyped(attend, W, X, format=INT4, points={"out": 8})
    with pytest.raises(TypeError, match="points must be patterns, or formats by pattern, not 3"):
        untyped(attend, W, X, format=INT4, points=3)
    with pytest.raises(TypeError, match="apply_fn must be a function"):
        untyped(None, W, X, format=INT4)
    with pytest.raises(ValueError, match="the function has no product"):
        activations(lambda p, x: p["out"] + x[:3], W, X, format=INT4)
    with pytest.raises(ValueError, match=r"no activation to round: out: left alone"):
        activations(lambda p, x: x @ p["out"], W, X, format=INT4, points={"*": None})
    with pytest.raises(ValueError, match=r"'count' cannot be rounded: int32"):
        activations(
            lambda p, x: x @ p["count"] + jnp.eye(3) @ p["out"],
            {"count": jnp.ones((3, 3), jnp.int32), "out": jnp.eye(3)},
            jnp.ones((3, 3), jnp.int32),
            format=INT4,
            points="count",
        )


def test_messages_about_ranges():
    one = Bounds(-jnp.ones((1, 1)), jnp.ones((1, 1)))

    def model(params, x):
        return (x @ params["query"]) @ params["key"]

    def give(ranges):
        return activations(model, W, X, format=INT4, ranges=ranges)

    with pytest.raises(ValueError, match="there is none for 'key'"):
        give({"query": one})
    with pytest.raises(ValueError, match="'kee' is no point; nearest: key"):
        give({"query": one, "key": one, "kee": one})
    with pytest.raises(ValueError, match=r"'key' has shape \(\), but the point needs \(1, 1\)"):
        give({"query": one, "key": Bounds(-1.0, 1.0)})
    untyped = inspect.unwrap(activations)
    for ranges, message in (
        ({"query": one, "key": None}, r"'key' must be Bounds\(low, high\), not None"),
        ([one, one], "ranges must map names of points to Bounds"),
    ):
        with pytest.raises(TypeError, match=message):
            untyped(model, W, X, format=INT4, ranges=ranges)
    with pytest.raises(ValueError, match="'key' is not finite"):
        give({"query": one, "key": Bounds(one.low, one.high * jnp.nan)})


def test_inputs_that_lead_to_other_points_are_refused():
    def model(params, x):
        return x @ params["query"] if len(x) == 4 else x @ params["key"]

    run = activations(model, W, X, format=INT4)
    with pytest.raises(ValueError, match=r"(query|key): these inputs lead to other operations"):
        run(W, X[:2])
