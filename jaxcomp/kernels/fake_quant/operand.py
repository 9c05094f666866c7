"""One operand of a product: rounded on the way in, and what of it is kept for the gradients."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jaxcomp.arrays.blocks import split_shape
from jaxcomp.checks import check_flag
from jaxcomp.kernels.fake_quant.rounding import (
    Rounding,
    check_rounding,
    find_codes,
    find_scale,
    nearest_of,
    values_of,
)
from jaxcomp.sharding import automatic, spec_like


class Operand(NamedTuple):
    """How an operand is treated; static.

    Attributes:
        rounding: to what; None: not at all.
        clips: whether some of it may be clipped: where the range is given. What is found holds all.
        codes: whether its codes are kept, a byte a number; otherwise the array itself.
    """

    rounding: Rounding | None
    clips: bool
    codes: bool


class Kept(NamedTuple):
    """What an operand is rounded from.

    Attributes:
        array: the array itself, or its codes.
        scale: in the dtype that it was given in, with all axes; None without rounding.
        zero_point: likewise; None if symmetric.
        inside: of codes, bits along the last axis: what was not clipped; None if nothing is.
    """

    array: jax.Array
    scale: Any = None
    zero_point: Any = None
    inside: Any = None


def operand(
    name: str, x: jax.Array, rounding: Any, scale: Any, zero_point: Any, codes: bool
) -> Operand:
    """How an operand is treated, its arguments checked.

    Raises:
        TypeError: the rounding is none, or there are no floats to round.
        ValueError: they do not fit each other.

    Example:
        >>> operand("w", jnp.ones((2, 3)), Rounding(4), jnp.ones(3), None, False).clips
        True
    """
    check_rounding(name, rounding, x.shape)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name}: {x.dtype} numbers are not rounded: give floats")
    if scale is None and zero_point is not None:
        raise ValueError(f"{name}: zero_point was given without scale: give both or neither")
    if scale is not None and (zero_point is None) != rounding.symmetric:
        kind, needs = ("a symmetric", "no") if rounding.symmetric else ("an affine", "a")
        raise ValueError(f"{name}: {kind} rounding takes {needs} zero_point beside its scale")
    full = split_shape(x.shape, rounding.blocks)
    for what, given in (("scale", scale), ("zero_point", zero_point)):
        if given is not None and not hasattr(given, "shape"):
            raise TypeError(f"{name}: {what} must be an array, not {given!r}")
        if what == "scale" and given is not None and not jnp.issubdtype(given.dtype, jnp.floating):
            raise TypeError(f"{name}: a scale of {given.dtype} is not floating")
        if given is not None and not _broadcasts(given.shape, full):
            raise ValueError(f"{name}: a {what} of shape {given.shape} does not fit {full}")
    return Operand(rounding, scale is not None, codes)


def operands(
    x: jax.Array,
    w: jax.Array,
    inputs: tuple[Any, ...],
    rounding: tuple[Any, ...],
    keep: str,
    dense_gradient: bool,
    active: Any,
) -> tuple[Operand, Operand]:
    """How activations and a weight are treated, all arguments of a product checked.

    Args:
        x: activations.
        w: latent weights.
        inputs: rounding of ``x`` or None, its scale and its zero point.
        rounding: the same of ``w``; not None.
        keep: ``"weight"`` or ``"codes"``.
        dense_gradient: whether clipped weights get their gradient.
        active: None, or a boolean that says whether ``w`` is rounded.

    Raises:
        TypeError: as :func:`operand`; a flag is none.
        ValueError: as :func:`operand`; ``keep`` is another word, or ``"codes"`` with ``active``.

    Example:
        >>> one = jnp.ones((2, 2))
        >>> of_x, of_w = operands(
        ...     one, one, (None,) * 3, (Rounding(4), None, None), "weight", False, None)
        >>> of_x.rounding, of_w.rounding.bits
        (None, 4)
    """
    check_flag("dense_gradient", dense_gradient)
    if keep not in ("weight", "codes"):
        raise ValueError(f"keep must be 'weight' or 'codes', not {keep!r}")
    if inputs[0] is not None:
        of_x = operand("x", x, *inputs, codes=True)
    elif any(each is not None for each in inputs):
        raise ValueError("x: a scale without a rounding: say to how many bits")
    else:
        of_x = Operand(None, False, False)
    of_w = operand("w", w, *rounding, codes=keep == "codes")
    if active is not None and (getattr(active, "shape", None) != () or active.dtype != jnp.bool_):
        raise TypeError(f"active must be one boolean, such as step >= 100, not {active!r}")
    if active is not None and of_w.codes:
        raise ValueError(
            "active with keep='codes': what is not rounded has no codes; keep='weight'"
        )
    return of_x, of_w._replace(clips=of_w.clips and not dense_gradient)


def product_dtype(x: jax.Array, w: jax.Array, dtype: Any) -> Any:
    """What two operands are multiplied in; None: what they promote to.

    Raises:
        TypeError: it has no fractions.

    Example:
        >>> product_dtype(jnp.ones(2, jnp.bfloat16), jnp.ones(2), "bfloat16")
        dtype(bfloat16)
    """
    dtype = jnp.dtype(jnp.result_type(x, w) if dtype is None else dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype must be floating, such as bfloat16, not {dtype}")
    return dtype


def scaled(how: Operand, x: jax.Array, scale: Any, zero_point: Any) -> Kept:
    """An operand with its scale, which is found where it is not given.

    Example:
        >>> how = Operand(Rounding(4), False, True)
        >>> scaled(how, jnp.array([[3.5], [1.1]]), None, None).scale
        Array([[0.5]], dtype=float32)
    """
    if how.rounding is None:
        return Kept(x)
    rounding: Rounding = how.rounding
    if scale is None:
        found = _place_scales(lambda x: find_scale(x, rounding), x, rounding)
        scale, zero_point = found(lax.stop_gradient(x))
    ndim = x.ndim + len(rounding.blocks)
    full = lambda a: (
        None if a is None else lax.stop_gradient(a).reshape((1,) * (ndim - a.ndim) + a.shape)
    )
    return Kept(x, full(scale), full(zero_point))


def switched(
    how: Operand, active: Any, x: jax.Array, scale: Any, zero_point: Any
) -> tuple[Any, Any]:
    """The scale and zero point of an operand that is rounded only while ``active``.

    A scale of 0 says that it is not: nothing more goes into the products, nor is kept for them.

    Example:
        >>> how = Operand(Rounding(4), False, False)
        >>> [switched(how, on, jnp.array([[3.5]]), None, None)[0].item() for on in (True, False)]
        [0.5, 0.0]
    """
    found = scaled(how, x, scale, zero_point)
    return jnp.where(active, found.scale, jnp.zeros_like(found.scale)), found.zero_point


def nothing_of(x: jax.Array) -> jax.Array:
    """An array of nothing, of the dtype of another, from which it is derived.

    Example:
        >>> nothing_of(jnp.ones((2, 3))).shape
        (0,)
    """
    return automatic(lambda x: x.reshape(x.size)[:0], PartitionSpec())(x)


def coded(how: Operand, kept: Kept) -> Kept:
    """What is kept of an operand for its gradients: codes and bits, if that is how.

    Example:
        >>> how = Operand(Rounding(4), False, True)
        >>> coded(how, scaled(how, jnp.array([[3.5], [1.1]]), None, None)).array.ravel()
        Array([15, 10], dtype=uint8)
    """
    if how.rounding is None or not how.codes:
        return kept
    codes, inside = _codes(how.rounding, kept)
    return kept._replace(array=codes, inside=_bits(inside) if how.clips else None)


@partial(jax.custom_jvp, nondiff_argnums=(0, 2))
def values(how: Operand, kept: Kept, dtype: Any) -> jax.Array:
    """The numbers that are multiplied; their derivative is straight through.

    NaN stays NaN, but of codes, which have none.

    Args:
        how: it is treated.
        kept: from :func:`scaled` or :func:`coded`.
        dtype: of the operand.

    Example:
        >>> how = Operand(Rounding(4), False, True)
        >>> kept = scaled(how, jnp.array([[3.5], [1.1]]), None, None)
        >>> values(how, kept, jnp.float32).ravel(), values(how, coded(how, kept), "float32").ravel()
        (Array([3.5, 1. ], dtype=float32), Array([3.5, 1. ], dtype=float32))
    """
    if how.rounding is None:
        return kept.array
    rounding: Rounding = how.rounding
    of = values_of if kept.array.dtype == jnp.uint8 else nearest_of

    def run(array: jax.Array, scale: jax.Array, zero_point: Any = None) -> jax.Array:
        return of(array, scale, zero_point, rounding, dtype)

    return _place(run, kept.array)(*_given(kept))


@values.defjvp
def _values_straight_through(how: Operand, dtype: Any, primals: Any, tangents: Any) -> Any:
    (kept,), (moved,) = primals, tangents
    found = values(how, kept, dtype)
    if how.rounding is None:
        return found, moved.array
    if kept.array.dtype == jnp.uint8:
        return found, jnp.zeros_like(found)
    return found, straight_through(how, kept, moved.array.astype(found.dtype))


@jax.custom_jvp
def differentiated_once(arrays: Any) -> Any:
    """Arrays of which no derivative is known: those of gradients whose numbers were kept as codes.

    Raises:
        NotImplementedError: they are differentiated.

    Example:
        >>> differentiated_once(jnp.arange(2))
        Array([0, 1], dtype=int32)
    """
    return arrays


@differentiated_once.defjvp
def _(primals: Any, tangents: Any) -> Any:
    raise NotImplementedError(
        "a product that keeps codes for its gradients cannot be differentiated twice: take "
        "keep='weight', and round inputs before it"
    )


def straight_through(how: Operand, kept: Kept, gradient: jax.Array) -> jax.Array:
    """The gradient of an operand: that of its values, 0 where they were clipped.

    Example:
        >>> how = Operand(Rounding(4), True, True)
        >>> kept = coded(how, scaled(how, jnp.array([[9.0, 0.1]]), jnp.array(0.5), None))
        >>> straight_through(how, kept, jnp.ones((1, 2)))
        Array([[0., 1.]], dtype=float32)

    Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons for Conditional
    Computation", 2013, section 4.
    """
    if how.rounding is None or not how.clips:
        return gradient
    if kept.inside is not None:
        inside = _place(lambda bits: _unpacked(bits, gradient.shape[-1]), gradient)(kept.inside)
    else:
        _, inside = _codes(how.rounding, kept)
    return jnp.where(inside, gradient, jnp.zeros((), gradient.dtype))


def _codes(rounding: Rounding, kept: Kept) -> Any:
    def find(x: jax.Array, scale: jax.Array, zero_point: Any = None) -> Any:
        return find_codes(x, scale, zero_point, rounding)

    return _place(find, kept.array)(*_given(kept))


def _given(kept: Kept) -> tuple[jax.Array, ...]:
    return tuple(each for each in kept[:3] if each is not None)


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    return len(shape) <= len(to) and all(
        a in (1, b) for a, b in zip(shape[::-1], to[::-1], strict=False)
    )


def _bit_values() -> jax.Array:
    return (1 << jnp.arange(8, dtype=jnp.uint8)).astype(jnp.uint8)


def _bits(inside: jax.Array) -> jax.Array:
    shape = (*inside.shape[:-1], -(-inside.shape[-1] // 8))
    return automatic(_packed, out=spec_like(inside, shape))(inside)


def _packed(inside: jax.Array) -> jax.Array:
    *lead, length = inside.shape
    eights = jnp.pad(inside, [(0, 0)] * len(lead) + [(0, -length % 8)]).reshape(*lead, -1, 8)
    return jnp.sum(jnp.where(eights, _bit_values(), 0), axis=-1, dtype=jnp.uint8)


def _unpacked(bits: jax.Array, length: int) -> jax.Array:
    # Each bit is tested where it lies, several times as fast as shifting it down.
    inside = ((bits[..., None] & _bit_values()) != 0).reshape(*bits.shape[:-1], -1)
    return inside[..., :length]


def _place(run: Any, x: jax.Array) -> Any:
    """Results lie on explicit mesh axes as ``x`` does."""
    return automatic(run, out=spec_like(x, x.shape))


def _place_scales(run: Any, x: jax.Array, rounding: Rounding) -> Any:
    """Scales lie where the axes are of which they are."""
    shape = list(jax.eval_shape(run, x)[0].shape)
    for _, axis in rounding.blocks:
        del shape[x.ndim + axis + 1]
    spec = list(spec_like(x, tuple(shape)))
    if spec:
        for _, axis in reversed(rounding.blocks):
            spec.insert(x.ndim + axis + 1, None)
    return automatic(run, out=PartitionSpec(*spec))
