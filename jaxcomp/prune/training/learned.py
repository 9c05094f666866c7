"""What the methods that learn about weights share: a gradient of their own, and leaves' shapes."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import struct
from jaxtyping import Array, Float

from jaxcomp import tree as tree_lib


@jax.custom_vjp
def nudge(x: Float[Array, "..."], gradient: Float[Array, "..."]) -> Float[Array, "..."]:
    """The identity, whose backward pass adds a given gradient.

    A penalty on what a method learns belongs into the loss, but the user's loss never sees what is
    learned. Its exact gradient, added here, is all that training needs of it. It is in units of
    the loss: where the loss is scaled, scale the gradients back before the optimizer sees them.

    Args:
        x: what is learned.
        gradient: the penalty's gradient with respect to ``x``, of its shape and dtype; itself not
            differentiated.

    Returns:
        ``x``.

    Example:
        >>> import jax.numpy as jnp
        >>> jax.grad(lambda x: 3 * nudge(x, jnp.float32(0.5)))(jnp.float32(1.0))
        Array(3.5, dtype=float32)
    """
    del gradient
    return x


def _forward(x: Any, gradient: Any) -> tuple[Any, Any]:
    return x, gradient


def _backward(gradient: Any, cotangent: Any) -> tuple[Any, None]:
    return cotangent + gradient, None


nudge.defvjp(_forward, _backward)


@struct.dataclass
class LeafShapes:
    """The shapes of the leaves that a state was made for, where no array in it tells them.

    A static node of the state: it holds no arrays, costs nothing, and no checkpoint stores it.

    Attributes:
        shapes: paths and shapes.
    """

    shapes: tuple[tuple[str, tuple[int, ...]], ...] = struct.field(pytree_node=False)

    @classmethod
    def of(cls, leaves: Mapping[str, Any]) -> "LeafShapes":
        """Those of a selection."""
        return cls(tuple((path, tuple(leaf.shape)) for path, leaf in leaves.items()))

    def take(self, tree: Any) -> tree_lib.Leaves:
        """These leaves of a tree; raises ``ValueError`` where one is missing or of another shape.

        Example:
            >>> import jax.numpy as jnp
            >>> shapes = LeafShapes.of({"kernel": jnp.ones((2, 3))})
            >>> shapes.take({"kernel": jnp.ones((3, 2))})
            Traceback (most recent call last):
            ...
            ValueError: kernel: shape (3, 2), but the state was made for (2, 3): pass the ...
        """
        return tree_lib.take_like(
            tree, {path: jax.ShapeDtypeStruct(shape, bool) for path, shape in self.shapes}
        )
