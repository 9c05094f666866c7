"""Tucker's decomposition of the two channel axes of a convolution's kernel."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxcomp.checks import check_count


def tucker2(
    kernel: Float[Any, "inputs window outputs"],
    ranks: tuple[int, int],
    iterations: int = 10,
) -> tuple[Array, Array, Array]:
    """Factors of a kernel whose inputs and outputs are of low rank: ``ia,akb,bo->iko``.

    Begins with the leading singular vectors of each unfolding (HOSVD), then finds those of each
    axis anew with the other one projected (HOOI), which never does worse.

    Args:
        kernel: the window joined to one axis; computed in float32.
        ranks: of the inputs and of the outputs, at least 1; at most their sizes, and the inputs' at
            most window × the outputs', and the other way round. At full ranks the product is the
            kernel, to rounding.
        iterations: of HOOI; 0 is HOSVD.

    Returns:
        ``(inputs, a)`` and ``(b, outputs)``, orthonormal but for rounding, and the core
        ``(a, window, b)`` between them. float32.

    Raises:
        ValueError: other ranks.
        TypeError: a rank or ``iterations`` is no whole number.

    Example:
        >>> down, core, up = tucker2(jnp.ones((4, 9, 6)), (1, 1))
        >>> jnp.einsum("ia,akb,bo->iko", down, core, up)[0, 0].round(4)
        Array([1., 1., 1., 1., 1., 1.], dtype=float32)

    Source: Kim et al., "Compression of Deep Convolutional Neural Networks for Fast and Low Power
    Mobile Applications", 2016, section 3.1; De Lathauwer et al., "On the best rank-1 and
    rank-(R1, ..., RN) approximation of higher-order tensors", 2000, for HOOI.
    """
    check_count("iterations", iterations, least=0)
    check_ranks(kernel.shape, ranks)
    return decompose(jnp.asarray(kernel), (ranks[0], ranks[1]), iterations)


def check_ranks(shape: tuple[int, ...], ranks: Any) -> None:
    """Raise unless these can be the ranks of a kernel ``(inputs, window, outputs)``.

    Raises:
        TypeError: one is no whole number.
        ValueError: they cannot.

    Example:
        >>> check_ranks((4, 9, 6), (2, 7))
        Traceback (most recent call last):
        ...
        ValueError: rank of the outputs is 7, above its largest, 6
    """
    if len(shape) != 3 or 0 in shape:
        raise ValueError(f"a kernel of shape {tuple(shape)} is not (inputs, window, outputs)")
    inputs, window, outputs = shape
    limits = (min(inputs, window * outputs), min(outputs, window * inputs))
    for name, rank, most in zip(("inputs", "outputs"), ranks, limits, strict=True):
        check_count(f"rank of the {name}", rank)
        if rank > most:
            raise ValueError(f"rank of the {name} is {rank}, above its largest, {most}")
    if ranks[0] > window * ranks[1] or ranks[1] > window * ranks[0]:
        raise ValueError(f"ranks {tuple(ranks)} differ by more than the window's {window} places")


@partial(jax.jit, static_argnums=(1, 2))
def decompose(kernel: Array, ranks: tuple[int, int], iterations: int) -> tuple[Array, Array, Array]:
    """:func:`tucker2` without its checks.

    Args:
        kernel: as there.
        ranks: as there.
        iterations: as there.
    """
    kernel = kernel.astype(jnp.float32)
    down = _leading(jnp.einsum("iko,jko->ij", kernel, kernel, precision=_FULL), ranks[0])
    up = _leading(jnp.einsum("iko,ikp->op", kernel, kernel, precision=_FULL), ranks[1])

    def turn(_: Any, both: tuple[Array, Array]) -> tuple[Array, Array]:
        down, up = both
        seen = jnp.einsum("iko,ob->ikb", kernel, up, precision=_FULL)
        down = _leading(jnp.einsum("ikb,jkb->ij", seen, seen, precision=_FULL), ranks[0])
        seen = jnp.einsum("iko,ia->ako", kernel, down, precision=_FULL)
        up = _leading(jnp.einsum("ako,akp->op", seen, seen, precision=_FULL), ranks[1])
        return down, up

    down, up = lax.fori_loop(0, iterations, turn, (down, up))
    core = jnp.einsum("iko,ia,ob->akb", kernel, down, up, precision=_FULL)
    return down, core, up.T


_FULL = lax.Precision.HIGHEST


def _leading(gram: Array, rank: int) -> Array:
    """The leading eigenvectors of a symmetric matrix, as columns."""
    return jnp.linalg.eigh(gram)[1][:, ::-1][:, :rank]
