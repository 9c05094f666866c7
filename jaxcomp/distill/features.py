"""What layers of a model compute, by name, without a change to the model."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcomp import tree as tree_lib
from jaxcomp.arrays import decode, is_compressed
from jaxcomp.columns import table
from jaxcomp.model.named_values import Named, capture, find_named
from jaxcomp.model.program import Program, read


class Features(NamedTuple):
    """What a model returned, and what it computed on the way.

    Attributes:
        outputs: what the function returned.
        values: the arrays that were asked for, by name, in the order they are computed.
    """

    outputs: Any
    values: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class FeatureList:
    """The values that :func:`features` can return; ``print`` it.

    Attributes:
        shapes: their shapes and dtypes, by name, in the order they are computed.
        sources: what gave each its name: ``parameter``, ``scope``, ``checkpoint_name``, ``output``.
        left_out: values that cannot be had, by name, and why.
    """

    shapes: Mapping[str, jax.ShapeDtypeStruct]
    sources: Mapping[str, str]
    left_out: Mapping[str, str]

    def __str__(self) -> str:
        rows = [
            (name, str(shape.shape), str(shape.dtype), self.sources[name])
            for name, shape in self.shapes.items()
        ]
        lines = [table([("name", "shape", "dtype", "by its"), *rows])] if rows else []
        return "\n".join([*lines, *(f"left out: {n}: {why}" for n, why in self.left_out.items())])


def features(apply_fn: Callable[..., Any], params: Any, *inputs: Any, at: Any) -> Features:
    """Run a model and return named intermediate values with its outputs.

    The function is traced and its operations are run as they stand, so any model will do (Linen,
    NNX, Equinox, Haiku, plain functions), of teacher or student, at any batch size. Call it inside
    your jitted train step: there tracing costs once, and nothing is computed twice. Gradients flow
    through outputs and values alike. What is computed in the turns of ``jax.lax.scan`` (scanned
    layers, recurrent cells) comes stacked along a new first axis.

    Args:
        apply_fn: a function of ``(params, *inputs)`` that ``jax.jit`` can trace.
        params: its parameter tree; compressed leaves are decoded.
        *inputs: pytrees of arrays; close over what is none, such as ``train=False``.
        at: shell-style patterns over the names of values, of which there are four kinds:

            * the path of a parameter, ``params/Dense_0/kernel``: the result of the product, sum or
              look-up in which it meets the data (a second one is ``…/kernel#2``), with the axes
              of that operation: under ``jax.vmap`` the batch need not come first;
            * a scope, ``Model/Block_0``: what leaves a Linen module or a ``jax.named_scope``, the
              last of what is computed there and read outside;
            * a name given in the model by ``jax.ad_checkpoint.checkpoint_name``;
            * ``outputs/…``: an output by its path, also what ``sow`` collected, where the function
              returns the collection.

            :func:`list_features` prints them.

    Returns:
        Outputs and values; both can be unpacked as a pair.

    Raises:
        TypeError: ``apply_fn`` is no function, a leaf is no array, or a pattern is no string.
        ValueError: a pattern matches nothing, or a value that cannot be had: one inside a branch, a
            ``while`` loop, ``shard_map``, or a function with a derivative of its own.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> def model(params, x):
        ...     return jnp.tanh(x @ params["first"]) @ params["second"]
        >>> params = {"first": jnp.ones((3, 5)), "second": jnp.ones((5, 2))}
        >>> logits, hidden = features(model, params, jnp.ones((4, 3)), at="first")
        >>> print(logits.shape, hidden["first"].shape)
        (4, 2) (4, 5)

        A student learns from its teacher's first layer, in one jitted step:

        >>> @jax.jit
        ... def slopes(student, teacher, x):
        ...     _, wanted = features(model, jax.lax.stop_gradient(teacher), x, at="first")
        ...     def loss(student):
        ...         _, own = features(model, student, x, at="first")
        ...         return jnp.square(own["first"] - wanted["first"]).mean()
        ...     return jax.grad(loss)(student)
        >>> teacher = {**params, "first": jnp.zeros((3, 5))}
        >>> print(jax.tree.map(jnp.sum, slopes(params, teacher, jnp.ones((4, 3)))))
        {'first': Array(18., dtype=float32), 'second': Array(0., dtype=float32)}
    """
    program, params = _read(apply_fn, params, inputs)
    wanted = _wanted(find_named(program), at)
    outputs, values = capture(program, jax.tree.leaves((params, inputs)), wanted)
    return Features(jax.tree.unflatten(program.out_tree, outputs), values)


def list_features(
    apply_fn: Callable[..., Any], params: Any, *inputs: Any, at: Any = "*"
) -> FeatureList:
    """The names, shapes and dtypes of a model's intermediate values; nothing is computed.

    Args:
        apply_fn: as for :func:`features`.
        params: its parameter tree, of arrays or of ``jax.ShapeDtypeStruct``.
        *inputs: the same.
        at: patterns of the names that are listed.

    Returns:
        What can be had, and what cannot, with the reason. The shapes are what the functions that
        make projections ask for.

    Raises:
        TypeError: ``apply_fn`` is no function, a leaf is no array, or a pattern is no string.
        ValueError: a pattern matches nothing.

    Example:
        >>> import jax.numpy as jnp
        >>> def model(params, x):
        ...     return jnp.tanh(x @ params["first"]) @ params["second"]
        >>> params = {"first": jnp.ones((3, 5)), "second": jnp.ones((5, 2))}
        >>> print(list_features(model, params, jnp.ones((4, 3))))
        name    shape   dtype    by its
        first   (4, 5)  float32  parameter
        second  (4, 2)  float32  parameter
    """
    program, _ = _read(apply_fn, params, inputs)
    matched = _matched(find_named(program), at)
    had = [named for named in matched if named.obstacle is None]
    return FeatureList(
        {named.name: jax.ShapeDtypeStruct(named.shape, named.value.dtype) for named in had},
        {named.name: named.source for named in had},
        {named.name: named.obstacle for named in matched if named.obstacle is not None},
    )


def frozen(tree: Any, dtype: Any = None) -> Any:
    """A teacher's parameters (or inputs) through which no gradient flows.

    Args:
        tree: any pytree of arrays; compressed leaves stay as they are.
        dtype: a floating dtype for the floating arrays, such as ``jnp.bfloat16``: a teacher in
            half the bytes. Give the inputs too where the model computes in the widest dtype it
            meets. Cast once, outside the train step, what does not change.

    Returns:
        The tree, with ``stop_gradient`` around every array.

    Raises:
        TypeError: ``dtype`` is not floating.

    Example:
        >>> params, x = frozen(({"kernel": jnp.ones((2, 3))}, jnp.arange(2)), jnp.bfloat16)
        >>> print(params["kernel"].dtype, x.dtype)
        bfloat16 int32
    """
    try:
        floating = dtype is None or jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        floating = False
    if not floating:
        raise TypeError(f"dtype must be floating, such as jnp.bfloat16, not {dtype!r}")

    def stop(leaf: Any) -> Any:
        plain = not is_compressed(leaf)
        if plain and dtype is not None and jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            leaf = jnp.asarray(leaf, dtype)
        return jax.lax.stop_gradient(leaf)

    return jax.tree.map(stop, tree, is_leaf=is_compressed)


def _read(
    apply_fn: Callable[..., Any], params: Any, inputs: tuple[Any, ...]
) -> tuple[Program, Any]:
    params = decode(params)
    for leaf in jax.tree.leaves(inputs):
        if isinstance(leaf, (bool, str)):
            raise TypeError(f"inputs must be arrays, not {leaf!r}: close over it in apply_fn")
    return read(apply_fn, params, *inputs), params


def _matched(every: Iterable[Named], at: Any) -> list[Named]:
    if not isinstance(at, Iterable):
        raise TypeError(f"at must be patterns of names, not {at!r}; list_features names all")
    patterns = [at] if isinstance(at, str) else list(at)
    by_name = {named.name: named for named in every}
    chosen: set[str] = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"at: a pattern must be a string, not {pattern!r}")
        names = tree_lib.matching(pattern, by_name)
        if not names:
            near = tree_lib.nearest(pattern, by_name)
            raise ValueError(
                f"at: '{pattern}' matches no named value; {near} (list_features names all)"
            )
        chosen.update(names)
    return [named for name, named in by_name.items() if name in chosen]


def _wanted(every: Iterable[Named], at: Any) -> list[Named]:
    matched = _matched(every, at)
    for named in matched:
        if named.obstacle is not None:
            raise ValueError(
                f"at: '{named.name}' cannot be had: {named.obstacle}; name others, or the scope "
                "around it"
            )
    return matched
