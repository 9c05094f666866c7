"""What the table of products says of one."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np


class Product(NamedTuple):
    """One product.

    Attributes:
        make: ``make(rng, inputs, outputs, dtype) -> weight``: a pytree, what the matrix is.
        run: ``run(x, weight, implementation=None) -> y``.
        dense: ``dense(weight) -> matrix``, exact, as NumPy's float64.
        trained: ``trained(weight, floats) -> weight`` with other floats in place of those that are
            differentiated; None where only ``x`` is.
        floats: what is differentiated, taken out of the weight.
        rounded: how ``x`` is rounded before it is multiplied, in NumPy; None: not at all.
        forms: Pallas forms, besides ``xla``.
        dtypes: of activations and weight that they take; the first is what most tests take.
        fits: sizes ``(inputs, outputs)`` that all forms take.
        odd: sizes that only ``xla`` takes.
    """

    make: Callable[..., Any]
    run: Callable[..., Any]
    dense: Callable[[Any], np.ndarray]
    floats: Callable[[Any], Any] | None = None
    trained: Callable[[Any, Any], Any] | None = None
    rounded: Callable[[np.ndarray], np.ndarray] | None = None
    forms: tuple[str, ...] = ("triton", "mosaic_tpu")
    dtypes: tuple[Any, ...] = (jnp.float32, jnp.bfloat16)
    fits: tuple[int, int] = (512, 256)
    odd: tuple[tuple[int, int], ...] = ((1, 1), (3, 5), (257, 130))


def exact(x: Any) -> np.ndarray:
    return np.asarray(x).astype(np.float64)
