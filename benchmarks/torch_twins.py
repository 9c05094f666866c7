"""The two networks of channels.py in PyTorch, with the same weights, cut by torch-pruning."""

# These are installed for this benchmark alone.
# pyright: reportMissingImports=false

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch_pruning as tp
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


class ResidualBlock(nn.Module):
    def __init__(self, channels: int, features: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, features, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(features)
        self.conv2 = nn.Conv2d(features, features, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(features)
        self.projects = stride != 1 or channels != features
        if self.projects:
            self.shortcut = nn.Conv2d(channels, features, 1, stride, bias=False)
            self.shortcut_norm = nn.BatchNorm2d(features)

    def forward(self, x: Any) -> Any:
        y = torch.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        if self.projects:
            x = self.shortcut_norm(self.shortcut(x))
        return torch.relu(x + y)


class ResNet18(nn.Module):
    def __init__(self, width: int, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.stem_norm = nn.BatchNorm2d(width)
        self.blocks, channels = [], width
        for stage in range(4):
            for block in range(2):
                features, stride = width * 2**stage, 1 + (stage > 0 and block == 0)
                name = f"block{2 * stage + block}"
                self.add_module(name, ResidualBlock(channels, features, stride))
                self.blocks.append(name)
                channels = features
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Any) -> Any:
        x = torch.relu(self.stem_norm(self.stem(x)))
        for name in self.blocks:
            x = getattr(self, name)(x)
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.head_size = width // heads

    def forward(self, x: Any) -> Any:
        n, length, _ = x.shape
        # The head size is what stays when whole heads go.
        q, k, v = (
            layer(x).view(n, length, -1, self.head_size).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        weights = (q @ k.transpose(-1, -2) / self.head_size**0.5).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(n, length, -1))


class Encoder(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Any) -> Any:
        x = x + self.attention(self.attention_norm(x))
        hidden = nn.functional.gelu(self.up(self.mlp_norm(x)), approximate="tanh")
        return x + self.down(hidden)


class VisionTransformer(nn.Module):
    def __init__(self, width: int, heads: int, depth: int, classes: int = 10) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.zeros(1, 65, width))
        self.depth = depth
        for i in range(depth):
            self.add_module(f"block{i}", Encoder(width, heads, 4 * width))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Any) -> Any:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        for i in range(self.depth):
            x = getattr(self, f"block{i}")(x)
        return self.head(self.norm(x)[:, 0])


class Outcome(NamedTuple):
    """What torch-pruning did.

    Attributes:
        trace: seconds to build its graph.
        total: seconds to build it, score and cut.
        parameters: (before, after).
        macs: (before, after), of convolutions and matrix products of one image, as PyTorch counts.
        weights: the smaller model's, by name.
        outputs: (before, after), on the same batch.
    """

    trace: float
    total: float
    parameters: tuple[int, int]
    macs: tuple[int, int]
    weights: dict[str, np.ndarray]
    outputs: tuple[np.ndarray, np.ndarray]


_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


def as_torch(path: str, leaf: Any) -> tuple[str, np.ndarray]:
    """The name and array that a Linen leaf has in its twin."""
    *names, last = path.split("/")[1:]
    array = np.asarray(leaf)
    if last == "kernel" and array.ndim == 4:
        array = array.transpose(3, 2, 0, 1)
    elif last == "kernel":
        # Linen's attention keeps heads as an axis: (width, heads, size) or (heads, size, width).
        array = array.reshape(-1, array.shape[-1]) if names[-1] == "out" else array
        array = array.reshape(array.shape[0], -1).T
    elif last == "bias":
        array = array.reshape(-1)
    return ".".join([*names, _LEAVES.get(last, last)]), array


def load(model: nn.Module, leaves: Mapping[str, Any]) -> nn.Module:
    """Fill a twin with the weights of its Linen original, given by path."""
    arrays = dict(as_torch(path, leaf) for path, leaf in leaves.items())
    counters = {k: v for k, v in model.state_dict().items() if k.endswith("num_batches_tracked")}
    tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    model.load_state_dict({**tensors, **counters})
    return model.eval()


def cut_half(model: nn.Module, images: np.ndarray, heads: int | None = None) -> Outcome:
    """Cut half of the channels; of a transformer, half of the heads and of the hidden units.

    The score is the sum of absolute values over all weights of a group, as ours is. torch-pruning
    would also narrow a residual stream under LayerNorm; the layers that make it are named as
    ignored, for there the smaller network would not be the masked one.
    """
    batch = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    before, dense = _count(model, batch[:1]), _run(model, batch)
    score = tp.importance.GroupMagnitudeImportance(1, "sum", None, bias=True)
    ignored: list[Any] = [model.head]
    options: dict[str, Any] = {}
    if heads is not None:
        layers = dict(model.named_modules())
        ignored += [m for name, m in layers.items() if name.endswith(("patch", ".out", ".down"))]
        projections = [m for name, m in layers.items() if name.endswith(("query", "key", "value"))]
        options = {
            "num_heads": dict.fromkeys(projections, heads),
            "prune_num_heads": True,
            "prune_head_dims": False,
            "head_pruning_ratio": 0.5,
            "unwrapped_parameters": [(model.token, 2), (model.position, 2)],
        }
    start = time.perf_counter()
    pruner = tp.pruner.BasePruner(
        model, batch[:1], score, pruning_ratio=0.5, ignored_layers=ignored, **options
    )
    traced = time.perf_counter()
    pruner.step()
    done = time.perf_counter()
    after = _count(model, batch[:1])
    return Outcome(
        traced - start,
        done - start,
        (before[0], after[0]),
        (before[1], after[1]),
        {name: tensor.numpy() for name, tensor in model.state_dict().items()},
        (dense, _run(model, batch)),
    )


def _run(model: nn.Module, batch: Any) -> np.ndarray:
    with torch.no_grad():
        return model(batch).numpy()


def _count(model: nn.Module, batch: Any) -> tuple[int, int]:
    """Parameters, and multiply-accumulates of one image."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(batch)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2
