"""Rate-distortion rounding of a trained model: leaf after leaf, in the order of its program."""

import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jaxcomp.arrays import CompressedArray
from jaxcomp.checks import check_amount, check_count
from jaxcomp.model.matrices import MatrixForm, from_stack, to_stack
from jaxcomp.model.second_moments import output_errors
from jaxcomp.quantize.affine import find_codes, leaf_of
from jaxcomp.quantize.formats import Format, PerTensor
from jaxcomp.quantize.post_training.walk import Quantized, Task, quantize_leaves
from jaxcomp.quantize.rate.density import (
    CodeDensity,
    fitted_density,
    magnitude_bits,
    nonzero_bits,
)
from jaxcomp.quantize.rate.rounding import CodePrices, round_with_prices
from jaxcomp.quantize.rate.training import check_signed
from jaxcomp.quantize.scales import Scales, find_scales, spread_scales
from jaxcomp.sharding import automatic


def rate_rounding(
    apply_fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any] | Callable[[], Iterable[Any]],
    penalty: float,
    rules: Any = Format(5, granularity=PerTensor()),  # noqa: B008
    *,
    rounds: int = 3,
    sweeps: int = 2,
    sequential: bool = True,
    at_once: int = 1,
    damping: float = 0.01,
    directory: str | os.PathLike | None = None,
    progress: bool | None = None,
) -> Quantized:
    """Round a trained model for the file: what each layer's outputs lose, and the bits, together.

    For each leaf ``error + penalty * bits`` is made small: the mean square error of its products'
    outputs over their mean square, and the bits of its codes in ``penalty`` of that. A pass over
    the batches gathers the second moments of what the leaf is multiplied by;
    :func:`~jaxcomp.quantize.rate.rounding.rate_round` chooses the codes, of all that there are;
    then the bits are learned anew from the codes, some rounds long. At the penalty 0 this is
    GPTQ, with sweeps after its walk.

    Steps are those that the format finds for the weights as they were. Bits are worth most where
    steps are fine and rounding finds out which weights need them: 4 to 6 bits a tensor.

    Args:
        apply_fn: a function of ``(params, *inputs)``.
        params: any tree.
        batches: see :func:`~jaxcomp.quantize.post_training.walk.quantize_leaves`.
        penalty: what a bit may cost, as a fraction of the energy of a layer's outputs.
            A leaf of ``n`` weights loses about ``n * penalty`` of it for each bit a weight saved.
        rules: a format, or formats by path pattern, see
            :func:`~jaxcomp.quantize.post_training.tasks.plan`; uniform ones, around zero.
        rounds: how often the bits are learned from the codes, and the codes chosen by the bits.
        sweeps: passes over single weights after each walk.
        sequential: whether a pass runs the model with all earlier leaves as they became, or else
            the dense one.
        at_once: leaves a pass.
        damping: what is added to a second moment, in means of its diagonal.
        directory: where finished leaves are kept, in files ``rate*.jxc``; the same call goes on
            after them, as :func:`gptq` does.
        progress: whether to show a progress bar on stderr; None: on a terminal, if it takes long.

    Returns:
        The quantized tree and a report. Leaves are :class:`QuantizedArray`, which ``save`` codes.
        What no product reads (an embedding) is rounded to nearest.

    Raises:
        ValueError: see :func:`~jaxcomp.quantize.post_training.walk.quantize_leaves`; a format that
            is affine or without zero; a penalty or damping below 0, a count below 1 (sweeps: 0).
        TypeError: likewise.
        CheckpointError: a file is damaged.

    Example:
        >>> params = {"w": jnp.array([[7.0, 0.4], [0.4, -3.5], [0.6, 2.4]])}
        >>> batches = [jnp.array([[2.0, 1.0, 1.0], [-1.0, 1.1, 0.9]])]
        >>> model = lambda p, x: x @ p["w"]
        >>> format = Format(4, granularity=PerTensor())
        >>> found = rate_rounding(model, params, batches, 1e-3, format)
        >>> found.params["w"].decode()
        Array([[ 7.,  0.],
               [ 0., -4.],
               [ 1.,  3.]], dtype=float32)

    Source: error plus bits as Wiedemann et al., "DeepCABAC", 2020, section III; errors made up for
    as Frantar et al., "GPTQ", 2022, Algorithm 1.
    """
    check_amount("penalty", penalty)
    check_amount("damping", damping)
    check_count("rounds", rounds)
    check_count("sweeps", sweeps, 0)
    for format in rules.values() if isinstance(rules, Mapping) else (rules,):
        if format is not None:
            check_signed(format)
    return quantize_leaves(
        "rate",
        apply_fn,
        params,
        batches,
        rules,
        lambda task, leaf, moment: _round(task, leaf, moment, penalty, rounds, sweeps, damping),
        sequential=sequential,
        at_once=at_once,
        directory=directory,
        progress=progress,
        call={
            "penalty": str(float(penalty)),
            "rounds": str(rounds),
            "sweeps": str(sweeps),
            "damping": str(float(damping)),
        },
    )


def _round(
    task: Task, leaf: Any, moment: Any, penalty: float, rounds: int, sweeps: int, damping: float
) -> CompressedArray:
    """One leaf; the codes of a round give the bits of the next."""
    leaf = jnp.asarray(leaf)
    format: Any = task.format
    scales, codes = automatic(partial(_nearest, format))(leaf)
    high = format.code_range[1]
    offset = high + 1
    if task.form is None or moment is None:
        return leaf_of(codes, scales, format, leaf.dtype)
    work = automatic(partial(_solve, task.form, format, sweeps))
    for _ in range(rounds):
        density = fitted_density(np.asarray(codes).astype(np.int32) - offset, high)
        signed = work(leaf, moment, scales, density, penalty, damping)
        codes = (signed + offset).astype(jnp.uint8)
    return leaf_of(codes, scales, format, leaf.dtype)


@partial(jax.jit, static_argnums=0)
def _nearest(format: Format, leaf: Array) -> tuple[Scales, Array]:
    scales = find_scales(leaf, format)
    return scales, find_codes(leaf, scales, format)[0]


@partial(jax.jit, static_argnums=(0, 1, 2))
def _solve(
    form: MatrixForm,
    format: Format,
    sweeps: int,
    leaf: Array,
    moment: Array,
    scales: Scales,
    density: CodeDensity,
    penalty: Any,
    damping: Any,
) -> Array:
    zero, nonzero = (
        jnp.broadcast_to(bits, leaf.shape) for bits in nonzero_bits(density, leaf.ndim)
    )
    weights = to_stack(form, leaf).astype(jnp.float32)
    moments = moment.reshape(-1, form.features, form.features)
    # All matrices of a leaf share its bits, and so their errors are over the energy of all.
    energy = jnp.sum(jax.vmap(lambda w, m: jnp.sum(output_errors(w, m)))(weights, moments))

    def solve(each: Any) -> Array:
        weight, moment, scale, zero, nonzero = each
        prices = CodePrices(zero, nonzero, magnitude_bits(density))
        return round_with_prices(weight, moment, scale, prices, penalty * energy, damping, sweeps)

    spread = spread_scales(scales, form.shape, format).scale
    parts = (weights, moments, *(to_stack(form, x) for x in (spread, zero, nonzero)))
    return from_stack(form, lax.map(solve, parts))
