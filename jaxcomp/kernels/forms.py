"""Which form of an operation runs: XLA's, or a kernel of our own where the platform has one.

An operation has an ``xla`` form, which runs everywhere, and forms written with Pallas: ``triton``
for NVIDIA's chips, ``mosaic_gpu`` for Hopper alone, ``mosaic_tpu`` for Google's. They compute the
same.
"""

import functools
import math
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
from jax import lax

from jaxcomp.kernels.tables import IMPLEMENTATIONS, Row, note, row_for

# The platforms as JAX lowers for them, and the forms written for each: the first that takes the
# arrays is taken where none was measured.
PLATFORMS = {"cuda": ("triton", "mosaic_gpu"), "tpu": ("mosaic_tpu",)}


class Kernel(NamedTuple):
    """One form of an operation, written with Pallas.

    Attributes:
        run: ``run(*arrays, interpret=..., **tile)``; ``tile`` are static sizes.
        unfit: ``unfit(*arrays) -> str | None``: why it does not take arrays of these shapes and
            dtypes, or None.
        tiles: sizes to try when it is tuned; the first is taken where it was not.
        tuned_only: whether it is taken only where it was measured, or asked for by name: where not
            every chip of the platform has its instructions.
    """

    run: Callable[..., Any]
    unfit: Callable[..., str | None]
    tiles: tuple[Mapping[str, int], ...] = ({},)
    tuned_only: bool = False


class Choice(NamedTuple):
    """A form and its sizes, as tuning found them.

    Attributes:
        implementation: one of :data:`IMPLEMENTATIONS`.
        tile: static sizes of a Pallas form; empty for ``xla``.
    """

    implementation: str
    tile: Mapping[str, int] = {}


def choose(
    operation: str,
    xla: Callable[..., Any],
    kernels: Mapping[str, Kernel],
    arrays: tuple[Any, ...],
    implementation: Any = None,
    examples: Callable[[Any], tuple[Any, ...]] | None = None,
) -> Any:
    """Run an operation in the form that is asked for, or the best that its platform has.

    A Pallas form that is asked for by name runs in Pallas's interpreter where the platform is a
    CPU: right, and slow.

    Args:
        operation: its name, for messages.
        xla: the form that runs everywhere.
        kernels: the others by implementation.
        arrays: what they take; leaves of pytrees count, too.
        implementation: one of :data:`IMPLEMENTATIONS`; None for what :func:`tuned` says, or the
            best that takes these arrays.
        examples: ``examples(rng)`` makes arrays to tune with, where random numbers will not do.

    Returns:
        What the forms return.

    Raises:
        ValueError: the implementation is unknown, not written for this operation, or does not take
            these arrays.

    Example:
        >>> import jax.numpy as jnp
        >>> choose("double", lambda x: 2 * x, {}, (jnp.ones(2),))
        Array([2., 2.], dtype=float32)
        >>> choose("double", lambda x: 2 * x, {}, (jnp.ones(2),), "triton")
        Traceback (most recent call last):
        ...
        ValueError: double has no form 'triton': take None or one of ['xla']
    """
    written = ["xla", *(name for name in IMPLEMENTATIONS if name in kernels)]
    if implementation is not None and implementation not in written:
        raise ValueError(
            f"{operation} has no form {implementation!r}: take None or one of {written}"
        )
    # A kernel of nothing has no tiles.
    if implementation == "xla" or any(
        math.prod(each.shape) == 0 for each in jax.tree.leaves(arrays)
    ):
        return xla(*arrays)
    if implementation is not None:
        reason = kernels[implementation].unfit(*arrays)
        if reason:
            raise ValueError(f"{operation}, {implementation}: {reason}")
        kernel = kernels[implementation]
        return _differentiable(partial(_on_any, kernel, kernel.tiles[0]), xla)(*arrays)
    note(operation, xla, kernels, arrays, examples)
    row = row_for(operation, arrays)
    if row is not None and row.implementation == "xla":
        return xla(*arrays)
    forms = {
        platform: form
        for platform in PLATFORMS
        if (form := _best(operation, platform, kernels, arrays, row))
    }
    if not forms:
        return xla(*arrays)
    return _differentiable(partial(lax.platform_dependent, **forms, default=xla), xla)(*arrays)


def _differentiable(run: Callable[..., Any], xla: Callable[..., Any]) -> Callable[..., Any]:
    """A form with the derivatives of XLA's, for those who differentiate a gradient again."""
    form = jax.custom_vjp(lambda *arrays: run(*arrays))
    form.defvjp(
        lambda *arrays: (run(*arrays), arrays), lambda arrays, dy: jax.vjp(xla, *arrays)[1](dy)
    )
    return form


def run_choice(
    xla: Callable[..., Any], kernels: Mapping[str, Kernel], arrays: tuple[Any, ...], choice: Choice
) -> Any:
    """Run an operation in one form with one tile, as tuning does; arguments as for :func:`choose`.

    Example:
        >>> run_choice(lambda x: x + 1, {}, (1,), Choice("xla"))
        2
    """
    if choice.implementation == "xla":
        return xla(*arrays)
    return _on_any(kernels[choice.implementation], choice.tile, *arrays)


def _on_any(kernel: Kernel, tile: Mapping[str, int], *arrays: Any) -> Any:
    interpreted = functools.partial(kernel.run, interpret=True, **tile)
    compiled = functools.partial(kernel.run, interpret=False, **tile)
    return lax.platform_dependent(*arrays, cpu=interpreted, default=compiled)


def _best(
    operation: str,
    platform: str,
    kernels: Mapping[str, Kernel],
    arrays: tuple[Any, ...],
    row: Row | None,
) -> Callable[..., Any] | None:
    """The form of a platform; None for XLA's, which is said once where it is a makeshift."""
    reasons = {
        name: kernels[name].unfit(*arrays) for name in PLATFORMS[platform] if name in kernels
    }
    fits = [name for name, reason in reasons.items() if reason is None]
    if row is not None and row.implementation in PLATFORMS[platform]:
        name, tile = row.implementation, dict(row.tile)
        if name in fits and tile in map(dict, kernels[name].tiles):
            return functools.partial(kernels[name].run, interpret=False, **tile)
        _say_once(f"{operation}: the table's {name} {tile} is no form of it here: tune it anew")
    untuned = [name for name in fits if not kernels[name].tuned_only]
    if untuned:
        kernel = kernels[untuned[0]]
        return functools.partial(kernel.run, interpret=False, **kernel.tiles[0])
    reasons |= dict.fromkeys(fits, "taken only where it was tuned")
    if reasons and jax.default_backend() in (platform, {"cuda": "gpu"}.get(platform)):
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        _say_once(f"{operation} runs as XLA compiles it: {why}")
    return None


@functools.cache
def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=5)
