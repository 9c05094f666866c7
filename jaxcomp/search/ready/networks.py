"""Multilayer perceptrons and convolutional networks: as spaces, as pure functions."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxcomp import checks
from jaxcomp.search.ready.nonlinearities import activation as activation_of_candidate
from jaxcomp.search.spaces import Choice, Integer, Repeat
from jaxcomp.search.spaces.kinds import plain

_SKIP = Choice((False, True))


class Network(NamedTuple):
    """A network as two pure functions.

    Attributes:
        init: ``key -> params``: a dict of layers, each of ``kernel`` and ``bias``, float32.
        apply: ``(params, x) -> outputs``.
    """

    init: Callable[[Any], dict[str, dict[str, Any]]]
    apply: Callable[[Any, Any], Any]


def mlps(
    depth: Any = Integer(1, 4),  # noqa: B008, frozen
    width: Any = Integer(8, 128, step=8, log=True),  # noqa: B008, frozen
    skip: Any = _SKIP,
    activation: Any = "relu",
) -> dict[str, Any]:
    """A space of multilayer perceptrons.

    Args:
        depth: of hidden layers: a constant or an Integer.
        width: of each hidden layer: a constant or a part.
        skip: whether a layer's input is added to its output: a constant or a part.
        activation: after each hidden layer: a name, or a space such as ``activations()``.

    Returns:
        A space for :func:`mlp`.

    Raises:
        TypeError: the depth is neither an int nor an Integer.

    Example:
        >>> from jaxcomp.search import spaces
        >>> spaces.count(mlps(depth=Integer(1, 2), width=Choice((16, 32)), skip=False))
        6
    """
    return {"layers": Repeat(depth, {"width": width, "skip": skip}), "activation": activation}


def cnns(
    depth: Any = Integer(1, 4),  # noqa: B008, frozen
    channels: Any = Integer(8, 64, step=8, log=True),  # noqa: B008, frozen
    size: Any = Choice((1, 3, 5)),  # noqa: B008, frozen
    stride: Any = Choice((1, 2)),  # noqa: B008, frozen
    skip: Any = _SKIP,
    activation: Any = "relu",
) -> dict[str, Any]:
    """A space of convolutional networks.

    Args:
        depth: of convolutions: a constant or an Integer.
        channels: that each gives: a constant or a part.
        size: of its kernel, along height and width alike: a constant or a part.
        stride: along both: a constant or a part.
        skip: whether its input is added to its output: a constant or a part.
        activation: after each: a name, or a space such as ``activations()``.

    Returns:
        A space for :func:`cnn`.

    Raises:
        TypeError: the depth is neither an int nor an Integer.

    Example:
        >>> from jaxcomp.search import spaces
        >>> space = cnns(depth=2, channels=16, size=Choice((3, 5)), stride=2, skip=False)
        >>> spaces.decode(space, {"layers/0/size": 0, "layers/1/size": 1})["layers"][1]
        {'channels': 16, 'size': 5, 'stride': 2, 'skip': False}
    """
    layer = {"channels": channels, "size": size, "stride": stride, "skip": skip}
    return {"layers": Repeat(depth, layer), "activation": activation}


def mlp(candidate: Any, inputs: Any, outputs: Any) -> Network:
    """The perceptron that a candidate stands for.

    A layer with a skip adds what it was given to what its activation gives: as it is where the
    widths are equal, through a matrix where they are not.

    Args:
        candidate: of :func:`mlps`; what else it holds is passed over.
        inputs: the number of features.
        outputs: the number of logits.

    Returns:
        ``apply`` takes ``(…, inputs)`` and gives ``(…, outputs)``.

    Raises:
        TypeError: the candidate or a layer is no dict, or a number no whole number.
        ValueError: a part is missing; a number is below 1.

    Example:
        >>> layers = [{"width": 8, "skip": False}, {"width": 8, "skip": True}]
        >>> network = mlp({"layers": layers, "activation": "gelu"}, inputs=3, outputs=2)
        >>> params = jax.eval_shape(network.init, jax.random.key(0))
        >>> jax.tree.map(lambda leaf: leaf.shape, params)
        {'head': {'bias': (2,), 'kernel': (8, 2)},
         'layer_0': {'bias': (8,), 'kernel': (3, 8)},
         'layer_1': {'bias': (8,), 'kernel': (8, 8)}}

    Source: skips: He et al., "Deep residual learning", CVPR 2016, section 3.2, equations 1 and 2.
    """
    layers, nonlinearity = _opened(candidate, ("width", "skip"))
    checks.check_count("inputs", inputs)
    checks.check_count("outputs", outputs)
    shapes: dict[str, tuple[int, ...]] = {}
    before = inputs
    for i, layer in enumerate(layers):
        shapes[f"layer_{i}"] = (before, layer["width"])
        if layer["skip"] and before != layer["width"]:
            shapes[f"skip_{i}"] = (before, layer["width"])
        before = layer["width"]
    shapes["head"] = (before, outputs)

    def apply(params: Any, x: Any) -> Any:
        for i, layer in enumerate(layers):
            y = nonlinearity(_dense(params[f"layer_{i}"], x))
            if layer["skip"]:
                y += _dense(params[f"skip_{i}"], x) if f"skip_{i}" in shapes else x
            x = y
        return _dense(params["head"], x)

    return Network(_init_of(shapes), apply)


def cnn(candidate: Any, channels: Any, outputs: Any) -> Network:
    """The convolutional network that a candidate stands for.

    Convolutions pad to keep the size (but for strides); their last channels are averaged over the
    image, and a matrix gives the logits. A layer with a skip adds what it was given to what its
    activation gives: as it is where the shapes are equal, through a 1×1 convolution where not.

    Args:
        candidate: of :func:`cnns`; what else it holds is passed over.
        channels: of the images.
        outputs: the number of logits.

    Returns:
        ``apply`` takes ``(batch, height, width, channels)`` and gives ``(batch, outputs)``.

    Raises:
        TypeError: the candidate or a layer is no dict, or a number no whole number.
        ValueError: a part is missing; a number is below 1.

    Example:
        >>> layer = {"channels": 8, "size": 3, "stride": 2, "skip": True}
        >>> network = cnn({"layers": [layer], "activation": "relu"}, channels=1, outputs=10)
        >>> params = jax.eval_shape(network.init, jax.random.key(0))
        >>> jax.tree.map(lambda leaf: leaf.shape, params)["skip_0"]
        {'bias': (8,), 'kernel': (1, 1, 1, 8)}

    Source: skips: He et al., "Deep residual learning", CVPR 2016, section 3.3, option B.
    """
    layers, nonlinearity = _opened(candidate, ("channels", "size", "stride", "skip"))
    checks.check_count("channels", channels)
    checks.check_count("outputs", outputs)
    shapes: dict[str, tuple[int, ...]] = {}
    before = channels
    for i, layer in enumerate(layers):
        after, size = layer["channels"], layer["size"]
        shapes[f"layer_{i}"] = (size, size, before, after)
        if layer["skip"] and (before != after or layer["stride"] > 1):
            shapes[f"skip_{i}"] = (1, 1, before, after)
        before = after
    shapes["head"] = (before, outputs)

    def apply(params: Any, x: Any) -> Any:
        for i, layer in enumerate(layers):
            y = nonlinearity(_convolution(params[f"layer_{i}"], x, layer["stride"]))
            if layer["skip"]:
                if f"skip_{i}" in shapes:
                    x = _convolution(params[f"skip_{i}"], x, layer["stride"])
                y += x
            x = y
        return _dense(params["head"], x.mean((1, 2)))

    return Network(_init_of(shapes), apply)


def _opened(candidate: Any, names: Sequence[str]) -> tuple[list[dict[str, Any]], Any]:
    """The layers, looked at, and the activation function."""
    if not isinstance(candidate, Mapping) or not isinstance(candidate.get("layers"), (list, tuple)):
        raise TypeError(
            f"network: must be a dict of layers (a list) and activation, not {candidate!r:.60}"
        )
    if "activation" not in candidate:
        raise ValueError("network: it has no activation: give one, such as 'relu'")
    for i, layer in enumerate(candidate["layers"]):
        if not isinstance(layer, Mapping):
            raise TypeError(f"layers/{i}: must be a dict of {', '.join(names)}, not {layer!r:.60}")
        for name in names:
            if name not in layer:
                raise ValueError(f"layers/{i}: it has no {name}: give {', '.join(names)}")
            if name != "skip":
                checks.check_count(f"layers/{i}/{name}", layer[name])
            elif plain(layer[name]) not in (0, 1):
                raise TypeError(f"layers/{i}/skip: must be True or False, not {layer[name]!r:.60}")
    layers = [{name: plain(layer[name]) for name in names} for layer in candidate["layers"]]
    return layers, activation_of_candidate(candidate["activation"])


def _init_of(shapes: dict[str, tuple[int, ...]]) -> Callable[[Any], dict[str, dict[str, Any]]]:
    def init(key: Any) -> dict[str, dict[str, Any]]:
        keys = jax.random.split(key, len(shapes))
        draw = jax.nn.initializers.he_normal()
        return {
            name: {"kernel": draw(keys[i], shape), "bias": jnp.zeros(shape[-1])}
            for i, (name, shape) in enumerate(shapes.items())
        }

    return init


def _dense(params: Mapping[str, Any], x: Any) -> Any:
    return x @ params["kernel"] + params["bias"]


def _convolution(params: Mapping[str, Any], x: Any, stride: int) -> Any:
    dimensions = ("NHWC", "HWIO", "NHWC")
    y = lax.conv_general_dilated(
        x, params["kernel"], (stride, stride), "SAME", dimension_numbers=dimensions
    )
    return y + params["bias"]
