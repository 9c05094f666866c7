"""The networks of the demo, plain Flax: nothing in them knows of compression."""

from typing import Any

import flax.linen as nn


class SmallCNN(nn.Module):
    """Two convolutions and two dense layers; ``width`` channels first, then twice as many."""

    width: int = 32
    hidden: int = 128

    @nn.compact
    def __call__(self, x: Any) -> Any:
        """Images (n, height, width, 1) to logits (n, 10)."""
        for features in (self.width, 2 * self.width):
            x = nn.relu(nn.Conv(features, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = x.reshape(len(x), -1)
        x = nn.relu(nn.Dense(self.hidden)(x))
        return nn.Dense(10)(x)


class LeNet300(nn.Module):
    """LeNet-300-100 (LeCun et al., 1998): 266,610 parameters on 28×28 images."""

    width: int = 300

    @nn.compact
    def __call__(self, x: Any) -> Any:
        """Images (n, height, width, 1) to logits (n, 10)."""
        x = x.reshape(len(x), -1)
        x = nn.relu(nn.Dense(self.width)(x))
        x = nn.relu(nn.Dense(self.width // 3)(x))
        return nn.Dense(10)(x)


class LeNet5(nn.Module):
    """LeNet-5 as in Caffe: 431,080 parameters on 28×28 images."""

    width: int = 20

    @nn.compact
    def __call__(self, x: Any) -> Any:
        """Images (n, height, width, 1) to logits (n, 10)."""
        x = nn.Conv(self.width, (5, 5), padding="VALID")(x)
        x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = nn.Conv(5 * self.width // 2, (5, 5), padding="VALID")(x)
        x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = nn.relu(nn.Dense(25 * self.width)(x.reshape(len(x), -1)))
        return nn.Dense(10)(x)


STUDENTS: dict[str, nn.Module] = {
    "cnn": SmallCNN(),
    "lenet-300-100": LeNet300(),
    "lenet-5": LeNet5(),
}
TEACHERS: dict[str, nn.Module] = {
    "cnn": SmallCNN(width=48, hidden=256),
    "lenet-300-100": LeNet300(width=900),
    "lenet-5": LeNet5(width=32),
}
