"""Sums over batches, taken one at a time: what all evidence is made of."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp import tree as tree_lib
from jaxcomp.model.batches import checked, spread
from jaxcomp.model.progress import watched
from jaxcomp.prune.widened import wide_zeros


def add_up(
    term: Callable[..., Any],
    shapes: tuple[Mapping[str, Any], ...],
    given: Any,
    batches: Iterable[Any],
    words: str,
    progress: bool | None = None,
) -> tuple[tuple[tree_lib.Leaves, ...], int]:
    """Sum what a function gives for each batch, in place and at least in float32.

    Args:
        term: ``term(given, number, *batch)``, a tuple of selections; ``number`` counts batches.
        shapes: one selection of arrays like each of these; sums are placed as they are.
        given: what the function needs beside the batch; any pytree.
        batches: an iterable.
        words: what is being computed, for progress bar and messages.
        progress: see :func:`gradients`.

    Returns:
        The sums, and the number of batches.

    Raises:
        ValueError: there are no batches, or a term is NaN or infinite; names leaf and batch.

    Example:
        >>> term = lambda given, number, x: ({"kernel": x * number},)
        >>> add_up(term, ({"kernel": jnp.zeros(1)},), None, [jnp.ones(1), jnp.ones(1)], "sums")
        (({'kernel': Array([1.], dtype=float32)},), 2)
    """
    names = [path for part in shapes for path in part]

    @functools.partial(jax.jit, donate_argnums=0)
    def step(totals: Any, given: Any, number: Any, batch: tuple[Any, ...]) -> Any:
        terms = tuple(map(tree_lib.Leaves, term(given, number, *batch)))
        totals = jax.tree.map(lambda total, new: total + new.astype(total.dtype), totals, terms)
        finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(totals)]
        return totals, finite

    def check(number: int, finite: Any) -> None:
        bad = [path for path, fine in zip(names, jax.device_get(finite), strict=True) if not fine]
        if bad:
            more = f", and of {len(bad) - 1} more" if len(bad) > 1 else ""
            raise ValueError(
                f"batch {number}: {bad[0]}: its {words}{more} are NaN or infinite: mend this "
                "batch, or the parameters"
            )

    totals = tuple(
        tree_lib.Leaves((path, wide_zeros(leaf)) for path, leaf in part.items()) for part in shapes
    )
    number, pending = -1, None
    for number, batch in enumerate(watched(checked(batches), words, progress)):
        totals, finite = step(totals, given, np.int32(number), spread(batch))
        # The device works on this batch while the last one is looked at, so it never idles.
        if pending is not None:
            check(*pending)
        pending = number, finite
    if pending is None:
        raise ValueError("batches is empty: give at least one batch")
    check(*pending)
    return totals, number + 1
