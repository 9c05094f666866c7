"""Neuron selectivity transfer: what the student's channels respond to, as a distribution."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Shaped

from jaxcomp.distill.inputs import check_positive, normalized
from jaxcomp.distill.intermediate.layouts import as_maps, check_same_positions


def neuron_selectivity_loss(
    student: Shaped[ArrayLike, "..."],
    teacher: Shaped[ArrayLike, "..."],
    *,
    kernel: str = "polynomial",
    bandwidth: ArrayLike | None = None,
    axis: int = -1,
    where: Shaped[ArrayLike, "..."] | None = None,
) -> Float[Array, "batch"]:
    """Maximum mean discrepancy between the channels' patterns over positions, per example.

    A channel is a point: its responses at all positions, scaled to unit length. The loss is the
    squared MMD between the student's points and the teacher's, so their numbers may differ and no
    channel is matched with another. The paper weighs it by ``lambda / 2``.

    Both arguments are differentiated; put ``jax.lax.stop_gradient`` around a teacher that is also
    a function of what you train. Rounding can leave a loss near 0 at -1e-7.

    Args:
        student: float array (batch, positions..., channels), or with the channels on ``axis``.
        teacher: float array of the same batch and positions; its channels may differ in number.
        kernel: of two points ``x`` and ``y``: ``"linear"``, ``x·y``; ``"polynomial"``,
            ``(x·y)**2``; ``"gaussian"``, ``exp(-|x - y|**2 / (2 bandwidth))``.
        bandwidth: positive scalar, possibly traced, of the Gaussian kernel: ``sigma**2``. The
            default is each example's mean of ``|x - y|**2`` over all pairs of different channels
            of both, which gradients take for a constant.
        axis: the channel axis of both.
        where: boolean (batch,) or (batch, positions...): what counts. An example without any has
            a loss of 0.

    Returns:
        (batch,); float32, or float64 if an array is.

    Raises:
        TypeError: arrays that are not floating point, ``where`` that is not boolean.
        ValueError: shapes that do not fit, an unknown kernel, a bandwidth that is not positive or
            that the kernel lacks.

    Example:
        >>> student = jnp.array([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 0.0]]])
        >>> teacher = jnp.array([[[0.0, 2.0], [3.0, 0.0]], [[0.0, 0.0], [1.0, 0.0]]])
        >>> print(neuron_selectivity_loss(student, teacher))
        [0.  0.5]

    Huang and Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer", 2017,
    section 4.
    """
    if kernel not in ("linear", "polynomial", "gaussian"):
        raise ValueError(f'kernel {kernel!r} must be "linear", "polynomial" or "gaussian".')
    if bandwidth is not None and kernel != "gaussian":
        raise ValueError(f'bandwidth {bandwidth} is of kernel="gaussian", not of {kernel!r}.')
    (s, t), (keep, _) = as_maps(axis, where, student=student, teacher=teacher)
    check_same_positions(student=s, teacher=t)
    if bandwidth is not None:
        bandwidth = check_positive("bandwidth", bandwidth, jnp.float32).astype(s.dtype)
    some = jnp.any(keep, range(1, keep.ndim))
    return _loss(s, t, some, bandwidth, kernel)


@functools.partial(jax.jit, static_argnames="kernel")
def _loss(
    student: Array, teacher: Array, keep: Array, bandwidth: Array | None, kernel: str
) -> Array:
    points = [normalized(x.reshape(len(x), -1, x.shape[-1]), 1) for x in (student, teacher)]
    both = jnp.concatenate(points, -1)
    products = jnp.einsum("bpi,bpj->bij", both, both, precision=jax.lax.Precision.HIGHEST)
    # The mean of the student's points less that of the teacher's, in the kernel's space.
    counts = [x.shape[-1] for x in points]
    signed = [jnp.full(count, sign / count) for sign, count in zip((1, -1), counts, strict=True)]
    share = jnp.concatenate(signed).astype(both.dtype)
    values = _kernel(products, bandwidth, kernel)
    losses = jnp.einsum("i,bij,j->b", share, values, share, precision=jax.lax.Precision.HIGHEST)
    return jnp.where(keep, losses, 0)


def _kernel(products: Array, bandwidth: Array | None, kernel: str) -> Array:
    """(batch, points, points), from the points' products."""
    if kernel == "linear":
        return products
    if kernel == "polynomial":
        return jnp.square(products)
    squares = jnp.diagonal(products, axis1=1, axis2=2)
    distances = jnp.maximum(squares[:, :, None] + squares[:, None, :] - 2 * products, 0)
    if bandwidth is None:
        count = distances.shape[1]
        spread = jnp.sum(distances, (1, 2), keepdims=True) / (count * (count - 1))
        # Points that differ by rounding alone are one point.
        bandwidth = jnp.maximum(jax.lax.stop_gradient(spread), 32 * jnp.finfo(spread.dtype).eps)
    return jnp.exp(-distances / (2 * bandwidth))
