"""ResNet-20 for CIFAR in Linen, whose layers a peer may bring: what ``qat.py`` trains."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class Block(nn.Module):
    """Two 3×3 convolutions around a residual."""

    features: int
    strides: int
    conv: Callable[..., Any]

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        norm = lambda: nn.BatchNorm(use_running_average=not train, momentum=0.9)
        y = nn.relu(norm()(self.conv(self.features, (3, 3), self.strides)(x)))
        y = norm()(self.conv(self.features, (3, 3), 1)(y))
        if x.shape != y.shape:
            x = norm()(self.conv(self.features, (1, 1), self.strides)(x))
        return nn.relu(x + y)


class ResNet20(nn.Module):
    """He et al., 2016, section 4.2, with projection shortcuts; images (n, 32, 32, 3)."""

    conv: Callable[..., Any] = nn.Conv
    dense: Callable[..., Any] = nn.Dense
    widths: tuple[int, ...] = (16, 32, 64)

    @nn.compact
    def __call__(self, x: Any, train: bool = True) -> Any:
        """Images to logits (n, 10)."""

        def conv(features: int, size: tuple[int, int], strides: int) -> Any:
            return self.conv(features, size, (strides, strides), use_bias=False)

        x = conv(self.widths[0], (3, 3), 1)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        for stage, width in enumerate(self.widths):
            for block in range(3):
                x = Block(width, 2 if stage and not block else 1, conv)(x, train)
        return self.dense(10)(x.mean((1, 2)))


def make(model: Any, batch: int) -> tuple[Any, Any, Any]:
    """Variables, images and labels."""
    images = jax.random.normal(jax.random.key(1), (batch, 32, 32, 3))
    labels = jnp.arange(batch) % 10
    return model.init(jax.random.key(0), images[:2]), images, labels
