"""Activation functions with their parameters: as a space, as functions, side by side."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxcomp.search.ready.menu import Kind, Numbers, Parameter, by_kind, numbers_of, read, space_of
from jaxcomp.search.spaces import Choice, Continuous


def _relu(x: Any, threshold: Any, leak: Any) -> Any:
    return jnp.where(x > threshold, x, leak * (x - threshold))


def _elu(x: Any, alpha: Any) -> Any:
    # Of the side that is not taken nothing may overflow: its gradient would be NaN, times 0.
    return jnp.where(x > 0, x, alpha * jnp.expm1(jnp.where(x > 0, 0, x)))


_slope = Parameter(1.0, Continuous(0.25, 4.0, log=True))
_KINDS = {
    "sigmoid": Kind(lambda x, slope: jax.nn.sigmoid(slope * x), {"slope": _slope}),
    "tanh": Kind(lambda x, slope: jnp.tanh(slope * x), {"slope": _slope}),
    "relu": Kind(
        _relu,
        {
            "threshold": Parameter(0.0, Continuous(0.0, 1.0)),
            "leak": Parameter(0.0, Continuous(0.0, 0.3)),
        },
    ),
    "gelu": Kind(lambda x: jax.nn.gelu(x, approximate=False), {}),
    "silu": Kind(lambda x, slope: x * jax.nn.sigmoid(slope * x), {"slope": _slope}),
    "elu": Kind(_elu, {"alpha": Parameter(1.0, Continuous(0.1, 2.0))}),
    "softplus": Kind(lambda x, slope: jax.nn.softplus(slope * x) / slope, {"slope": _slope}),
}


def activations(kinds: Any = None) -> Choice:
    """A space of activation functions.

    ====================  ==========================================================
    kind                  function; parameters and their usual values
    ====================  ==========================================================
    sigmoid               ``1 / (1 + exp(-slope x))``; ``slope=1``
    tanh                  ``tanh(slope x)``; ``slope=1``
    relu                  ``x`` above the threshold, ``leak (x - threshold)`` up to it;
                          ``threshold=0, leak=0``
    gelu                  ``x Φ(x)``, exact
    silu                  ``x sigmoid(slope x)``; ``slope=1``
    elu                   ``x`` above 0, ``alpha (exp(x) - 1)`` up to it; ``alpha=1``
    softplus              ``log(1 + exp(slope x)) / slope``; ``slope=1``
    ====================  ==========================================================

    Args:
        kinds: names, for these with their usual parameters; a mapping of names to parameters,
            each a constant or a part; None for all kinds and all their parameters.

    Returns:
        A choice, whose value is a name or ``{name: {parameter: value}}``.

    Raises:
        TypeError: ``kinds`` is none of these.
        ValueError: there is no such kind, or it has no such parameter.

    Example:
        >>> from jaxcomp.search import spaces
        >>> space = activations({"gelu": None, "relu": {"leak": Continuous(0.0, 0.2)}})
        >>> spaces.decode(space, {"": 1, "relu/leak": 0.1})
        {'relu': {'leak': 0.1}}

    Source: thresholds and leaks: Konda et al., "Zero-bias autoencoders", ICLR 2015, and Maas et
    al., ICML workshop 2013, section 2; GELU: Hendrycks and Gimpel, 2016, equation 1; SiLU with a
    slope: Ramachandran et al., "Searching for activation functions", 2017, section 3; ELU: Clevert
    et al., ICLR 2016, equation 12.
    """
    return space_of("activations", _KINDS, kinds)


def activation(candidate: Any) -> Callable[[Any], Any]:
    """The function that a candidate stands for.

    Args:
        candidate: a name or ``{name: {parameter: value}}``; values may be traced scalars.

    Returns:
        A function of an array of floats, element by element, in the array's type.

    Raises:
        TypeError: the candidate is neither.
        ValueError: there is no such kind, or it has no such parameter.

    Example:
        >>> activation({"relu": {"leak": 0.1}})(jnp.array([-2.0, 3.0]))
        Array([-0.2,  3. ], dtype=float32)
    """
    name, values = read("activation", _KINDS, candidate)
    function = _KINDS[name].function

    def apply(x: Any) -> Any:
        x = _floating(x)
        return function(x, **{key: jnp.asarray(value, x.dtype) for key, value in values.items()})

    return apply


def activation_numbers(candidate: Any) -> Numbers:
    """A candidate as arrays, for :func:`activation_of`.

    Args:
        candidate: a name or ``{name: {parameter: value}}``; values may be traced scalars.

    Returns:
        The kind and all parameters; :func:`stack` puts several side by side.

    Raises:
        TypeError: the candidate is neither.
        ValueError: there is no such kind, or it has no such parameter.

    Example:
        >>> activation_numbers({"relu": {"leak": 0.25}})
        Numbers(kind=np.int32(2), values=array([1. , 1. , 0. , 0.25, 1. , 1. , 1. ], dtype=float32))
    """
    return numbers_of("activation", _KINDS, candidate)


def activation_of(numbers: Numbers) -> Callable[[Any], Any]:
    """The function that numbers stand for, which may be traced: one program for all kinds.

    Under ``vmap`` over numbers each kind is computed and one taken; without it, one is computed.

    Args:
        numbers: from :func:`activation_numbers`.

    Returns:
        A function of an array of floats, element by element, in the array's type.

    Example:
        >>> from jaxcomp.search.ready import stack
        >>> both = stack([activation_numbers(i) for i in ({"relu": {"leak": 0.5}}, "tanh")])
        >>> jax.vmap(lambda numbers: activation_of(numbers)(jnp.array([-20.0, 20.0])))(both)
        Array([[-10.,  20.],
               [ -1.,   1.]], dtype=float32)
    """

    def apply(x: Any) -> Any:
        x = _floating(x)
        of_kinds = by_kind(_KINDS, numbers, x.dtype)
        branches = [
            lambda x, f=kind.function, values=values: f(x, **values)
            for kind, values in zip(_KINDS.values(), of_kinds, strict=True)
        ]
        return lax.switch(numbers.kind, branches, x)

    return apply


def _floating(x: Any) -> Any:
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):  # in whole numbers a leak of 0.1 would be 0
        raise TypeError(f"an activation takes floats, not {x.dtype}: convert them first")
    return x
