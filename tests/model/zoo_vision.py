"""Convolutional networks of the zoo, with what can be cut from each derived by hand."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from tests.model.cases import (
    Case,
    batch_norm,
    conv_in,
    conv_out,
    dense_in,
    dense_out,
    group,
    linen,
    norm,
    normal,
)


def conv(features, name, size=3, strides=1, groups=1):
    return nn.Conv(features, (size, size), strides, feature_group_count=groups, name=name)


def bn(name):
    return nn.BatchNorm(use_running_average=True, name=name)


def halve(x, pool=nn.max_pool):
    return pool(x, (2, 2), (2, 2))


class Vgg(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = halve(nn.relu(conv(6, "conv1")(x)))
        x = halve(nn.relu(conv(8, "conv2")(x)))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(7, name="dense")(x))
        return nn.Dense(3, name="head")(x)


def vgg() -> Case:
    # A channel of conv2 goes with its 2·2 positions of the flattened axis.
    cuttable = {
        "conv1": group(6, conv_out("conv1"), conv_in("conv2")),
        "conv2": group(8, conv_out("conv2"), dense_in("dense")),
        "dense": group(7, dense_out("dense"), dense_in("head")),
    }
    return linen(Vgg(), (normal(2, 8, 8, 3),), cuttable)


class ResNet(nn.Module):
    option_a: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.relu(bn("stem_bn")(conv(8, "stem")(x)))
        y = nn.relu(bn("a1_bn")(conv(5, "a1")(x)))
        y = bn("a2_bn")(conv(8, "a2")(y))
        x = nn.relu(x + y)
        y = nn.relu(bn("b1_bn")(conv(6, "b1", strides=2)(x)))
        y = bn("b2_bn")(conv(12, "b2")(y))
        if self.option_a:
            x = jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (2, 2)))
        else:
            x = bn("shortcut_bn")(conv(12, "shortcut", size=1, strides=2)(x))
        x = nn.relu(x + y)
        return nn.Dense(3, name="head")(x.mean((1, 2)))


def resnet() -> Case:
    first = conv_out("stem", "a2"), batch_norm("stem_bn", "a2_bn")
    cuttable = {
        "first stream": group(8, *first, conv_in("a1", "b1", "shortcut")),
        "second stream": group(
            12, conv_out("b2", "shortcut"), batch_norm("b2_bn", "shortcut_bn"), dense_in("head")
        ),
        "a": group(5, conv_out("a1"), batch_norm("a1_bn"), conv_in("a2")),
        "b": group(6, conv_out("b1"), batch_norm("b1_bn"), conv_in("b2")),
    }
    return linen(ResNet(), (normal(2, 8, 8, 3),), cuttable)


def resnet_padded() -> Case:
    # The second stream is 2 + 8 + 2: its middle is the first stream, its ends are its own.
    second = conv_out("b2"), batch_norm("b2_bn"), dense_in("head")
    first = conv_out("stem", "a2"), batch_norm("stem_bn", "a2_bn"), conv_in("a1", "b1")
    cuttable = {
        "streams": group(8, *first, *second),
        "low end": group(2, *second),
        "high end": group(2, *second),
        "a": group(5, conv_out("a1"), batch_norm("a1_bn"), conv_in("a2")),
        "b": group(6, conv_out("b1"), batch_norm("b1_bn"), conv_in("b2")),
    }
    return linen(ResNet(option_a=True), (normal(2, 8, 8, 3),), cuttable)


class MobileNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu6(bn("stem_bn")(conv(6, "stem", strides=2)(x)))
        for name, width, features in (("a", 12, 6), ("b", 10, 8)):
            y = nn.relu6(bn(f"{name}1_bn")(conv(width, f"{name}1", size=1)(x)))
            y = nn.relu6(bn(f"{name}2_bn")(conv(width, f"{name}2", groups=width)(y)))
            y = bn(f"{name}3_bn")(conv(features, f"{name}3", size=1)(y))
            x = x + y if features == x.shape[-1] else y
        return nn.Dense(3, name="head")(x.mean((1, 2)))


def mobilenet() -> Case:
    def inverted(name: str) -> str:
        made = conv_out(f"{name}1", f"{name}2"), batch_norm(f"{name}1_bn", f"{name}2_bn")
        return " ".join((*made, conv_in(f"{name}3")))

    stream = conv_out("stem", "a3"), batch_norm("stem_bn", "a3_bn"), conv_in("a1", "b1")
    cuttable = {
        "stream": group(6, *stream),
        "inside a": group(12, inverted("a")),
        "inside b": group(10, inverted("b")),
        "last": group(8, conv_out("b3"), batch_norm("b3_bn"), dense_in("head")),
    }
    return linen(MobileNet(), (normal(2, 8, 8, 3),), cuttable)


class Multiplier(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(conv(5, "stem")(x))
        x = nn.relu(conv(15, "depthwise", groups=5)(x))
        return conv(3, "head", size=1)(x)


def depthwise_multiplier() -> Case:
    # Output channel 3·c + m is the m-th filter of input channel c.
    cuttable = {
        "channels": group(5, conv_out("stem", "depthwise"), conv_in("head")),
        "multiplier": group(3, conv_out("depthwise"), conv_in("head")),
    }
    return linen(Multiplier(), (normal(2, 6, 6, 3),), cuttable)


class ResNeXt(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(conv(7, "stem")(x))
        y = nn.relu(bn("reduce_bn")(conv(12, "reduce", size=1)(x)))
        y = nn.relu(bn("grouped_bn")(conv(15, "grouped", groups=3)(y)))
        x = nn.relu(x + conv(7, "expand", size=1)(y))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


def resnext() -> Case:
    made = conv_out("reduce"), batch_norm("reduce_bn")
    grouped = conv_out("grouped"), batch_norm("grouped_bn"), conv_in("expand")
    cuttable = {
        "stream": group(7, conv_out("stem", "expand"), conv_in("reduce"), dense_in("head")),
        "whole groups": group(3, *made, *grouped),
        "inputs of each group": group(4, *made, conv_in("grouped")),
        "outputs of each group": group(5, *grouped),
    }
    return linen(ResNeXt(), (normal(2, 6, 6, 3),), cuttable)


class ShuffleNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(conv(6, "stem")(x))
        x = nn.relu(conv(8, "first", size=1, groups=2)(x))
        n, height, width, _ = x.shape
        x = x.reshape(n, height, width, 2, 4).swapaxes(3, 4).reshape(n, height, width, 8)
        x = conv(8, "depthwise", groups=8)(x)
        x = nn.relu(conv(10, "second", size=1, groups=2)(x))
        return conv(3, "head", size=1)(x)


def shufflenet() -> Case:
    # Before the shuffle: (first's group, second's group, rest); after: (second's, rest, first's).
    between = conv_out("first", "depthwise")
    cuttable = {
        "first's groups": group(2, conv_out("stem"), between, conv_in("second")),
        "second's groups": group(2, between, conv_out("second"), conv_in("head")),
        "rest": group(2, between, conv_in("second")),
        "first's inputs": group(3, conv_out("stem"), conv_in("first")),
        "second's outputs": group(5, conv_out("second"), conv_in("head")),
    }
    return linen(ShuffleNet(), (normal(2, 6, 6, 3),), cuttable)


class DenseNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = conv(6, "stem")(x)
        for name, growth in (("a", 4), ("b", 5)):
            y = conv(growth, name)(nn.relu(bn(f"{name}_bn")(x)))
            x = jnp.concatenate([x, y], -1)
        x = halve(conv(8, "transition", size=1)(nn.relu(bn("transition_bn")(x))), nn.avg_pool)
        return nn.Dense(3, name="head")(x.mean((1, 2)))


def densenet() -> Case:
    last = batch_norm("transition_bn"), conv_in("transition")
    then_b = batch_norm("b_bn"), conv_in("b")
    cuttable = {
        "stem": group(6, conv_out("stem"), batch_norm("a_bn"), conv_in("a"), *then_b, *last),
        "a": group(4, conv_out("a"), *then_b, *last),
        "b": group(5, conv_out("b"), *last),
        "transition": group(8, conv_out("transition"), dense_in("head")),
    }
    return linen(DenseNet(), (normal(2, 6, 6, 3),), cuttable)


class UNet(nn.Module):
    upsample: str

    @nn.compact
    def __call__(self, x):
        high = nn.relu(conv(4, "encode")(x))
        low = nn.relu(conv(6, "bottom")(halve(high)))
        if self.upsample == "transposed":
            up = nn.ConvTranspose(5, (2, 2), (2, 2), name="up")(low)
        else:
            n, height, width, channels = low.shape
            shape = (n, 2 * height, 2 * width, channels)
            up = conv(5, "up")(jax.image.resize(low, shape, self.upsample))
        x = nn.relu(conv(7, "decode")(jnp.concatenate([high, up], -1)))
        return conv(2, "head", size=1)(x)


def unet(upsample: str) -> Case:
    cuttable = {
        "encode": group(4, conv_out("encode"), conv_in("bottom", "decode")),
        "bottom": group(6, conv_out("bottom"), conv_in("up")),
        "up": group(5, conv_out("up"), conv_in("decode")),
        "decode": group(7, conv_out("decode"), conv_in("head")),
    }
    return linen(UNet(upsample), (normal(2, 8, 8, 3),), cuttable)


class SqueezeExcite(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.silu(bn("stem_bn")(conv(8, "stem")(x)))
        gate = nn.relu(nn.Dense(3, name="squeeze")(x.mean((1, 2), keepdims=True)))
        x = x * nn.sigmoid(nn.Dense(8, name="excite")(gate))
        return conv(3, "head", size=1)(x)


def squeeze_excite() -> Case:
    gated = dense_in("squeeze"), dense_out("excite"), conv_in("head")
    cuttable = {
        "channels": group(8, conv_out("stem"), batch_norm("stem_bn"), *gated),
        "squeezed": group(3, dense_out("squeeze"), dense_in("excite")),
    }
    return linen(SqueezeExcite(), (normal(2, 6, 6, 3),), cuttable)


class ConvNeXt(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm(name="stem_ln")(conv(8, "stem", size=2, strides=2)(x))
        y = nn.LayerNorm(name="ln")(conv(8, "depthwise", groups=8)(x))
        y = nn.Dense(8, name="down")(nn.gelu(nn.Dense(12, name="up")(y)))
        x = x + y * self.param("layer_scale", nn.initializers.ones, (8,))
        return nn.Dense(3, name="head")(nn.LayerNorm(name="head_ln")(x.mean((1, 2))))


def convnext() -> Case:
    cuttable = {"hidden": group(12, dense_out("up"), dense_in("down"))}
    return linen(ConvNeXt(), (normal(2, 8, 8, 3),), cuttable)


class GroupNormed(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.GroupNorm(num_groups=4, name="norm")(conv(32, "stem")(x)))
        return conv(3, "head", size=1)(x)


def group_norm() -> Case:
    whole = conv_out("stem"), norm("norm"), conv_in("head")
    return linen(GroupNormed(), (normal(2, 4, 4, 3),), {"groups": group(4, *whole)})


VISION: dict[str, Callable[[], Case]] = {
    "vgg": vgg,
    "resnet": resnet,
    "resnet zero-padded": resnet_padded,
    "mobilenet v2": mobilenet,
    "depthwise multiplier": depthwise_multiplier,
    "resnext": resnext,
    "shufflenet": shufflenet,
    "densenet": densenet,
    "u-net transposed": lambda: unet("transposed"),
    "u-net nearest": lambda: unet("nearest"),
    "u-net bilinear": lambda: unet("bilinear"),
    "squeeze-excite": squeeze_excite,
    "convnext": convnext,
    "group norm": group_norm,
}
