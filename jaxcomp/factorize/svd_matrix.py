"""The best matrix of a rank, by itself or for the inputs that it meets.

Without inputs that is the truncated singular value decomposition of W (Eckart and Young, 1936).
With samples x of second moment H = E[x xᵀ] = SᵀS, a change D of W moves the outputs x W by
tr(Dᵀ H D) = |S D|² in the mean square. The best Ŵ has S Ŵ = the truncated S W; with V the leading
right singular vectors of S W that is Ŵ = W V Vᵀ, so S is never inverted, and may be singular.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from jaxcomp.checks import check_amount, check_count
from jaxcomp.model.second_moments import check_matrix, dot

_DAMPING = 1e-6


def svd_matrix(
    weight: Float[Any, "..."], rank: Any
) -> tuple[Float[Array, "*stack features rank"], Float[Array, "*stack rank outputs"]]:
    """The factors of the best matrix of a rank in the mean square.

    Both factors have an equal share of each singular value. Where that is zero the left factor is
    zero and the right one is not, so that a gradient still reaches the left one.

    Args:
        weight: the matrix, or a stack of them; computed in float32.
        rank: 1 to the smaller size of a matrix. At that size the product is the matrix itself, to
            within 4 eps √rank |W| (Frobenius norms, eps of float32).

    Returns:
        Left and right factors, float32.

    Raises:
        ValueError: another rank, NaN or infinite weights.
        TypeError: the rank is no whole number.

    Example:
        >>> left, right = svd_matrix(jnp.array([[3.0, 0.0], [0.0, 1.0]]), 1)
        >>> (left @ right).round(4)
        Array([[3., 0.],
               [0., 0.]], dtype=float32)

    Source: Eckart and Young, "The approximation of one matrix by another of lower rank", 1936.
    """
    check_rank("rank", rank, weight.shape)
    _check_finite("weight", weight)
    return truncate(jnp.asarray(weight), rank)


def whitened_svd_matrix(
    weight: Float[Any, "features outputs"],
    second_moment: Float[Any, "_ _"],
    rank: Any,
    damping: Any = _DAMPING,
) -> tuple[Float[Array, "features rank"], Float[Array, "rank outputs"]]:
    """The factors of the matrix of a rank that moves the outputs least.

    Its outputs are never further from those of the weight than those of :func:`svd_matrix` are,
    whatever the damping.

    Args:
        weight: W, computed in float32.
        second_moment: H, the mean of x xᵀ; may be singular.
        rank: as for :func:`svd_matrix`.
        damping: what is added to H, in means of its diagonal. It decides between what the samples
            do not tell apart, for the weights themselves.

    Returns:
        Left and right factors, float32.

    Raises:
        TypeError: something is no array or no number.
        ValueError: shapes that do not fit, another rank, NaN or infinite values, a damping below 0.

    Example:
        The second feature, which is larger, is never seen:

        >>> weight, moment = jnp.diag(jnp.array([1.0, 5.0])), jnp.diag(jnp.array([1.0, 0.0]))
        >>> left, right = whitened_svd_matrix(weight, moment, 1)
        >>> (left @ right)[0].round(4)
        Array([1., 0.], dtype=float32)

    Source: Wang et al., "SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language
    Model Compression", 2024, section 3.1; the projection is that of its closed form.
    """
    check_matrix(weight, second_moment, damping)
    check_rank("rank", rank, weight.shape)
    return truncate_whitened(jnp.asarray(weight), jnp.asarray(second_moment), rank, damping)


@partial(jax.jit, static_argnums=1)
def truncate(weight: Array, rank: int) -> tuple[Array, Array]:
    """:func:`svd_matrix` without its checks.

    Args:
        weight: as there.
        rank: as there.
    """
    left, values, right = jnp.linalg.svd(weight.astype(jnp.float32), full_matrices=False)
    return _balanced(left[..., :rank], values[..., :rank], right[..., :rank, :])


@partial(jax.jit, static_argnums=2)
def truncate_whitened(weight: Array, moment: Array, rank: int, damping: Any) -> tuple[Array, Array]:
    """:func:`whitened_svd_matrix` without its checks, for stacks too.

    Args:
        weight: as there.
        moment: as there.
        rank: as there.
        damping: as there.
    """
    if rank == min(weight.shape[-2:]):
        # The whole matrix is the best whatever its inputs, and needs no inputs to be exact.
        return truncate(weight, rank)
    weight = weight.astype(jnp.float32)
    seen = _whitened(weight, moment, damping)
    right = jnp.linalg.svd(seen, full_matrices=False)[2][..., :rank, :]
    left = dot(weight, jnp.swapaxes(right, -1, -2))
    norms = jnp.linalg.norm(left, axis=-2)
    unit = left / jnp.where(norms > 0, norms, 1)[..., None, :]
    return _balanced(unit, norms, right)


def _balanced(left: Array, values: Array, right: Array) -> tuple[Array, Array]:
    """Singular values shared equally; all on the right where they are nothing."""
    largest = jnp.max(values, axis=-1, keepdims=True)
    largest = jnp.where(largest > 0, largest, 1)
    tiny = values <= 1e-12 * largest
    share = jnp.sqrt(jnp.where(tiny, largest, values))
    return left * (values / share)[..., None, :], share[..., None] * right


def _whitened(weight: Array, moment: Array, damping: Any) -> Array:
    """S W, for H scaled to a mean diagonal of 1 and damped."""
    moment = moment.astype(jnp.float32)
    mean = jnp.mean(jnp.diagonal(moment, axis1=-2, axis2=-1), axis=-1)[..., None, None]
    moment = moment / jnp.where(mean > 0, mean, 1)
    values, vectors = jnp.linalg.eigh(moment)
    # Rounding makes some of a singular moment negative.
    root = jnp.sqrt(jnp.maximum(values, 0) + jnp.asarray(damping, jnp.float32))
    return root[..., :, None] * dot(jnp.swapaxes(vectors, -1, -2), weight)


@jax.jit
def singular_values(
    weight: Float[Array, "*stack features outputs"],
    moment: Float[Array, "*stack features features"] | None = None,
    damping: Any = _DAMPING,
) -> Float[Array, "*stack values"]:
    """The singular values of a matrix, or of S W.

    Args:
        weight: W, or a stack.
        moment: H, or None.
        damping: as for :func:`whitened_svd_matrix`.

    Returns:
        float32, descending. Of S W they are those of H scaled to a mean diagonal of 1.

    Example:
        >>> singular_values(jnp.array([[3.0, 0.0], [0.0, 1.0]]))
        Array([3., 1.], dtype=float32)
    """
    weight = weight.astype(jnp.float32)
    seen = weight if moment is None else _whitened(weight, moment, damping)
    return jnp.linalg.svd(seen, compute_uv=False)


def rank_for_energy(values: Float[Any, "*stack values"], energy: Any) -> int:
    """The smallest rank that keeps a share of the squared singular values.

    Args:
        values: singular values, descending; of a stack, the one that needs most decides.
        energy: the share, above 0 and at most 1; to within the rounding of float32.

    Returns:
        At least 1; 1 for zeros.

    Raises:
        ValueError: another share.
        TypeError: it is no number.

    Example:
        >>> rank_for_energy(np.array([2.0, 1.0, 0.0]), 0.8), rank_for_energy(np.zeros(3), 1.0)
        (1, 1)
    """
    check_energy(energy)
    squares = np.asarray(values, np.float64) ** 2
    kept = np.cumsum(squares, axis=-1)
    total = kept[..., -1:]
    # Float32 leaves a millionth of the largest value where there is nothing.
    enough = kept >= energy * total - 1e-12 * total
    return int(np.max(np.argmax(enough, axis=-1))) + 1


def largest_saving_rank(features: int, outputs: int) -> int:
    """The largest rank whose two factors hold fewer numbers than the matrix; 0 if none does.

    Example:
        >>> largest_saving_rank(64, 64), largest_saving_rank(10, 1)
        (31, 0)
    """
    return (features * outputs - 1) // (features + outputs)


def check_energy(energy: Any) -> None:
    """Raise unless an energy is above 0 and at most 1.

    Raises:
        TypeError: it is no number.
        ValueError: it is another one.

    Example:
        >>> check_energy(0.9)
    """
    check_amount("energy", energy)
    if not 0 < energy <= 1:
        raise ValueError(f"energy is {energy}: a share above 0 and at most 1 is needed")


def check_rank(name: str, rank: Any, shape: tuple[int, ...]) -> None:
    """Raise unless a rank is one that a matrix of a shape can have.

    Args:
        name: for the message.
        rank: what was given.
        shape: whose last two sizes are the matrix's.

    Raises:
        TypeError: it is no whole number.
        ValueError: no matrix, one without elements, a rank below 1 or above the smaller size.

    Example:
        >>> check_rank("rank", 3, (2, 5))
        Traceback (most recent call last):
        ...
        ValueError: rank is 3: a matrix of 2 × 5 has at most rank 2
    """
    if len(shape) < 2:
        raise ValueError(f"an array of shape {tuple(shape)} is no matrix: it has no rank")
    features, outputs = shape[-2:]
    if 0 in shape:
        raise ValueError(f"an array of shape {tuple(shape)} has no elements, and no rank")
    check_count(name, rank)
    if rank > min(features, outputs):
        raise ValueError(
            f"{name} is {rank}: a matrix of {features} × {outputs} has at most rank "
            f"{min(features, outputs)}"
        )


def _check_finite(name: str, array: Any) -> None:
    if isinstance(array, Tracer):
        return
    if not bool(np.all(np.isfinite(np.asarray(array, np.float32)))):
        raise ValueError(f"{name} has NaN or infinite values: mend the weights before compressing")
