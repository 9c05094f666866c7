"""Run a function on parameters that lost channels."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxcomp.arrays import decode
from jaxcomp.model.couple import Coupling
from jaxcomp.model.cut import Cut, Positions, resolve, shape_of
from jaxcomp.model.dims import Dim, find
from jaxcomp.model.flow import follow
from jaxcomp.model.law import hold
from jaxcomp.model.program import Program, holds_tracers, read
from jaxcomp.model.smaller import run

# By path.
Kept = Mapping[str, Positions]


def rewrite(
    apply_fn: Callable[..., Any], params: Any, cut: Kept, renormalize: bool = False
) -> Callable[..., Any]:
    """A function of full-size parameters as a function of smaller ones.

    The function is traced at full size for each new shape of its inputs, its axes are followed
    anew, and its operations are bound again without the channels that were cut: a pure function
    that can be jitted, differentiated, vmapped and sharded. Its own outputs shrink where they have
    such channels, as updated ``batch_stats`` do.

    Args:
        apply_fn: a function of ``(params, *inputs)``; that which was cut, or another one of the
            same parameters, such as the training step's.
        params: the full-size parameters; only their shapes and dtypes are used.
        cut: by path, for each axis the positions that stay, ascending; None for all.
        renormalize: allow cuts that change a mean or maximum over channels; a mean is then taken
            over those that remain.

    Returns:
        The function of smaller parameters, of any dtypes; compressed leaves are decoded where they
        are used. It raises ``ValueError`` with the leaf and the
        operation if the cut does not fit ``apply_fn``, before anything is computed.

    Example:
        >>> import jax.numpy as jnp
        >>> full = {"w0": jnp.ones((3, 8)), "w1": jnp.ones((8, 2))}
        >>> keep = np.array([0, 1, 2, 4, 6, 7])
        >>> smaller = rewrite(
        ...     lambda p, x: x @ p["w0"] @ p["w1"], full, {"w0": (None, keep), "w1": (keep, None)}
        ... )
        >>> smaller({"w0": jnp.ones((3, 6)), "w1": jnp.ones((6, 2))}, jnp.ones((1, 3)))
        Array([[18., 18.]], dtype=float32)
    """
    full = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    cuts: dict[Any, tuple[Program, Cut]] = {}

    def smaller(params: Any, *inputs: Any) -> Any:
        params = decode(params)
        leaves, arguments = _leaves(params, full), jax.tree.leaves(inputs)
        dtypes = tuple(leaf.dtype for leaf in leaves)
        # An analysis depends on nothing but structure, shapes and dtypes, so it may be kept.
        key = (jax.tree.structure(inputs), dtypes, tuple(map(jax.typeof, arguments)))
        if key in cuts:
            program, resolved = cuts[key]
        else:
            given = jax.tree.map(
                lambda leaf, whole: jax.ShapeDtypeStruct(whole.shape, leaf.dtype), params, full
            )
            program = read(apply_fn, given, *inputs)
            flow = follow(program)
            means = hold(flow, program, renormalize).means
            resolved = resolve(flow, means, program.leaves, cut)
            if not holds_tracers(program):
                cuts[key] = program, resolved
        _check_shapes(leaves, program, resolved)
        results = run(resolved, program.block, (*leaves, *arguments))
        return jax.tree.unflatten(program.out_tree, results)

    return smaller


def smaller_shapes(coupling: Coupling, keep: Mapping[Dim, np.ndarray]) -> Any:
    """A function from values to their shapes after a cut.

    Args:
        coupling: an analysed program.
        keep: which units stay, by atom.

    Returns:
        ``shape(value)``.
    """
    sizes: dict[Dim, int] = {atom: int(mask.sum()) for atom, mask in keep.items()}

    def size(dim: Dim) -> int:
        dim = find(dim)
        if dim in sizes:
            return sizes[dim]
        if dim.parts:
            return sum(size(part) for part in dim.parts)
        return int(np.prod([size(f) for f in dim.factors])) if dim.factors else dim.size

    return lambda value: tuple(size(dim) for dim in coupling.flow.of(value))


def _leaves(params: Any, full: Any) -> list[Any]:
    structure, expected = jax.tree.structure(params), jax.tree.structure(full)
    if structure != expected:
        raise ValueError(
            f"params: {structure} is not the structure of the model that was cut, {expected}"
        )
    return jax.tree.leaves(params)


def _check_shapes(leaves: list[Any], program: Program, cut: Cut) -> None:
    for leaf, (path, value) in zip(leaves, program.leaves.items(), strict=True):
        expected = shape_of(cut, value)
        if tuple(leaf.shape) != expected:
            raise ValueError(
                f"{path}: shape {tuple(leaf.shape)}, but the smaller model has {expected}: "
                "pass the smaller parameters"
            )
