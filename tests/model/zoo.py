"""The zoo: small networks of every kind, each with what can be cut from it derived by hand."""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
from flax import nnx

from tests.model.cases import Case, Group, dense_in, dense_out, group, linen, normal, randomize
from tests.model.zoo_sequence import SEQUENCE
from tests.model.zoo_vision import VISION


class Mlp(nn.Module):
    activation: Callable[[Any], Any] = nn.relu
    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        x = self.activation(nn.Dense(8, dtype=self.dtype, name="first")(x))
        x = self.activation(nn.Dense(5, dtype=self.dtype, name="second")(x))
        return nn.Dense(3, dtype=self.dtype, name="head")(x)


def mlp_groups() -> dict[str, Group]:
    return {
        "first": group(8, dense_out("first"), dense_in("second")),
        "second": group(5, dense_out("second"), dense_in("head")),
    }


def mlp(activation: Callable[[Any], Any] = nn.relu, dtype: Any = None, **kwargs: Any) -> Case:
    return linen(Mlp(activation, dtype), (normal(4, 6),), mlp_groups(), **kwargs)


def wrapped(transform: Callable[[Any], Any]) -> Case:
    case = mlp(nn.sigmoid)
    return case._replace(apply_fn=transform(case.apply_fn))


def jit_inside(apply_fn: Any) -> Any:
    double = jax.jit(lambda y: y + y)
    return lambda params, x: double(jax.jit(apply_fn)(params, x))


def by_example(apply_fn: Any) -> Any:
    return lambda params, x: jax.vmap(lambda row: apply_fn(params, row))(x)


class Glu(nn.Module):
    @nn.compact
    def __call__(self, x):
        value, gate = jnp.split(nn.Dense(14, name="first")(x), 2, -1)
        return nn.Dense(3, name="head")(value * nn.sigmoid(gate))


def glu() -> Case:
    # Value i and gate i, at i and 7 + i, are one unit.
    return linen(Glu(), (normal(4, 6),), {"pairs": group(7, dense_out("first"), dense_in("head"))})


class Uneven(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(10, name="first")(x))
        left, right = jnp.split(x, [4], -1)
        return nn.Dense(3, name="left")(left), nn.Dense(2, name="right")(right)


def uneven_split() -> Case:
    cuttable = {
        "left": group(4, dense_out("first"), dense_in("left")),
        "right": group(6, dense_out("first"), dense_in("right")),
    }
    return linen(Uneven(), (normal(4, 6),), cuttable)


class TwoHeads(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(8, name="trunk")(x))
        return {"policy": nn.Dense(3, name="policy")(x), "value": nn.Dense(1, name="value")(x)}


def two_heads() -> Case:
    trunk = group(8, dense_out("trunk"), dense_in("policy", "value"))
    return linen(TwoHeads(), (normal(4, 6),), {"trunk": trunk})


