"""Single steps that random networks are put together from; channels are always the last axis.

A step's maker draws what is free, and gives the shapes of its weights and a function of
(weights, *values). It gives ``None`` where the step does not fit the values' shapes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

Shape = tuple[int, ...]
Draw = Callable[[Any], Any]

ACTIVATIONS = {
    "relu": jax.nn.relu,
    "sigmoid": jax.nn.sigmoid,
    "softplus": jax.nn.softplus,
    "gelu": jax.nn.gelu,
    "tanh": jnp.tanh,
    "silu": jax.nn.silu,
    "cos": jnp.cos,
    "shifted": lambda x: (x + 1.5) * 0.5,
}
EPSILON = 1e-2


class Made(NamedTuple):
    """A step that was drawn: the shapes of its weights, and what it computes."""

    weights: dict[str, Shape]
    compute: Callable[..., Any]


def pick(draw: Draw, *options: Any) -> Any:
    return draw(st.sampled_from(options))


def width(draw: Draw) -> int:
    return pick(draw, 4, 2, 3, 5, 6, 8, 12)


def divisor(draw: Draw, size: int, least: int = 2) -> int | None:
    """A divisor of ``size`` of at least ``least``."""
    found = [n for n in range(least, size + 1) if size % n == 0]
    return pick(draw, *found) if found else None


def activate(draw: Draw, shape: Shape) -> Made:
    function = ACTIVATIONS[pick(draw, *ACTIVATIONS)]
    return Made({}, lambda w, x: function(x))


def dense(draw: Draw, shape: Shape) -> Made:
    c, features, kind = shape[-1], width(draw), pick(draw, "plain", "transposed", "einsum", "vmap")
    bias = {"bias": (features,)} if draw(st.booleans()) else {}

    def compute(w, x):
        if kind == "plain":
            y = x @ w["kernel"]
        elif kind == "transposed":
            y = x @ w["kernel"].T
        elif kind == "einsum":
            y = jnp.einsum("...i,oi->...o", x, w["kernel"])
        else:
            y = jax.vmap(lambda row: jax.jit(jnp.dot)(row, w["kernel"]))(x)
        return y + w["bias"] if bias else y

    kernel = (features, c) if kind in ("transposed", "einsum") else (c, features)
    return Made({"kernel": kernel, **bias}, compute)


def affine(draw: Draw, shape: Shape) -> Made:
    c, kind = shape[-1], pick(draw, "bias", "scale", "both", "place", "constant")
    if kind == "constant":
        constant = np.linspace(-1, 2, c, dtype=np.float32)
        return Made({}, lambda w, x: x + constant)
    if kind == "place":
        return Made({"place": shape[1:]}, lambda w, x: x + w["place"])
    names = {"bias": ["bias"], "scale": ["scale"], "both": ["scale", "bias"]}[kind]
    return Made(
        {name: (c,) for name in names}, lambda w, x: x * w.get("scale", 1) + w.get("bias", 0)
    )


def batch_norm(draw: Draw, shape: Shape) -> Made:
    def compute(w, x):
        return (x - w["mean"]) * jax.lax.rsqrt(w["var"] + EPSILON) * w["scale"] + w["bias"]

    return Made({name: (shape[-1],) for name in ("mean", "var", "scale", "bias")}, compute)


def channel_norm(draw: Draw, shape: Shape) -> Made:
    kind = pick(draw, "layer", "rms", "softmax")

    def compute(w, x):
        if kind == "softmax":
            return jax.nn.softmax(x) * w["scale"]
        x = x - x.mean(-1, keepdims=True) if kind == "layer" else x
        return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + EPSILON) * w["scale"]

    return Made({"scale": (shape[-1],)}, compute)


def group_norm(draw: Draw, shape: Shape) -> Made | None:
    groups = divisor(draw, shape[-1])
    if groups is None:
        return None

    def compute(w, x):
        y = x.reshape(*x.shape[:-1], groups, -1)
        axes = (*range(1, x.ndim - 1), x.ndim)
        y = y - y.mean(axes, keepdims=True)
        y = y * jax.lax.rsqrt((y**2).mean(axes, keepdims=True) + EPSILON)
        return y.reshape(x.shape) * w["scale"] + w["bias"]

    return Made({"scale": (shape[-1],), "bias": (shape[-1],)}, compute)


def convolve(draw: Draw, shape: Shape) -> Made:
    c, rank = shape[-1], len(shape) - 2
    groups = divisor(draw, c, least=1) or 1 if draw(st.booleans()) else 1
    features = groups * pick(draw, 2, 1, 3)
    size, stride = pick(draw, 3, 1, 2), pick(draw, 1, 1, 2)
    letters, first = "HW"[:rank], draw(st.booleans())
    layout = ("NC" + letters, "OI" + letters) if first else ("N" + letters + "C", letters + "IO")
    kernel = (features, c // groups) + (size,) * rank if first else None
    kernel = kernel or (size,) * rank + (c // groups, features)

    def compute(w, x):
        x = jnp.moveaxis(x, -1, 1) if first else x
        y = jax.lax.conv_general_dilated(
            x,
            w["kernel"],
            (stride,) * rank,
            "SAME",
            dimension_numbers=(*layout, layout[0]),
            feature_group_count=groups,
        )
        return jnp.moveaxis(y, 1, -1) if first else y

    return Made({"kernel": kernel}, compute)


def upsample(draw: Draw, shape: Shape) -> Made | None:
    n, height, sideways, c = shape
    kind, features = pick(draw, "nearest", "bilinear", "repeat", "transposed"), width(draw)
    if height > 4:
        return None
    if kind == "repeat":
        return Made({}, lambda w, x: x.repeat(2, 1).repeat(2, 2))
    if kind == "transposed":
        return Made(
            {"kernel": (2, 2, c, features)},
            lambda w, x: jax.lax.conv_transpose(x, w["kernel"], (2, 2), "SAME"),
        )
    doubled = (n, 2 * height, 2 * sideways, c)
    return Made({}, lambda w, x: jax.image.resize(x, doubled, kind))


def pool(draw: Draw, shape: Shape) -> Made:
    kind, window = pick(draw, "avg", "max", "global", "all"), (1, 2, 2, 1)

    def compute(w, x):
        if kind == "global":
            return x.mean((1, 2))
        if kind == "all":
            return x.reshape(x.shape[0], -1, x.shape[-1]).max(1)
        start, reducer = (0.0, jax.lax.add) if kind == "avg" else (-jnp.inf, jax.lax.max)
        y = jax.lax.reduce_window(x, start, reducer, window, window, "SAME")
        return y / 4 if kind == "avg" else y

    return Made({}, compute)


def reshape(draw: Draw, shape: Shape) -> Made:
    """To one axis, to a sequence, or a factor of the channels to their front."""
    kind, c = pick(draw, "flatten", "sequence", "unfold"), shape[-1]
    if kind == "flatten":
        return Made({}, lambda w, x: x.reshape(x.shape[0], -1))
    if kind == "sequence":
        return Made({}, lambda w, x: x.reshape(x.shape[0], -1, c))
    return Made({}, lambda w, x: x.swapaxes(-1, -2).reshape(x.shape[0], -1))


def choose(draw: Draw, shape: Shape) -> Made | None:
    """Some of the channels."""
    c = shape[-1]
    kind = pick(draw, "slice", "half", "stride", "reverse", "permute", "take", "roll")
    if c < 3:
        return None
    low = draw(st.integers(0, c - 2))
    high = draw(st.integers(low + 2, c))
    order = np.random.default_rng(low).permutation(c)
    functions = {
        "slice": lambda x: x[..., low:high],
        "half": lambda x: jnp.split(x, [c // 2], -1)[0],
        "stride": lambda x: x[..., low % 2 :: 2],
        "reverse": lambda x: x[..., ::-1],
        "permute": lambda x: x[..., order],
        "take": lambda x: x[..., np.array([low, low, high - 1])],
        "roll": lambda x: jnp.roll(x, low, -1),
    }
    return Made({}, lambda w, x: functions[kind](x))


def widen(draw: Draw, shape: Shape) -> Made | None:
    kind, low, high = pick(draw, "pad", "tile", "repeat", "twice"), *(pick(draw, 0, 1, 2),) * 2
    if shape[-1] > 12:
        return None
    functions = {
        "pad": lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(low, high + 1)]),
        "tile": lambda x: jnp.concatenate([x, x], -1),
        "repeat": lambda x: jnp.repeat(x, 2, -1),
        "twice": lambda x: jnp.concatenate([x, jnp.tanh(x)], -1),
    }
    return Made({}, lambda w, x: functions[kind](x))


def fold(draw: Draw, shape: Shape) -> Made | None:
    """Channels as factor × rest: shuffled, reduced over one of the two, or gated by a part."""
    factor = divisor(draw, shape[-1])
    if factor is None:
        return None
    kind = pick(draw, "shuffle", "shuffle", "sum", "mean", "max", "outer sum", "glu", "pick")

    def compute(w, x):
        y = x.reshape(*x.shape[:-1], factor, -1)
        if kind == "shuffle":
            return y.swapaxes(-1, -2).reshape(x.shape)
        if kind == "glu":
            a, b = jnp.split(y, [1], -2)
            return a[..., 0, :] * jax.nn.sigmoid(b.sum(-2))
        if kind == "pick":
            return y[..., -1, :] - y[..., 0, :]
        reducers = {"sum": y.sum, "mean": y.mean, "max": y.max}
        return y.sum(-1) if kind == "outer sum" else reducers[kind](-2)

    return Made({}, compute)


def gate(draw: Draw, shape: Shape) -> Made:
    """Squeeze-excite, over all places or each for itself; or by one number of all channels."""
    c, hidden, kind = shape[-1], width(draw), pick(draw, "se", "se", "sum", "mean")

    def compute(w, x):
        if kind in ("sum", "mean"):
            return x * jax.nn.sigmoid(getattr(x, kind)(-1, keepdims=True))
        s = x.mean(tuple(range(1, x.ndim - 1)), keepdims=True)
        return x * jax.nn.sigmoid(jax.nn.relu(s @ w["in"] + w["shift"]) @ w["out"])

    weights = {"in": (c, hidden), "shift": (hidden,), "out": (hidden, c)} if kind == "se" else {}
    return Made(weights, compute)


def layers(draw: Draw, shape: Shape) -> Made:
    """A residual block: stacked and scanned, rematerialized, or the same weights again."""
    c, hidden, kind = shape[-1], width(draw), pick(draw, "scan", "remat", "again", "tied")
    function = ACTIVATIONS[pick(draw, "sigmoid", "relu", "tanh")]

    def block(x, w):
        return x + function(x @ w["up"] + w["shift"]) @ w["down"]

    def compute(w, x):
        if kind == "scan":
            return jax.lax.scan(lambda h, layer: (block(h, layer), None), x, w)[0]
        if kind == "remat":
            return jax.checkpoint(block)(x, w)
        if kind == "tied":
            return x + function(x @ w["up"] + w["shift"]) @ w["up"].T
        return jax.lax.fori_loop(0, 2, lambda _, h: block(h, w), x)

    stack = (2,) if kind == "scan" else ()
    weights = {"up": (*stack, c, hidden), "shift": (*stack, hidden), "down": (*stack, hidden, c)}
    return Made({k: v for k, v in weights.items() if (kind, k) != ("tied", "down")}, compute)


def attend(draw: Draw, shape: Shape) -> Made:
    """Self-attention of a sequence; three matrices of three axes, or one and a split."""
    c, heads, size, fused = shape[-1], pick(draw, 2, 3), pick(draw, 2, 3), draw(st.booleans())

    def compute(w, x):
        if fused:
            parts = jnp.split(x @ w["qkv"], 3, -1)
            q, k, v = (part.reshape(*part.shape[:-1], heads, size) for part in parts)
        else:
            q, k, v = (jnp.einsum("ntc,chd->nthd", x, w[name]) for name in ("q", "k", "v"))
        weights = jax.nn.softmax(jnp.einsum("nqhd,nkhd->nhqk", q, k) / size**0.5)
        y = jnp.einsum("nhqk,nkhd->nqhd", weights, v)
        return x + y.reshape(*y.shape[:-2], -1) @ w["out"]

    one = {"qkv": (c, 3 * heads * size)}
    three = {name: (c, heads, size) for name in ("q", "k", "v")}
    return Made({**(one if fused else three), "out": (heads * size, c)}, compute)


def recur(draw: Draw, shape: Shape) -> Made:
    """A plain recurrent layer, or weights that mix places instead of channels."""
    c, hidden, kind = shape[-1], width(draw), pick(draw, "recurrent", "places", "last")

    def compute(w, x):
        if kind == "places":
            return x + jnp.tanh(x.swapaxes(1, 2) @ w["in"] @ w["again"]).swapaxes(1, 2)
        start = jnp.zeros((x.shape[0], hidden), x.dtype)

        def step(h, row):
            h = jnp.tanh(row @ w["in"] + h @ w["again"])
            return h, h

        last, every = jax.lax.scan(step, start, x.swapaxes(0, 1))
        return last if kind == "last" else every.swapaxes(0, 1)

    length = shape[1]
    mixing = {"in": (length, hidden), "again": (hidden, length)}
    return Made(
        mixing if kind == "places" else {"in": (c, hidden), "again": (hidden,) * 2}, compute
    )


def combine(draw: Draw, shape: Shape, other: Shape) -> Made | None:
    """Two values: element-wise, concatenated, one gating the other, projected, multiplied out."""
    kind = pick(draw, "add", "concat", "multiply", "gate", "outer", "maximum", "select")
    if shape[0] != other[0]:
        return None
    if kind == "outer" and len(shape) == len(other) == 2 and shape[1] * other[1] <= 40:
        return Made({}, lambda w, x, y: jnp.einsum("na,nb->nab", x, y).reshape(len(x), -1))
    if kind == "gate" and len(other) == 2:
        middle = (1,) * (len(shape) - 2)
        return Made(
            {"kernel": (other[-1], shape[-1])},
            lambda w, x, y: x * jnp.tanh(y @ w["kernel"]).reshape(len(x), *middle, -1),
        )
    if shape[:-1] != other[:-1]:
        return None
    if kind == "concat" and shape[-1] + other[-1] <= 24:
        return Made({}, lambda w, x, y: jnp.concatenate([x, y], -1))
    functions = {
        "multiply": jnp.multiply,
        "maximum": jnp.maximum,
        "select": lambda x, y: jnp.where(x > 0, x, y),
    }
    function = functions.get(kind, jnp.add)
    if shape == other:
        return Made({}, lambda w, x, y: function(x, y))
    kernel = (other[-1], shape[-1])
    return Made({"kernel": kernel}, lambda w, x, y: function(x, y @ w["kernel"]))


# What is named twice comes more often.
ANY_RANK = (
    dense,
    dense,
    activate,
    activate,
    affine,
    batch_norm,
    channel_norm,
    group_norm,
    choose,
    choose,
    widen,
    fold,
    fold,
    gate,
    layers,
    layers,
)
BY_RANK = {
    2: ANY_RANK,
    3: (*ANY_RANK, convolve, attend, attend, recur, reshape),
    4: (*ANY_RANK, convolve, convolve, convolve, convolve, upsample, pool, reshape),
}
