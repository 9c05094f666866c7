"""A sub-network that stands alone: its arrays cut out, and the function that runs on them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax

from jaxcomp import tree as tree_lib
from jaxcomp.arrays import decode
from jaxcomp.model import tapped
from jaxcomp.model.program import Block, Program, read
from jaxcomp.model.reach import reached
from jaxcomp.model.removed import Size
from jaxcomp.model.rewrite import rewrite
from jaxcomp.model.uses import live_ops
from jaxcomp.search.supernets.edit import edit, inlined
from jaxcomp.search.supernets.removal import Removal, cut, shrunk


@dataclass(frozen=True, eq=False)
class Subnetwork:
    """A sub-network; ``print`` it to see what was cut.

    Attributes:
        params: its parameters, a tree of the same structure, but None where a leaf is gone.
        apply: the model as a pure function of ``(params, *inputs)``, of any batch size.
        candidate: what was chosen.
        removal: what was cut.
        shapes: by path of the leaves that were cut, the shape before and after.
        before: what the largest model is and costs.
        after: what this one does.
        full_params: shapes and dtypes of the largest model's parameters.
    """

    params: Any = field(repr=False)
    apply: Callable[..., Any] = field(repr=False)
    candidate: Any
    removal: Removal = field(repr=False)
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    before: Size
    after: Size
    full_params: Any = field(repr=False)

    def rewrite(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Another function of the largest model's parameters, for those of this one.

        Args:
            function: of ``(params, *inputs)``, such as a training step's forward pass.

        Returns:
            The function of smaller parameters. What it returns shrinks where it has the channels
            that were cut, and is None where it needs a leaf that is gone.
        """
        return on_smaller(function, self.full_params, self.removal)

    def shrink(self, tree: Any) -> Any:
        """Cut a tree that mirrors the parameters as they were cut, to go on training.

        Args:
            tree: an optimizer state, gradients, an average of the weights, or a tree of such, as
                :func:`shrunk` takes it.

        Returns:
            The tree with smaller arrays, and None where a leaf is gone: for an optimizer state, in
            the structure of ``tx.init(small.params)``.

        Raises:
            ValueError: it is not known how an array is to be cut.
        """
        return shrunk(tree, self.full_params, self.removal)

    def __str__(self) -> str:
        lines = [f"{path} {a} → {b}" for path, (a, b) in self.shapes.items()]
        lines += [f"{path} gone" for path in self.removal.gone]
        names = {"macs": "MACs", "flops": "FLOPs"}
        for name, a, b in zip(Size._fields, self.before, self.after, strict=True):
            lines.append(f"{names.get(name, name)}: {a:,} → {b:,} ({b / a if a else 1:.1%})")
        return "\n".join(lines)


def on_smaller(function: Callable[..., Any], full: Any, removal: Removal) -> Callable[..., Any]:
    """A function of the largest model's parameters as one of a sub-network's.

    First kernels and branches are left out of the traced program, then the channels.

    Args:
        function: of ``(params, *inputs)``.
        full: shapes and dtypes of the largest model's parameters.
        removal: what the sub-network has not.

    Returns:
        The function, for any other inputs too.
    """
    centres = {
        path: tuple(
            None if axis is not None else inner
            for axis, inner in zip(removal.channels[path], positions, strict=True)
        )
        for path, positions in removal.kept.items()
    }
    between = cut(full, centres, removal.gone)
    channels = {p: axes for p, axes in removal.channels.items() if p not in removal.gone}

    def edited(params: Any, *inputs: Any) -> Any:
        leaves = tree_lib.flatten(decode(params), is_leaf=lambda _: False)
        dtypes = {path: leaf.dtype for path, leaf in leaves.items()}
        given = tree_lib.replace(
            full,
            {
                path: jax.ShapeDtypeStruct(whole.shape, dtypes.get(path, whole.dtype))
                for path, whole in tree_lib.flatten(full).items()
            },
        )
        program = inlined(read(function, given, *inputs))
        program = edit(program, removal.sizes, removal.zeros).program
        values = (*map(leaves.get, program.leaves), *jax.tree.leaves(inputs))
        return _run(program, values, removal.gone)

    # Where every leaf went there are no channels to cut either.
    return rewrite(edited, between, channels) if jax.tree.leaves(between) else edited


def _run(program: Program, values: Any, gone: tuple[str, ...]) -> Any:
    """The results of a program; None for those that need leaves that are gone."""
    lost = reached(program, [program.leaves[path] for path in gone])
    block = program.block
    outputs = tuple(value for value in block.outputs if value not in lost)
    alive = Block(block.inputs, live_ops(Block(block.inputs, block.ops, outputs)), outputs)
    trimmed = Program(program.leaves, program.inputs, alive, program.params_tree, program.out_tree)
    results = iter(tapped.run(trimmed, values, {}, {})[0])
    flat = [None if value in lost else next(results) for value in block.outputs]
    return jax.tree.unflatten(program.out_tree, flat)