class Dropped(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dropout(0.5, deterministic=False)(nn.relu(nn.Dense(16, name="first")(x)))
        return nn.Dense(3, name="head")(x)


def dropout() -> Case:
    model, x = Dropped(), normal(4, 6)

    def apply(params, x, key):
        return model.apply(params, x, rngs={"dropout": key})

    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    params = randomize(jax.eval_shape(model.init, keys, x))
    hidden = group(16, dense_out("first"), dense_in("head"))
    return Case(apply, params, (x, jax.random.key(2)), {"hidden": hidden})


class NnxCnn(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(3, 6, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(6, use_running_average=True, rngs=rngs)
        self.dense = nnx.Linear(6, 5, rngs=rngs)
        self.head = nnx.Linear(5, 2, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x))).mean((1, 2))
        return self.head(nnx.relu(self.dense(x)))


def nnx_cnn() -> Case:
    graph, state = nnx.split(nnx.eval_shape(lambda: NnxCnn(nnx.Rngs(0))))

    def apply(state, x):
        return nnx.merge(graph, state)(x)

    stats = "norm/scale[0] norm/bias[0] norm/mean[0] norm/var[0]"
    cuttable = {
        "conv": group(6, "conv/kernel[3] conv/bias[0]", stats, "dense/kernel[0]"),
        "dense": group(5, "dense/kernel[1] dense/bias[0] head/kernel[0]"),
    }
    return Case(apply, randomize(state), (normal(2, 6, 6, 3),), cuttable)


class NnxMlp(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(6, 8, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.gelu(self.first(x)))


def nnx_mlp() -> Case:
    graph, state = nnx.split(nnx.eval_shape(lambda: NnxMlp(nnx.Rngs(0))))

    def apply(state, x):
        return nnx.merge(graph, state)(x)

    hidden = group(8, "first/kernel[1] first/bias[0] head/kernel[0]")
    return Case(apply, randomize(state), (normal(4, 6),), {"hidden": hidden})


def equinox_mlp() -> Case:
    make = functools.partial(eqx.nn.MLP, 6, 3, 8, 2, jax.nn.softplus)
    model = eqx.filter_eval_shape(make, key=jax.random.key(0))
    arrays, static = eqx.partition(model, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))

    def apply(arrays, x):
        return jax.vmap(eqx.combine(arrays, static))(x)

    # Equinox stores (out, in).
    cuttable = {
        "first": group(8, "layers/0/weight[0] layers/0/bias[0] layers/1/weight[1]"),
        "second": group(8, "layers/1/weight[0] layers/1/bias[0] layers/2/weight[1]"),
    }
    return Case(apply, randomize(arrays), (normal(4, 6),), cuttable)


def haiku_mlp() -> Case:
    model = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([8, 5, 3])(x)))
    x = normal(4, 6)
    names = [f"mlp/~/linear_{i}" for i in range(3)]
    cuttable = {
        "first": group(8, f"{names[0]}/w[1] {names[0]}/b[0] {names[1]}/w[0]"),
        "second": group(5, f"{names[1]}/w[1] {names[1]}/b[0] {names[2]}/w[0]"),
    }
    params = randomize(jax.eval_shape(model.init, jax.random.key(0), x))
    return Case(model.apply, params, (x,), cuttable)


def hand_written() -> Case:
    """Matrices stored transposed, an einsum of three, a scale a channel, a scalar, a leaf twice."""

    def apply(params, x, temperature):
        hidden = jnp.tanh(x @ params["in"].T + params["shift"]) * jnp.exp(params["log_scale"])
        mixed = jnp.einsum("bi,ijk,bk->bj", hidden, params["mix"], hidden)
        return (mixed / temperature) @ params["out"] + params["out"].sum(0), hidden[:, :2]

    params = {
        "in": normal(7, 4, seed=2),
        "shift": normal(7, seed=3),
        "log_scale": normal(7, seed=4),
        "mix": normal(7, 5, 7, seed=5) / 7,
        "out": normal(5, 3, seed=6),
    }
    # The first two channels of `hidden` leave the model, so two are fixed and five are free.
    free = group(5, "in[0] shift[0] log_scale[0] mix[0] mix[2]")
    cuttable = {"free": free, "mixed": group(5, "mix[1] out[0]")}
    return Case(apply, params, (normal(3, 4), jnp.float32(2.0)), cuttable)


def tied_autoencoder() -> Case:
    def apply(params, x):
        hidden = jax.nn.sigmoid(x @ params["w"] + params["shift"])
        return hidden @ params["w"].T + params["back"]

    params = {"w": normal(6, 8, seed=2), "shift": normal(8, seed=3), "back": normal(6, seed=4)}
    return Case(apply, params, (normal(4, 6),), {"code": group(8, "w[1] shift[0]")})


