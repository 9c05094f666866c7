"""What a network of the zoo is, and short ways to write down which slices go together."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxcomp import tree as tree_lib


class Group(NamedTuple):
    """Channels that can only come and go together, as derived by hand from the architecture.

    Attributes:
        units: how many there are.
        slices: (path, axis) of every leaf that holds them.
    """

    units: int
    slices: frozenset[tuple[str, int]]


class Case(NamedTuple):
    """A network with random weights, and all that can be cut from it.

    Attributes:
        apply_fn: the inference function of (params, *inputs).
        params: random everywhere: biases and BatchNorm means are not zero, variances positive.
        inputs: a batch.
        cuttable: by a label of ours; no other channels may be cut.
        tolerance: relative, between masked and removed outputs.
    """

    apply_fn: Callable[..., Any]
    params: Any
    inputs: tuple[Any, ...]
    cuttable: dict[str, Group]
    tolerance: float = 1e-5


def group(units: int, *slices: str) -> Group:
    """A group from texts such as ``"params/Conv_0/kernel[3] params/Conv_0/bias[0]"``."""
    found = [re.fullmatch(r"(.+)\[(\d+)\]", text) for text in " ".join(slices).split()]
    assert all(found), slices
    return Group(units, frozenset((m[1], int(m[2])) for m in found if m))


def conv_out(*names: str) -> str:
    return " ".join(f"params/{name}/kernel[3] params/{name}/bias[0]" for name in names)


def conv_in(*names: str) -> str:
    return " ".join(f"params/{name}/kernel[2]" for name in names)


def dense_out(*names: str) -> str:
    return " ".join(f"params/{name}/kernel[1] params/{name}/bias[0]" for name in names)


def dense_in(*names: str) -> str:
    return " ".join(f"params/{name}/kernel[0]" for name in names)


def norm(*names: str) -> str:
    return " ".join(f"params/{name}/scale[0] params/{name}/bias[0]" for name in names)


def batch_norm(*names: str) -> str:
    running = (f"batch_stats/{name}/mean[0] batch_stats/{name}/var[0]" for name in names)
    return " ".join((norm(*names), *running))


def randomize(tree: Any, seed: int = 0) -> Any:
    """Random values for every leaf: variances in (0.5, 1.5), the rest normal."""
    rng = np.random.default_rng(seed)
    leaves = []
    for path, leaf in tree_lib.flatten(tree, is_leaf=lambda _: False).items():
        name, shape = path.rsplit("/", 1)[-1], leaf.shape
        if name == "var":
            value = rng.uniform(0.5, 1.5, shape)
        elif name == "scale":
            value = rng.uniform(0.5, 1.5, shape) * rng.choice([-1, 1], shape)
        else:
            fan_in = max(int(np.prod(shape[:-1])), 1) if len(shape) > 1 else 4
            value = rng.normal(size=shape) / fan_in**0.5
        leaves.append(jax.device_put(value.astype(leaf.dtype)))
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def normal(*shape: int, seed: int = 1) -> jax.Array:
    """A random input."""
    return jax.device_put(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def tokens(*shape: int, vocabulary: int, seed: int = 1) -> jax.Array:
    """Random token numbers."""
    return jax.device_put(
        np.random.default_rng(seed).integers(vocabulary, size=shape).astype(np.int32)
    )


def linen(model: Any, inputs: tuple[Any, ...], cuttable: dict[str, Group], **kwargs: Any) -> Case:
    """A case of a Linen module; the parameters are all of its variables."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    return Case(model.apply, randomize(shapes), inputs, cuttable, **kwargs)
