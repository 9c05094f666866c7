"""A model that lost channels: its parameters, how to run it, and what it lost."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from jaxcomp.model.removed import Kept, Size
from jaxcomp.model.rewrite import rewrite
from jaxcomp.prune.channels.shrink import shrink


@dataclass(frozen=True, eq=False)
class SmallerModel:
    """A model without some of its channels; ``print`` it to see which.

    Attributes:
        params: the smaller parameters, a tree of the same structure.
        masked: the full-size parameters with the same channels zeroed: the same outputs.
        kept: by path, for each axis the positions that stayed, or None for all.
        shapes: by path of the leaves that were cut, the shape before and after.
        before: the size of the full model.
        after: the size of this one.
        fixed: why groups of channels were kept whole, by their name.
        notes: where masked and smaller differ, and where less was removed than asked for.
        apply: the model as a pure function of ``(params, *inputs)``, of any batch size.
        full_params: shapes and dtypes of the full-size parameters.
        renormalize: whether means over channels are taken over those that remain.
    """

    params: Any = field(repr=False)
    masked: Any = field(repr=False)
    kept: Kept = field(repr=False)
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    before: Size
    after: Size
    fixed: dict[str, str] = field(repr=False)
    notes: tuple[str, ...]
    apply: Callable[..., Any] = field(repr=False)
    full_params: Any = field(repr=False)
    renormalize: bool = False

    def rewrite(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Another function of the same parameters, for the smaller ones.

        For a training step's forward pass with batch statistics and dropout, for instance. What it
        returns shrinks where it has the channels that were cut.

        Args:
            function: a function of ``(params, *inputs)``, with ``params`` a tree of the same
                structure as those that were cut.

        Returns:
            The function of smaller parameters; see :func:`jaxcomp.model.rewrite`.
        """
        return rewrite(function, self.full_params, self.kept, self.renormalize)

    def shrink(self, tree: Any) -> Any:
        """Cut the same channels from a tree that mirrors the parameters.

        Args:
            tree: an optimizer state, a collection such as ``params["batch_stats"]``, gradients, an
                average of the weights, or any tree that holds such trees.

        Returns:
            The tree with smaller leaves; see :func:`jaxcomp.prune.channels.shrink`.
        """
        return shrink(tree, self.full_params, self.kept)

    def __str__(self) -> str:
        lines = [f"{path} {a} → {b}" for path, (a, b) in self.shapes.items()]
        pairs = zip(Size._fields, self.before, self.after, strict=True)
        names = {"macs": "MACs", "flops": "FLOPs"}
        lines += [
            f"{names.get(name, name)}: {a:,} → {b:,} ({b / a if a else 1:.1%})"
            for name, a, b in pairs
        ]
        lines += [f"kept {name}: {reason}" for name, reason in self.fixed.items()]
        return "\n".join([*lines, *self.notes])