def branches() -> Case:
    def apply(params, x, which):
        stem = jax.nn.relu(x @ params["stem"])
        middle = jax.lax.cond(
            which > 0,
            lambda y: jnp.tanh(y @ params["left"]),
            lambda y: jax.nn.sigmoid(y @ params["right"]),
            stem,
        )
        return middle @ params["head"]

    params = {
        "stem": normal(4, 6, seed=2),
        "left": normal(6, 7, seed=3),
        "right": normal(6, 7, seed=4),
        "head": normal(7, 3, seed=5),
    }
    cuttable = {
        "stem": group(6, "stem[1] left[0] right[0]"),
        "middle": group(7, "left[1] right[1] head[0]"),
    }
    return Case(apply, params, (normal(3, 4), jnp.int32(1)), cuttable)


def loop() -> Case:
    """One layer, run until its counter says stop."""

    def apply(params, x, turns):
        def step(state):
            i, h = state
            return i + 1, jnp.tanh(h @ params["again"] + x @ params["in"] + params["shift"])

        start = jnp.int32(0), jnp.zeros((x.shape[0], params["again"].shape[0]))
        _, h = jax.lax.while_loop(lambda state: state[0] < turns, step, start)
        return h @ params["head"]

    params = {
        "in": normal(4, 6, seed=2),
        "again": normal(6, 6, seed=3) / 3,
        "shift": normal(6, seed=4),
        "head": normal(6, 3, seed=5),
    }
    state = group(6, "in[1] again[0] again[1] shift[0] head[0]")
    return Case(apply, params, (normal(3, 4), jnp.int32(3)), {"state": state})


def mixing(mix: Callable[[Any], Any]) -> Case:
    """A hidden layer whose channels see each other, so that its width must stay; then one free."""

    def apply(params, x):
        hidden = mix(x @ params["first"])
        return jax.nn.relu(hidden @ params["second"]) @ params["head"]

    params = {
        "first": normal(4, 6, seed=2),
        "second": normal(6, 5, seed=3),
        "head": normal(5, 3, seed=4),
    }
    return Case(apply, params, (normal(3, 4),), {"free": group(5, "second[1] head[0]")})


def skipped_input() -> Case:
    def apply(params, x):
        hidden = jax.nn.softplus(x @ params["first"])
        return jnp.concatenate([x, hidden], -1) @ params["head"]

    params = {"first": normal(4, 6, seed=2), "head": normal(10, 3, seed=3)}
    # Of the head's ten rows the first four belong to the input.
    return Case(apply, params, (normal(3, 4),), {"hidden": group(6, "first[1] head[0]")})


ZOO: dict[str, Callable[[], Case]] = {
    "mlp": mlp,
    "mlp sigmoid": lambda: mlp(nn.sigmoid),
    "mlp softplus": lambda: mlp(nn.softplus),
    "mlp remat": lambda: wrapped(jax.checkpoint),
    "mlp bfloat16": lambda: mlp(nn.gelu, jnp.bfloat16, tolerance=2e-2),
    "mlp jit inside": lambda: wrapped(jit_inside),
    "mlp vmap": lambda: wrapped(by_example),
    "glu": glu,
    "uneven split": uneven_split,
    "two heads": two_heads,
    "dropout": dropout,
    "nnx mlp": nnx_mlp,
    "nnx cnn": nnx_cnn,
    "equinox mlp": equinox_mlp,
    "haiku mlp": haiku_mlp,
    "hand-written": hand_written,
    "tied autoencoder": tied_autoencoder,
    "branches": branches,
    "loop": loop,
    "softmax over channels": lambda: mixing(jax.nn.softmax),
    "sorted channels": lambda: mixing(lambda x: jnp.sort(x, -1)),
    "largest channel": lambda: mixing(lambda x: x - x.max(-1, keepdims=True)),
    "mean of channels": lambda: mixing(lambda x: x - x.mean(-1, keepdims=True)),
    "skipped input": skipped_input,
    **VISION,
    **SEQUENCE,
}
