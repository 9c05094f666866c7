"""Functions of smaller parameters: transformations, rules of their own, and refusals."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcomp import quantize
from jaxcomp.model import rewrite
from tests.model.cases import randomize
from tests.model.cutting import cut, difference

RNG = np.random.default_rng(0)
STAY = np.array([0, 2, 3, 7])
KEPT = {"a": (None, STAY), "b": (STAY,), "c": (STAY, None)}


def normal(*shape):
    return jax.device_put(RNG.normal(size=shape).astype(np.float32))


FULL = {"a": normal(6, 8), "b": normal(8), "c": normal(8, 4)}
MASK = np.isin(np.arange(8), STAY)


def narrow(full):
    """Without the channels that go; like `masked` in NumPy, so that nothing is compiled."""
    a, b, c = (np.asarray(full[name]) for name in "abc")
    return {"a": jnp.asarray(a[:, STAY]), "b": jnp.asarray(b[STAY]), "c": jnp.asarray(c[STAY])}


def masked(full):
    a, b, c = (np.asarray(full[name]) for name in "abc")
    kept = {"a": a * MASK, "b": b * MASK, "c": c * MASK[:, None]}
    return jax.tree.map(jnp.asarray, kept)


SMALL, MASKED = narrow(FULL), masked(FULL)
X = normal(5, 6)


def between(function):
    """A network with `function` on its hidden layer."""
    return lambda p, x: function(x @ p["a"] + p["b"]) @ p["c"]


@jax.custom_vjp
def straight_through(x):
    return jnp.round(x)


straight_through.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (g,))


@jax.custom_vjp
def clipped_gradient(x):
    return x * 1.0


clipped_gradient.defvjp(
    lambda x: (x, jnp.sign(x)), lambda sign, g: (jnp.clip(g, -0.1, 0.1) * sign,)
)


@jax.custom_jvp
def doubled_tangent(x):
    return jnp.sin(x)


doubled_tangent.defjvp(lambda x, t: (jnp.sin(x[0]), 2 * jnp.cos(x[0]) * t[0]))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def powered(x, n):
    return x**n


powered.defjvp(lambda n, x, t: (x[0] ** n, 7.0 * x[0] * t[0]))

FUNCTIONS = {
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "softplus": jax.nn.softplus,
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,
    "straight through": straight_through,
    "clipped gradient": clipped_gradient,
    "doubled tangent": doubled_tangent,
    "nondifferentiable argument": lambda h: powered(h, 2),
    "rule in a loop": lambda h: jax.lax.scan(
        lambda c, _: (clipped_gradient(c) * 0.5, c), h, None, length=3
    )[0],
    "rule under remat": jax.checkpoint(lambda h: doubled_tangent(jax.nn.relu(h))),
    "branch": lambda h: jax.lax.cond(h[0, 0] > 0, jnp.tanh, clipped_gradient, h),
    "switch": lambda h: jax.lax.switch(1, [jnp.tanh, jnp.sin, jnp.cos], h),
    "reverse scan": lambda h: jax.lax.scan(
        lambda c, w: (jnp.tanh(c) * w, c[0]), h, jnp.arange(1.0, 4.0), reverse=True
    )[0],
    "constant": lambda h: h * np.arange(8, dtype=np.float32) + np.ones((5, 8), np.float32),
    "iota": lambda h: h * jax.lax.broadcasted_iota(jnp.float32, (5, 8), 1),
    "padded and sliced": lambda h: jnp.pad(h, ((0, 0), (2, 2)))[:, 2:-2],
    "written in place": lambda h: h.at[0].set(h[1] * 2).at[2].add(h[3]),
    "looked up": lambda h: h[jnp.array([4, 3, 2, 1, 0])],
    "one row": lambda h: jax.lax.dynamic_slice_in_dim(h, h.shape[0] - 2, 1) + h,
    "updated": lambda h: jax.lax.dynamic_update_slice_in_dim(h, h[:1] * 3, 2, 0),
    "noise": lambda h: h * jax.random.bernoulli(jax.random.key(3), 0.5, h.shape),
    "double precision off": lambda h: h.astype(jnp.bfloat16).astype(jnp.float32),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_and_gradients_are_those_of_the_masked_model(name):
    model = between(FUNCTIONS[name])
    smaller = rewrite(model, FULL, KEPT)

    def loss(function):
        return jax.jit(jax.value_and_grad(lambda p: (function(p, X) ** 2).mean()))

    value, whole = loss(model)(MASKED)
    small_value, small_gradient = loss(smaller)(SMALL)
    assert difference(value, small_value) < 1e-6
    assert float(np.abs(small_gradient["a"]).max()) > 0
    assert difference(narrow(whole), small_gradient) < 1e-5


def test_the_rules_really_are_those_of_the_functions():
    smaller = rewrite(between(clipped_gradient), FULL, KEPT)
    gradient = jax.jit(jax.grad(lambda b: (smaller({**SMALL, "b": b}, X) * 100).sum()))(SMALL["b"])
    assert float(jnp.abs(gradient).max()) <= 5 * 0.1 + 1e-6
    forward = rewrite(between(doubled_tangent), FULL, KEPT)
    along = jax.jit(lambda b: jax.jvp(lambda b: forward({**SMALL, "b": b}, X), (b,), (b,))[1])
    a, b, c, x = (np.asarray(array) for array in (*SMALL.values(), X))
    assert difference((2 * np.cos(x @ a + b) * b) @ c, along(SMALL["b"])) < 1e-5


def test_other_batch_sizes_vmap_and_second_derivatives():
    smaller = rewrite(between(jnp.tanh), FULL, KEPT)
    more = normal(3, 11, 6)
    expected = between(jnp.tanh)(MASKED, more)
    assert difference(expected, jax.jit(jax.vmap(smaller, (None, 0)))(SMALL, more)) < 1e-6
    assert difference(expected[0], smaller(SMALL, more[0])) < 1e-6
    hessian = jax.jit(jax.hessian(lambda b: smaller({**SMALL, "b": b}, X).sum()))
    whole = jax.jit(jax.hessian(lambda b: between(jnp.tanh)({**MASKED, "b": b}, X).sum()))
    expected = np.asarray(whole(MASKED["b"]))[np.ix_(STAY, STAY)]
    assert difference(expected, hessian(SMALL["b"])) < 1e-5


def test_a_jitted_smaller_model_is_traced_once_for_each_shape():
    count = 0

    def model(p, x):
        nonlocal count
        count += 1
        return between(jax.nn.relu)(p, x)

    smaller = jax.jit(rewrite(model, FULL, KEPT))
    for rows in (5, 5, 7, 5, 7):
        smaller(SMALL, normal(rows, 6))
    assert count == 2


def test_slices_stay_slices():
    def model(p, x):
        return (jnp.tanh(x @ p["a"] + p["b"])[::2, 1::3] * 2) @ p["c"][:, ::2]

    x = normal(4, 9, 6)
    smaller = rewrite(model, FULL, KEPT)
    assert difference(model(MASKED, x), smaller(SMALL, x)) < 1e-6
    text = str(jax.make_jaxpr(smaller)(SMALL, x))
    assert text.count("slice") >= 3
    assert "gather" not in text


def test_a_function_that_closes_over_a_trace_is_read_anew_in_each():
    def outer(scale):
        smaller = rewrite(lambda p, x: scale * between(jnp.tanh)(p, x), FULL, KEPT)
        return smaller(SMALL, X)

    expected = between(jnp.tanh)(MASKED, X)
    for scale in (2.0, 3.0):
        assert difference(scale * expected, jax.jit(outer)(scale)) < 1e-6


def test_other_dtypes_and_compressed_leaves():
    smaller = rewrite(between(jnp.tanh), FULL, KEPT)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), SMALL)
    result = smaller(half, X.astype(jnp.bfloat16))
    assert result.dtype == jnp.bfloat16
    assert difference(between(jnp.tanh)(half, X.astype(jnp.bfloat16)), result) < 1e-2
    method = quantize.train(quantize.Format(8))
    packed = method.pack(SMALL, method.init(SMALL))
    expected = smaller(method.apply(SMALL, method.init(SMALL)), X)
    assert difference(expected, jax.jit(smaller)(packed, X)) < 1e-6


def test_sharded_parameters_and_batches_give_the_same():
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
    put = lambda array, *spec: jax.device_put(array, NamedSharding(mesh, P(*spec)))
    sharded = {
        "a": put(SMALL["a"], None, "model"),
        "b": put(SMALL["b"], "model"),
        "c": put(SMALL["c"], "model", None),
    }
    x = normal(8, 6)

    def model(p, x):
        h = jax.nn.relu(x @ p["a"] + p["b"])
        h = jax.lax.with_sharding_constraint(h, NamedSharding(mesh, P("data", "model")))
        return h @ p["c"]

    result = jax.jit(rewrite(model, FULL, KEPT))(sharded, put(x, "data", None))
    assert difference(between(jax.nn.relu)(MASKED, x), result) < 1e-6


class Trained(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(8, (3, 3))(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(3)(x.mean((1, 2)))


def test_the_training_step_of_the_same_parameters_is_rewritten_too():
    model, x = Trained(), normal(2, 4, 4, 3)
    shapes = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), x)
    variables = randomize(shapes)
    pair = cut(functools.partial(model.apply, train=False), variables, (x,))

    def step(variables, x, key):
        return model.apply(variables, x, train=True, mutable=["batch_stats"], rngs={"dropout": key})

    key = jax.random.key(1)
    whole, updated = jax.jit(step)(pair.masked, x, key)
    small, smaller = jax.jit(rewrite(step, variables, pair.kept))(pair.small, x, key)
    assert difference(whole, small) < 1e-5
    stays = pair.kept["batch_stats/BatchNorm_0/mean"]
    means = [t["batch_stats"]["BatchNorm_0"]["mean"] for t in (updated, smaller)]
    assert 0 < len(stays[0]) < 8
    assert difference(means[0][stays[0]], means[1]) < 1e-5


def test_a_renormalized_width_is_a_narrower_layer_norm():
    class Normed(nn.Module):
        width: int

        @nn.compact
        def __call__(self, x):
            x = nn.LayerNorm(use_fast_variance=False)(nn.Dense(self.width)(x))
            x = nn.RMSNorm()(nn.Dense(self.width)(x))
            return nn.Dense(2)(jax.nn.softmax(x))

    variables = randomize(jax.eval_shape(Normed(8).init, jax.random.key(0), X))
    pair = cut(Normed(8).apply, variables, (X,), renormalize=True)
    widths = {len(pair.kept[f"params/Dense_{i}/kernel"][1]) for i in (0, 1)}
    assert max(widths) < 8
    stays = [pair.kept[f"params/Dense_{i}/kernel"][1] for i in (0, 1)]
    small = jax.tree.map(lambda leaf: leaf, pair.small)
    h = nn.LayerNorm(use_fast_variance=False)
    first = h.apply(
        {"params": small["params"]["LayerNorm_0"]}, nn.Dense(len(stays[0])).apply(
            {"params": small["params"]["Dense_0"]}, X)
    )  # fmt: skip
    second = nn.RMSNorm().apply(
        {"params": small["params"]["RMSNorm_0"]},
        nn.Dense(len(stays[1])).apply({"params": small["params"]["Dense_1"]}, first),
    )
    expected = nn.Dense(2).apply({"params": small["params"]["Dense_2"]}, jax.nn.softmax(second))
    assert difference(expected, jax.jit(pair.smaller)(pair.small, X)) < 1e-5
    assert any(group.note for group in pair.groups)


@pytest.mark.parametrize(
    ("function", "kept", "params", "words"),
    [
        (between(jnp.tanh), KEPT, FULL, r"a: shape \(6, 8\), but the smaller model has \(6, 4\)"),
        (between(jnp.tanh), KEPT, {"a": SMALL["a"]}, "is not the structure"),
        (between(jnp.tanh), {"a": (None, STAY)}, SMALL, "b axis 0 keeps other channels than a ax"),
        (between(lambda h: jnp.sort(h, 1)), KEPT, SMALL, "cannot be cut in this function: sort"),
        (between(jax.nn.softmax), KEPT, SMALL, "cannot be cut in this function: reduce_max"),
        (between(lambda h: jnp.tanh(h.reshape(5, 2, 4)).swapaxes(1, 2).reshape(5, 8)), KEPT, SMALL,
         "not whole units of"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(function, kept, params, words):
    with pytest.raises(ValueError, match=words):
        rewrite(function, FULL, kept)(params, X)
