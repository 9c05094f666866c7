"""Factor transfer: the teacher's features paraphrased, the student's translated, both compared."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Shaped

from jaxcomp.distill.inputs import (
    as_floats,
    as_mask,
    check_same_shape,
    masked_mean,
    norm,
    normalized,
)
from jaxcomp.distill.intermediate.convolutions import convolve, init_convolution

SLOPE = 0.1  # of the leaky rectifier, where its input is negative


def init_paraphraser(key: Any, teacher: Any, *, rate: float = 0.5) -> dict[str, Any]:
    """Parameters of an autoencoder of the teacher's features, whose code is the factor.

    Train it first, alone, by :func:`paraphrase_loss`; then freeze it. Encoder and decoder are
    three convolutions of size 3 each with a leaky rectifier, as in the paper (whose transposed
    convolutions of stride 1 are convolutions too), but without batch normalisation: it would make
    an example's loss depend on its batch, and keep running averages.

    Args:
        key: PRNG key.
        teacher: the teacher's features (batch, positions..., channels), array or
            ``jax.ShapeDtypeStruct``: only the shape is read.
        rate: channels of the factor by channels of the teacher.

    Returns:
        ``{"decoder", "encoder"}``, each a list of ``{"kernel", "bias"}``, in float32.

    Raises:
        ValueError: features without positions or channels, a rate that leaves no channel.

    Example:
        >>> paraphraser = init_paraphraser(jax.random.key(0), jnp.ones((2, 4, 4, 8)))
        >>> [layer["kernel"].shape for layer in paraphraser["encoder"]]
        [(3, 3, 8, 8), (3, 3, 8, 4), (3, 3, 4, 4)]
        >>> [layer["kernel"].shape for layer in paraphraser["decoder"]]
        [(3, 3, 4, 4), (3, 3, 4, 8), (3, 3, 8, 8)]

    Kim, Park and Kwak, "Paraphrasing Complex Network", 2018, section 3.1.
    """
    channels, positions = _sizes("teacher", teacher)
    factor = int(channels * rate)
    if factor < 1:
        raise ValueError(f"rate {rate} of {channels} channels leaves none: raise it.")
    encoder, decoder = jax.random.split(key)
    return {
        "encoder": _layers(encoder, (channels, channels, factor, factor), positions),
        "decoder": _layers(decoder, (factor, factor, channels, channels), positions),
    }


def paraphrase(
    paraphraser: dict[str, Any],
    teacher: Shaped[ArrayLike, "..."],
    *,
    where: Shaped[ArrayLike, "..."] | None = None,
) -> Float[Array, "..."]:
    """The teacher's factor: what the paraphraser's encoder makes of its features.

    Args:
        paraphraser: of :func:`init_paraphraser`.
        teacher: float array (batch, positions..., channels).
        where: boolean, (batch,) or (batch, positions...): what counts; the factor is 0 elsewhere.

    Returns:
        (batch, positions..., factor channels); float32, or float64 if an array is.

    Raises:
        TypeError: features that are not floating point, ``where`` that is not boolean.
        ValueError: features of other channels than the paraphraser was made for.

    Example:
        >>> paraphraser = init_paraphraser(jax.random.key(0), jnp.ones((2, 4, 4, 8)))
        >>> jax.jit(paraphrase)(paraphraser, jnp.ones((2, 4, 4, 8))).shape
        (2, 4, 4, 4)

    Kim, Park and Kwak, "Paraphrasing Complex Network", 2018, section 3.1.
    """
    return _run(paraphraser["encoder"], "teacher", teacher, where)


def paraphrase_loss(
    paraphraser: dict[str, Any],
    teacher: Shaped[ArrayLike, "..."],
    *,
    where: Shaped[ArrayLike, "..."] | None = None,
) -> Float[Array, "batch"]:
    """How badly the teacher's features are rebuilt from their factor, per example.

    The mean over positions and channels of the squared differences (the paper sums them).

    Args:
        paraphraser: of :func:`init_paraphraser`; the one that is trained.
        teacher: float array (batch, positions..., channels).
        where: boolean, (batch,) or (batch, positions...): what counts.

    Returns:
        (batch,); float32, or float64 if an array is.

    Raises:
        TypeError: features that are not floating point, ``where`` that is not boolean.
        ValueError: features of other channels than the paraphraser was made for.

    Example:
        >>> teacher = jnp.ones((2, 4, 4, 8))
        >>> paraphraser = init_paraphraser(jax.random.key(0), teacher)
        >>> jax.jit(paraphrase_loss)(paraphraser, teacher).shape
        (2,)

    Kim, Park and Kwak, "Paraphrasing Complex Network", 2018, section 3.1.
    """
    (t,) = as_floats(teacher=teacher)
    rebuilt = _run(paraphraser["decoder"], "factor", paraphrase(paraphraser, t, where=where), where)
    keep = as_mask(where, t.shape[:1], t.shape[:-1])[..., None]
    gap = jnp.square(jnp.where(keep, t, 0) - rebuilt)
    return masked_mean(gap, keep, tuple(range(1, t.ndim)))


def init_translator(key: Any, student: Any, factor: Any) -> list[dict[str, Array]]:
    """Parameters of what makes a factor of the student's features; train them with the student.

    Three convolutions, as those of the paraphraser's encoder.

    Args:
        key: PRNG key.
        student: the student's features (batch, positions..., channels), array or
            ``jax.ShapeDtypeStruct``: only the shape is read.
        factor: the teacher's factor likewise, or the teacher's features with as many channels.

    Returns:
        A list of ``{"kernel", "bias"}``, in float32.

    Raises:
        ValueError: features without positions or channels.

    Example:
        >>> student, factor = jnp.ones((2, 4, 4, 4)), jnp.ones((2, 4, 4, 8))
        >>> translator = init_translator(jax.random.key(0), student, factor)
        >>> [layer["kernel"].shape for layer in translator]
        [(3, 3, 4, 4), (3, 3, 4, 8), (3, 3, 8, 8)]

    Kim, Park and Kwak, "Paraphrasing Complex Network", 2018, section 3.2.
    """
    (channels, positions), (out, _) = _sizes("student", student), _sizes("factor", factor)
    return _layers(key, (channels, channels, out, out), positions)


def translate(
    translator: list[dict[str, Any]],
    student: Shaped[ArrayLike, "..."],
    *,
    where: Shaped[ArrayLike, "..."] | None = None,
) -> Float[Array, "..."]:
    """The student's factor: what the translator makes of its features.

    Args:
        translator: of :func:`init_translator`.
        student: float array (batch, positions..., channels).
        where: boolean, (batch,) or (batch, positions...): what counts; the factor is 0 elsewhere.

    Returns:
        (batch, positions..., factor channels); float32, or float64 if an array is.

    Raises:
        TypeError: features that are not floating point, ``where`` that is not boolean.
        ValueError: features of other channels than the translator was made for.

    Example:
        >>> student, factor = jnp.ones((2, 4, 4, 4)), jnp.ones((2, 4, 4, 8))
        >>> translator = init_translator(jax.random.key(0), student, factor)
        >>> jax.jit(translate)(translator, student).shape
        (2, 4, 4, 8)

    Kim, Park and Kwak, "Paraphrasing Complex Network", 2018, section 3.2.
    """
    return _run(translator, "student", student, where)


def factor_transfer_loss(
    student: Shaped[ArrayLike, "..."],
    teacher: Shaped[ArrayLike, "..."],
    *,
    order: int = 1,
    where: Shaped[ArrayLike, "..."] | None = None,
) -> Float[Array, "batch"]:
    """Distance between the factors of student and teacher, per example.

    Each example's factor is divided by its Euclidean norm over positions and channels; the loss
    is the norm of the difference. A factor of zeros stays zero.

    ``factor_transfer_loss(translate(translator, s), paraphrase(paraphraser, t))``, with the same
    ``where`` in all three. Both arguments are differentiated; put ``jax.lax.stop_gradient`` around
    the teacher's factor, as the paraphraser is frozen.

    Args:
        student: the student's factor, float array (batch, positions..., channels).
        teacher: the teacher's, of the same shape; its dtype may differ.
        order: 1, the sum of the absolute differences (torchdistill's ``p=1`` is their mean), or
            2, the Euclidean norm.
        where: boolean, (batch,) or (batch, positions...): what counts.

    Returns:
        (batch,); float32, or float64 if an array is.

    Raises:
        TypeError: factors that are not floating point, ``where`` that is not boolean.
        ValueError: shapes that do not fit, another order.

    Example:
        >>> student = jnp.array([[[3.0, 4.0]], [[1.0, 0.0]]])
        >>> teacher = jnp.array([[[6.0, 8.0]], [[0.0, 1.0]]])
        >>> print(factor_transfer_loss(student, teacher))
        [0. 2.]
        >>> print(factor_transfer_loss(student, teacher, order=2).round(3))
        [0.    1.414]

    Kim, Park and Kwak, "Paraphrasing Complex Network", 2018, section 3.2.
    """
    if order not in (1, 2):
        raise ValueError(f"order {order} must be 1 or 2.")
    s, t = as_floats(student=student, teacher=teacher)
    check_same_shape("translate or resize the student's.", student=s, teacher=t)
    if s.ndim < 2:
        raise ValueError(f"student {s.shape} must be (batch, positions..., channels).")
    keep = as_mask(where, s.shape[:1], s.shape[:-1])[..., None]
    rest = tuple(range(1, s.ndim))
    gap = normalized(jnp.where(keep, s, 0), rest) - normalized(jnp.where(keep, t, 0), rest)
    return jnp.sum(jnp.abs(gap), rest) if order == 1 else norm(gap, rest)


def _sizes(name: str, array: Any) -> tuple[int, int]:
    """Channels, and how many position axes."""
    if len(array.shape) < 3 or array.shape[-1] == 0:
        raise ValueError(f"{name} {array.shape} must be (batch, positions..., channels).")
    return array.shape[-1], len(array.shape) - 2


def _layers(key: Any, channels: tuple[int, ...], positions: int) -> list[dict[str, Array]]:
    keys = jax.random.split(key, len(channels) - 1)
    gain = 2 / (1 + SLOPE**2)
    return [
        init_convolution(k, a, b, 3, positions, gain)
        for k, a, b in zip(keys, channels[:-1], channels[1:], strict=True)
    ]


def _run(layers: list[dict[str, Any]], name: str, features: Any, where: Any) -> Array:
    """Zero outside of the mask after each layer, as outside of the map: padding never spreads."""
    (x,) = as_floats(**{name: features})
    keep = as_mask(where, x.shape[:1], x.shape[:-1])[..., None]
    x = jnp.where(keep, x, 0)
    for layer in layers:
        x = jnp.where(keep, jax.nn.leaky_relu(convolve(layer, name, x), SLOPE), 0)
    return x
