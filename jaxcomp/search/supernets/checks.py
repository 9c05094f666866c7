"""What supernets are given, looked at before anything is computed: messages name the argument."""

from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jaxcomp import tree as tree_lib
from jaxcomp.arrays import is_compressed
from jaxcomp.search.spaces import encode


def check_candidate(net: Any, candidate: Any) -> None:
    """Raise unless a candidate has a value for each part, and no others.

    Args:
        net: the supernet.
        candidate: numbers or arrays, which must be options too unless they are traced.

    Raises:
        TypeError: a value is of the wrong kind.
        ValueError: it does not fit the space.
    """
    leaves = jax.tree.leaves(candidate)
    if all(isinstance(leaf, (bool, int, float, str)) for leaf in leaves):
        encode(net.space, candidate)
        return
    if jax.tree.structure(candidate) != jax.tree.structure(net.largest):
        given, wanted = tree_lib.flatten(candidate), tree_lib.flatten(net.largest)
        differs = ", ".join(sorted(set(given) ^ set(wanted))) or "its kinds of nodes"
        raise ValueError(f"candidate: not of the supernet's space, which differs in {differs}")
    for part in net.parts:
        name, value = f"{part.kind}/{part.name}", part.of(candidate)
        if jnp.shape(value) != ():
            raise ValueError(
                f"{name}: shape {jnp.shape(value)}: a candidate has one number a part: map over "
                "several with jax.vmap"
            )
        if not isinstance(value, jax.core.Tracer) and np.asarray(value).item() not in part.options:
            options = ", ".join(map(str, part.options))
            raise ValueError(f"{name}: {value} is none of the options {options}")


def check_weights(net: Any, weights: Any) -> None:
    """Raise unless there is a weight for each option of each part.

    Args:
        net: the supernet.
        weights: by kind and name, (options,).

    Raises:
        ValueError: there is not.
    """
    for part in net.parts:
        try:
            shape = jnp.shape(part.of(weights))
        except (KeyError, TypeError, ValueError):
            shape = None
        if shape != (len(part.options),):
            what = "none that are numbers" if shape is None else f"an array of shape {shape}"
            raise ValueError(
                f"{part.kind}/{part.name}: a weight is needed for each of {len(part.options)} "
                f"options, not {what}: give search.differentiable.probabilities(logits)"
            )


def check_dense(params: Any) -> None:
    """Raise if a leaf is compressed.

    Args:
        params: any tree.

    Raises:
        TypeError: one is.
    """
    for path, leaf in tree_lib.flatten(params).items():
        if is_compressed(leaf):
            raise TypeError(
                f"{path}: {type(leaf).__name__} is compressed already: pass "
                "jaxcomp.decode(params), and compress what was extracted"
            )


def check_paths(net: Any, params: Any) -> None:
    """Raise unless parameters have all leaves of the largest model's, and no others.

    Args:
        net: the supernet.
        params: any tree.

    Raises:
        ValueError: they have not.
    """
    given, wanted = tree_lib.flatten(params), tree_lib.flatten(net.full_params)
    if differs := ", ".join(sorted(given.keys() ^ wanted.keys())):
        raise ValueError(f"params: not those of the largest model, which differs in {differs}")


def check_shapes(net: Any, params: Any) -> None:
    """Raise if a leaf that the largest model has is of another shape.

    Args:
        net: the supernet.
        params: its parameters, or some of them.

    Raises:
        ValueError: one is.
    """
    wanted = tree_lib.flatten(net.full_params)
    for path, leaf in tree_lib.flatten(params).items():
        if path in wanted and jnp.shape(leaf) != wanted[path].shape:
            raise ValueError(
                f"{path}: shape {jnp.shape(leaf)}, but the largest model has "
                f"{wanted[path].shape}: pass the parameters that the supernet was made of"
            )


def check_known(params: Any) -> None:
    """Raise unless the numbers of all leaves are known and finite, so that units can be ranked.

    Args:
        params: any tree.

    Raises:
        TypeError: a leaf is traced, or a shape only.
        ValueError: a leaf is not finite.
    """
    for path, leaf in tree_lib.flatten(params).items():
        if isinstance(leaf, (jax.ShapeDtypeStruct, jax.core.Tracer)):
            raise TypeError(
                f"{path}: order='l1' looks at its numbers: give arrays, and call it outside of jit"
            )
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not bool(jnp.isfinite(leaf).all()):
            raise ValueError(f"{path}: is not finite: its units have no order by size")


def check_also(also: Any) -> None:
    """Raise unless these are functions with their inputs.

    Args:
        also: as of :func:`jaxcomp.search.supernet`.

    Raises:
        TypeError: they are not.
    """
    fine = isinstance(also, (list, tuple)) and all(map(_is_call, also))
    if not fine:
        raise TypeError(f"also must be [(function, (input, ...)), ...], not {also!r:.60}")


def _is_call(pair: Any) -> bool:
    if not isinstance(pair, tuple) or len(pair) != 2:
        return False
    return callable(pair[0]) and isinstance(pair[1], (list, tuple))
