"""The networks that channels.py makes smaller, as anybody would write them in Linen."""

import flax.linen as nn
import jax.numpy as jnp


class Mlp(nn.Module):
    """Four hidden layers."""

    width: int

    @nn.compact
    def __call__(self, x):
        for _ in range(4):
            x = nn.relu(nn.Dense(self.width)(x))
        return nn.Dense(10)(x)


def conv(features: int, size: int, stride: int, name: str) -> nn.Conv:
    """PyTorch's padding, so that the twins agree: at stride 2, `SAME` would begin a pixel later."""
    pad = (size // 2, size // 2)
    window = (size, size)
    return nn.Conv(features, window, stride, (pad, pad), use_bias=False, name=name)


def norm(name: str) -> nn.BatchNorm:
    return nn.BatchNorm(use_running_average=True, name=name)


class ResidualBlock(nn.Module):
    features: int
    stride: int
    pads: bool

    @nn.compact
    def __call__(self, x):
        y = nn.relu(norm("norm1")(conv(self.features, 3, self.stride, "conv1")(x)))
        y = norm("norm2")(conv(self.features, 3, 1, "conv2")(y))
        more = self.features - x.shape[-1]
        if self.pads and more:
            x = jnp.pad(x[:, ::2, ::2], [(0, 0)] * 3 + [(more // 2, more - more // 2)])
        elif more:
            x = norm("shortcut_norm")(conv(self.features, 1, self.stride, "shortcut")(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """He et al. 2016: with `pads`, their network for small images; else as their ResNet-18."""

    width: int
    stages: int
    blocks: int
    pads: bool

    @nn.compact
    def __call__(self, x):
        x = nn.relu(norm("stem_norm")(conv(self.width, 3, 1, "stem")(x)))
        for i in range(self.stages * self.blocks):
            stage, block = divmod(i, self.blocks)
            stride = 1 + (stage > 0 and block == 0)
            x = ResidualBlock(self.width * 2**stage, stride, self.pads, name=f"block{i}")(x)
        return nn.Dense(10, name="head")(x.mean((1, 2)))


class VisionTransformer(nn.Module):
    width: int
    heads: int
    depth: int

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.width, (4, 4), (4, 4), name="patch")(x)
        x = x.reshape(x.shape[0], -1, self.width)
        token = self.param("token", nn.initializers.zeros, (1, 1, self.width))
        position = self.param("position", nn.initializers.zeros, (1, 65, self.width))
        x = jnp.concatenate([jnp.tile(token, (x.shape[0], 1, 1)), x], 1) + position
        for i in range(self.depth):
            x = Encoder(self.width, self.heads, name=f"block{i}")(x)
        return nn.Dense(10, name="head")(nn.LayerNorm(epsilon=1e-5, name="norm")(x)[:, 0])


class Encoder(nn.Module):
    width: int
    heads: int

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm(epsilon=1e-5, name="attention_norm")(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads, name="attention")(y, y)
        y = nn.LayerNorm(epsilon=1e-5, name="mlp_norm")(x)
        y = nn.gelu(nn.Dense(4 * self.width, name="up")(y))
        return x + nn.Dense(self.width, name="down")(y)
