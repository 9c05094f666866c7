"""Notes in a program, which change nothing, about what some values are: for who reads programs."""

import json
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

_PREFIX = "jaxcomp: "


def mark(values: jax.Array, *note: Any) -> jax.Array:
    """``values``, noted in the program.

    Args:
        values: any array.
        *note: what JSON can hold.

    Example:
        >>> import jax.numpy as jnp
        >>> print(jax.make_jaxpr(lambda x: mark(x, "rounded", 4))(1.0))
        { lambda ; a:f32[]. let
            b:f32[] = name[name=jaxcomp: ["rounded", 4]] a
          in (b,) }
    """
    return checkpoint_name(values, _PREFIX + json.dumps(note))


def read_mark(name: str) -> list[Any] | None:
    """The note that the name of a value is; None for a name that somebody gave it.

    Example:
        >>> read_mark('jaxcomp: ["rounded", 4]')
        ['rounded', 4]
        >>> read_mark("hidden")
    """
    return json.loads(name.removeprefix(_PREFIX)) if name.startswith(_PREFIX) else None
