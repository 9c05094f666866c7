"""Which values of a program depend on others."""

from collections.abc import Iterable

from jaxcomp.model.program import Block, Program, Value, wirings


def reached(program: Program, start: Iterable[Value]) -> set[Value]:
    """The values that depend on any of some values, these included.

    Args:
        program: from :func:`jaxcomp.model.program.read`.
        start: values of it.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxcomp.model.program import read
        >>> program = read(lambda w, x: (w * 2) @ x, jnp.ones((2, 2)), jnp.ones(2))
        >>> doubled, product = (op.outputs[0] for op in program.block.ops)
        >>> data = reached(program, program.inputs)
        >>> doubled in data, product in data
        (False, True)
    """
    found = set(start)

    def visit(block: Block) -> None:
        for op in block.ops:
            for wiring in wirings(op):
                found.update(link.inner for link in wiring.enter if link.outer in found)
                visit(wiring.block)
                while news := {b for a, b in wiring.carry if a in found and b not in found}:
                    found.update(news)
                    visit(wiring.block)
                found.update(link.outer for link in wiring.leave if link.inner in found)
            # Which branch is taken, the data may decide.
            plain = not op.blocks or (op.name == "cond" and op.inputs[0] in found)
            if plain and not found.isdisjoint(op.inputs):
                found.update(op.outputs)

    visit(program.block)
    return found
