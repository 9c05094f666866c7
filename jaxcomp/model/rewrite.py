"""Run a function on parameters that lost channels."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxcomp.model.couple import Coupling
from jaxcomp.model.cut import Cut, Positions, resolve, shape_of
from jaxcomp.model.dims import Dim, find
from jaxcomp.model.flow import follow
from jaxcomp.model.law import hold
from jaxcomp.model.program import Program, read
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
        The function of smaller parameters. It raises ``ValueError`` with the leaf and the
        operation if the cut does not fit ``apply_fn``, before anything is computed.

    Example:
        >>> full = {"w0": jnp.ones((3, 8)), "w1": jnp.ones((8, 2))}
        >>> keep = np.array([0, 1, 2, 4, 6, 7])
        >>> smaller = rewrite(
        ...     lambda p, x: x @ p["w0"] @ p["w1"], full, {"w0": (None, keep), "w1": (keep, None)}
        ... )
        >>> smaller({"w0": jnp.ones((3, 6)), "w1": jnp.ones((6, 2))}, jnp.ones((1, 3)))
        Array([[18., 18.]], dtype=float32)
    """
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    cuts: dict[Any, tuple[Program, Cut]] = {}

    def smaller(params: Any, *inputs: Any) -> Any:
        arguments = jax.tree.leaves(inputs)
        # An analysis depends on nothing but structure and shapes, so it may be kept.
        avals = tuple((np.shape(a), jax.dtypes.result_type(a)) for a in arguments)
        key = (jax.tree.structure(inputs), avals)
        if key not in cuts:
            program = read(apply_fn, shapes, *inputs)
            flow = follow(program)
            means = hold(flow, program, renormalize).means
            cuts[key] = program, resolve(flow, means, program.leaves, cut)
        program, resolved = cuts[key]
        leaves = _check_leaves(params, program, resolved)
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


def _check_leaves(params: Any, program: Program, cut: Cut) -> list[Any]:
    if jax.tree.structure(params) != program.params_tree:
        raise ValueError(
            f"params: {jax.tree.structure(params)} is not the structure of the model that was cut, "
            f"{program.params_tree}"
        )
    leaves = jax.tree.leaves(params)
    for leaf, (path, value) in zip(leaves, program.leaves.items(), strict=True):
        expected = shape_of(cut, value)
        if tuple(leaf.shape) != expected:
            raise ValueError(
                f"{path}: shape {tuple(leaf.shape)}, but the smaller model has {expected}: "
                "pass the smaller parameters"
            )
    return leaves
