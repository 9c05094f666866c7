"""Bring a student's features to the shape of its teacher's: channels by learning, positions not."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Shaped

from jaxcomp.distill.inputs import as_floats, as_mask, check_axis, computing_dtype


def init_projection(
    key: Any, student: Any, teacher: Any, *, axis: int = -1, bias: bool = True
) -> dict[str, Array]:
    """Parameters of a learned linear map from the student's channels to the teacher's.

    Train them by your optimizer next to the student, and leave them out of what you ship.

    Args:
        key: PRNG key; the kernel is drawn normal with variance ``1 / student channels``, so that
            projected features vary as much as the student's do.
        student: the student's features, array or ``jax.ShapeDtypeStruct``: only the size of
            ``axis`` is read.
        teacher: the teacher's, likewise.
        axis: the channel axis of both.
        bias: whether to add a learned constant to each channel, which begins at 0.

    Returns:
        ``{"kernel": (student channels, teacher channels), "bias": (teacher channels,)}`` in
        float32, without ``"bias"`` if it is not wanted.

    Raises:
        ValueError: an array lacks the axis, or it is empty.

    Example:
        >>> student, teacher = jnp.ones((2, 8, 8, 16)), jnp.ones((2, 8, 8, 64))
        >>> projection = init_projection(jax.random.key(0), student, teacher)
        >>> jax.tree.map(jnp.shape, projection)
        {'bias': (64,), 'kernel': (16, 64)}
        >>> project(projection, student).shape
        (2, 8, 8, 64)

    Romero et al., "FitNets: Hints for Thin Deep Nets", 2015, section 2.2 (the regressor).
    """
    narrow = student.shape[check_axis("student", student, axis)]
    wide = teacher.shape[check_axis("teacher", teacher, axis)]
    kernel = jax.random.normal(key, (narrow, wide), jnp.float32) / math.sqrt(narrow)
    return {"kernel": kernel} | ({"bias": jnp.zeros(wide, jnp.float32)} if bias else {})


def project(
    projection: dict[str, Any],
    features: Shaped[ArrayLike, "..."],
    *,
    axis: int = -1,
    where: Shaped[ArrayLike, "..."] | None = None,
) -> Float[Array, "..."]:
    """Features times the kernel along one axis, plus the bias: a 1x1 convolution.

    Args:
        projection: of :func:`init_projection`, or any such dict with a ``"kernel"``.
        features: float array with the kernel's first size on ``axis``.
        axis: the channel axis.
        where: boolean, (batch,) or the features' shape without ``axis``: what counts; the rest is
            read as 0. Only needed if the rest may be NaN or infinite: a loss after this has its
            own mask, but zero times NaN would reach the gradient of the kernel.

    Returns:
        ``features`` with the kernel's second size on ``axis``; float32, or float64 if an array is.

    Raises:
        TypeError: features that are not floating point, ``where`` that is not boolean.
        ValueError: the size of ``axis`` is not the kernel's, a mask that does not fit.

    Example:
        >>> projection = {"kernel": jnp.array([[1.0, 2.0]]), "bias": jnp.array([1.0, 0.0])}
        >>> print(project(projection, jnp.array([[3.0], [4.0]])))
        [[4. 6.]
         [5. 8.]]

    Romero et al., "FitNets: Hints for Thin Deep Nets", 2015, eq. 3 (the regressor).
    """
    if "kernel" not in projection:
        raise ValueError(f"projection holds {list(projection)}, but no 'kernel': init_projection.")
    kernel = jnp.asarray(projection["kernel"])
    features, kernel = as_floats(features=features, kernel=kernel)
    axis = check_axis("features", features, axis)
    if features.shape[axis] != kernel.shape[0]:
        message = f"features {features.shape} must have {kernel.shape[0]} channels on axis {axis}"
        raise ValueError(f"{message}, as the kernel {kernel.shape} has: pass the right axis=.")
    features = jnp.moveaxis(features, axis, -1)
    if where is not None:
        shape = features.shape
        features = jnp.where(as_mask(where, shape[:1], shape[:-1], shape), features, 0)
    projected = features @ kernel
    if "bias" in projection:
        projected = projected + jnp.asarray(projection["bias"]).astype(projected.dtype)
    return jnp.moveaxis(projected, -1, axis)


def resize(
    features: Shaped[ArrayLike, "..."], sizes: Sequence[int], *, axis: int = -1
) -> Float[Array, "..."]:
    """Feature maps at another resolution: averaged down, interpolated up.

    An axis that shrinks is cut into as many runs as it shall have positions, which are averaged;
    runs overlap where the sizes do not divide (adaptive average pooling). An axis that grows is
    interpolated linearly. Nothing is learned.

    Args:
        features: float array (batch, positions..., channels), or with the channels on ``axis``.
        sizes: of the position axes, in their order; a teacher's are ``teacher.shape[1:-1]``.
        axis: the channel axis.

    Returns:
        ``features`` with those sizes; float32, or float64 if the features are.

    Raises:
        TypeError: features that are not floating point.
        ValueError: a size that is not positive, or not one for each position axis.

    Example:
        >>> print(resize(jnp.array([[[1.0], [3.0], [5.0], [7.0]]]), (2,)))
        [[[2.]
          [6.]]]
        >>> resize(jnp.ones((2, 7, 7, 16)), (14, 4)).shape
        (2, 14, 4, 16)

    Zagoruyko and Komodakis, "Paying More Attention to Attention", 2017, section 3.1, interpolates.
    """
    (x,) = as_floats(features=features)
    axis = check_axis("features", x, axis)
    if not isinstance(sizes, Sequence):
        raise TypeError(f"sizes must be one for each position axis, not {sizes!r:.60}")
    positions = [i for i in range(1, x.ndim) if i != axis]
    if axis == 0 or len(positions) != len(sizes) or any(size < 1 for size in sizes):
        message = f"sizes {tuple(sizes)} must be positive, one for each position axis of features"
        raise ValueError(f"{message} {x.shape} (batch, *positions, channels).")
    larger = list(x.shape)
    for i, size in zip(positions, sizes, strict=True):
        if size < x.shape[i]:
            averages = jnp.asarray(_averages(x.shape[i], size), computing_dtype(x))
            pooled = jnp.tensordot(x, averages, (i, 1), precision=jax.lax.Precision.HIGHEST)
            x = jnp.moveaxis(pooled, -1, i)
        larger[i] = size
    return x if x.shape == tuple(larger) else jax.image.resize(x, larger, "linear")


def _averages(size: int, smaller: int) -> np.ndarray:
    """(smaller, size): each row averages a run of positions."""
    begin = np.arange(smaller) * size // smaller
    end = -(-np.arange(1, smaller + 1) * size // smaller)
    position = np.arange(size)
    inside = (position >= begin[:, None]) & (position < end[:, None])
    return inside / inside.sum(1, keepdims=True)
