"""Attention, recurrence and scanned layers of the zoo, with what can be cut derived by hand."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from tests.model.cases import (
    Case,
    dense_in,
    dense_out,
    group,
    linen,
    normal,
    randomize,
    tokens,
)


def softmax_attention(query, key, value, mask=None):
    """Of (batch, length, heads, size) arrays."""
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
    if mask is not None:
        logits = jnp.where(mask, logits, -1e9)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits), value)


class ViT(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (4, 4), (4, 4), name="patch")(x)
        n, _, _, width = x.shape
        x = x.reshape(n, -1, width)
        token = self.param("token", nn.initializers.zeros, (1, 1, width))
        x = jnp.concatenate([jnp.tile(token, (n, 1, 1)), x], 1)
        x = x + self.param("position", nn.initializers.zeros, (1, x.shape[1], width))
        y = nn.LayerNorm(name="attention_ln")(x)
        attention = nn.MultiHeadDotProductAttention(
            num_heads=3, qkv_features=12, out_features=width, name="attention"
        )
        x = x + attention(y, y)
        y = nn.gelu(nn.Dense(10, name="up")(nn.LayerNorm(name="mlp_ln")(x)))
        x = x + nn.Dense(width, name="down")(y)
        return nn.Dense(3, name="head")(nn.LayerNorm(name="head_ln")(x)[:, 0])


def vit() -> Case:
    def projected(axis: int, *names: str) -> str:
        name = "params/attention/{}/kernel[{}] params/attention/{}/bias[{}]"
        return " ".join(name.format(n, axis + 1, n, axis) for n in names)

    out = "params/attention/out/kernel"
    cuttable = {
        "heads": group(3, projected(0, "query", "key", "value"), f"{out}[0]"),
        "query and key size": group(4, projected(1, "query", "key")),
        "value size": group(4, projected(1, "value"), f"{out}[1]"),
        "hidden": group(10, dense_out("up"), dense_in("down")),
    }
    return linen(ViT(), (normal(2, 8, 8, 3),), cuttable)


class Bert(nn.Module):
    split: bool

    @nn.compact
    def __call__(self, ids):
        n, length = ids.shape
        x = nn.Embed(11, 8, name="token")(ids)
        x = x + nn.Embed(6, 8, name="position")(jnp.arange(length))
        x = nn.LayerNorm(name="embedding_ln")(x)
        x3 = nn.Dense(24, name="qkv")(x)
        if self.split:
            qkv = (part.reshape(n, length, 2, 4) for part in jnp.split(x3, 3, -1))
        else:
            x3 = x3.reshape(n, length, 3, 2, 4)
            qkv = (x3[:, :, i] for i in range(3))
        y = softmax_attention(*qkv).reshape(n, length, 8)
        x = nn.LayerNorm(name="attention_ln")(x + nn.Dense(8, name="out")(y))
        y = nn.Dense(8, name="down")(nn.gelu(nn.Dense(12, name="up")(x)))
        x = nn.LayerNorm(name="mlp_ln")(x + y)
        pooled = nn.tanh(nn.Dense(7, name="pooler")(x[:, 0]))
        return nn.Dense(3, name="head")(pooled)


def bert(split: bool) -> Case:
    cuttable = {
        "heads": group(2, dense_out("qkv"), dense_in("out")),
        "hidden": group(12, dense_out("up"), dense_in("down")),
        "pooled": group(7, dense_out("pooler"), dense_in("head")),
    }
    if split:
        cuttable["query and key size"] = group(4, dense_out("qkv"))
        cuttable["value size"] = group(4, dense_out("qkv"), dense_in("out"))
    else:
        # The one axis is 3 × heads × size: query, key and value have their size in common.
        cuttable["size"] = group(4, dense_out("qkv"), dense_in("out"))
    return linen(Bert(split), (tokens(2, 5, vocabulary=11),), cuttable)


def rotate(x, interleaved):
    """Rotary embedding of (batch, length, ..., size)."""
    size = x.shape[-1]
    angle = jnp.arange(x.shape[1])[:, None] / 100.0 ** (jnp.arange(0, size, 2) / size)
    angle = angle.reshape(x.shape[1], *(1,) * (x.ndim - 3), size // 2)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    if interleaved:
        pairs = x.reshape(*x.shape[:-1], size // 2, 2)
        a, b = pairs[..., 0], pairs[..., 1]
        return jnp.stack([a * cos - b * sin, a * sin + b * cos], -1).reshape(x.shape)
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


class Llama(nn.Module):
    interleaved: bool

    @nn.compact
    def __call__(self, ids):
        n, length = ids.shape
        embed = nn.Embed(11, 8, name="embed")
        dense = functools.partial(nn.Dense, use_bias=False)
        x = embed(ids)
        y = nn.RMSNorm(name="attention_norm")(x)
        causal = jnp.tril(jnp.ones((length, length), bool))
        query = dense(24, name="query")(y)
        key = rotate(dense(8, name="key")(y).reshape(n, length, 2, 4), self.interleaved)
        value = dense(8, name="value")(y).reshape(n, length, 2, 4)
        if self.interleaved:
            query = rotate(query.reshape(n, length, 6, 4), True)
            key, value = jnp.repeat(key, 3, 2), jnp.repeat(value, 3, 2)
            y = softmax_attention(query, key, value, causal)
        else:
            query = rotate(query.reshape(n, length, 2, 3, 4), False)
            logits = jnp.einsum("bqgrd,bkgd->bgrqk", query, key) / 2
            weights = jax.nn.softmax(jnp.where(causal, logits, -1e9))
            y = jnp.einsum("bgrqk,bkgd->bqgrd", weights, value)
        x = x + dense(8, name="out")(y.reshape(n, length, 24))
        y = nn.RMSNorm(name="mlp_norm")(x)
        y = nn.silu(dense(10, name="gate")(y)) * dense(10, name="up")(y)
        x = x + dense(8, name="down")(y)
        return embed.attend(nn.RMSNorm(name="head_norm")(x))


def llama(interleaved: bool) -> Case:
    def made(*names: str) -> str:
        return " ".join(f"params/{name}/kernel[1]" for name in names)

    cuttable = {
        "key heads": group(2, made("query", "key", "value"), dense_in("out")),
        "queries of each": group(3, made("query"), dense_in("out")),
        "rotated pairs": group(2, made("query", "key")),
        "value size": group(4, made("value"), dense_in("out")),
        "hidden": group(10, made("gate", "up"), dense_in("down")),
    }
    return linen(Llama(interleaved), (tokens(2, 5, vocabulary=11),), cuttable)


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.sigmoid(nn.Dense(10, name="up")(x))
        return x + nn.Dense(x.shape[-1], name="down")(y), None


class Scanned(nn.Module):
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(7, name="stem")(x)
        block = nn.remat(Residual, prevent_cse=False) if self.remat else Residual
        layers = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = layers(name="layers")(x, None)
        return nn.Dense(3, name="head")(x)


def scanned(remat: bool = False) -> Case:
    layers = "params/layers/up/kernel[{}] params/layers/down/kernel[{}] params/layers/{}/bias[1]"
    cuttable = {
        "stream": group(7, dense_out("stem"), layers.format(1, 2, "down"), dense_in("head")),
        "hidden": group(10, layers.format(2, 1, "up")),
    }
    return linen(Scanned(remat), (normal(4, 5),), cuttable)


def plain_scan() -> Case:
    def apply(params, x):
        def layer(x, weights):
            y = jax.nn.softplus(x @ weights["up"] + weights["shift"])
            x = x + y @ weights["down"]
            return x, x.mean()

        x, means = jax.lax.scan(layer, x @ params["stem"], params["layers"])
        return x @ params["head"], means

    layers = {"up": (3, 6, 8), "shift": (3, 8), "down": (3, 8, 6)}
    shapes = {"stem": (5, 6), "head": (6, 2), "layers": layers}
    structs = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    # The mean over the stream is an output, so its width is a divisor that must stay.
    cuttable = {"hidden": group(8, "layers/up[2] layers/shift[1] layers/down[1]")}
    return Case(apply, randomize(structs), (normal(4, 5),), cuttable)


class Recurrent(nn.Module):
    cell: Callable[..., nn.RNNCellBase]

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(nn.RNN(self.cell(6, name="cell"))(x))


def gru() -> Case:
    ins = " ".join(f"params/cell/i{gate}/kernel[1] params/cell/i{gate}/bias[0]" for gate in "rzn")
    hidden = " ".join(f"params/cell/h{gate}/kernel[{axis}]" for gate in "rzn" for axis in (0, 1))
    state = group(6, ins, hidden, "params/cell/hn/bias[0]", dense_in("head"))
    return linen(Recurrent(nn.GRUCell), (normal(2, 4, 5),), {"state": state})


def lstm() -> Case:
    # This cell concatenates its four gates' kernels into one product and splits it again.
    ins = " ".join(f"params/cell/i{gate}/kernel[1]" for gate in "ifgo")
    hidden = " ".join(
        f"params/cell/h{gate}/kernel[0] params/cell/h{gate}/kernel[1] params/cell/h{gate}/bias[0]"
        for gate in "ifgo"
    )
    state = group(6, ins, hidden, dense_in("head"))
    return linen(Recurrent(nn.OptimizedLSTMCell), (normal(2, 4, 5),), {"state": state})


SEQUENCE: dict[str, Callable[[], Case]] = {
    "vit": vit,
    "bert split": lambda: bert(split=True),
    "bert sliced": lambda: bert(split=False),
    "llama half-split": lambda: llama(interleaved=False),
    "llama interleaved": lambda: llama(interleaved=True),
    "scanned layers": scanned,
    "scanned remat": lambda: scanned(remat=True),
    "plain scan": plain_scan,
    "gru": gru,
    "lstm": lstm,
}
