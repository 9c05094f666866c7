"""Run a model with kernels in the place of its products with compressed weights."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxcomp import columns
from jaxcomp import tree as tree_lib
from jaxcomp.arrays import is_compressed
from jaxcomp.checks import check_function
from jaxcomp.kernels.forms import IMPLEMENTATIONS
from jaxcomp.model import tapped
from jaxcomp.model.accelerated.plan import Plan, make_plan
from jaxcomp.model.accelerated.products import Planned, swap_of
from jaxcomp.model.accelerated.stacked import stacked
from jaxcomp.model.program import Program, read


@dataclasses.dataclass(frozen=True, eq=False)
class Accelerated:
    """A model with kernels in it: called like the model, with the same arrays.

    Attributes:
        apply_fn: the model as it was.
        implementation: of the kernels; None for the best on the platform.
    """

    apply_fn: Callable[..., Any]
    implementation: str | None = None

    def __call__(self, params: Any, *inputs: Any) -> Any:
        """What the model returns; a pure function to jit, differentiate, vmap, scan or shard.

        Args:
            params: its parameters, packed or not.
            *inputs: its other inputs.
        """
        leaves = tree_lib.flatten(params)
        program, plan = self._planned(params, leaves, inputs)
        values = [_value(path, leaf, plan) for path, leaf in leaves.items()]
        state = {
            name: stacked(leaves[at.path], len(at.loops))
            for name, at in plan.products.items()
            if at.path is not None
        }
        swaps = {
            at.op: swap_of(name, at, self.implementation) for name, at in plan.products.items()
        }
        arguments = jax.tree.leaves(inputs)
        outputs, _ = tapped.run(program, [*values, *arguments], {}, state, swaps)
        return jax.tree.unflatten(program.out_tree, outputs)

    def describe(self, params: Any, *inputs: Any) -> str:
        """A table of what runs in kernels, and for everything left why it does not.

        Args:
            params: parameters, or their shapes, packed where they will be.
            *inputs: examples of the other inputs; ``jax.ShapeDtypeStruct`` will do.
        """
        leaves = tree_lib.flatten(params)
        _, plan = self._planned(params, leaves, inputs)
        rows = [("kernel", "operation", "weight")]
        for at in plan.products.values():
            weight = _weight(at) if at.path is None else at.path or "the only leaf"
            rows.append((at.kernel, str(at.op), weight))
        table = columns.table(rows, left=len(rows[0]))
        return "\n".join([table, *(f"left: {name}: {why}" for name, why in plan.left.items())])

    def _planned(self, params: Any, leaves: Any, inputs: Any) -> tuple[Program, Plan]:
        outlines = tree_lib.Leaves((path, _outline(leaf)) for path, leaf in leaves.items())
        program = read(self.apply_fn, tree_lib.replace(params, outlines), *inputs)
        return program, make_plan(program, leaves)


def accelerate(apply_fn: Callable[..., Any], implementation: Any = None) -> Accelerated:
    """Compute a model's products with compressed, masked or rounded weights by kernels.

    Of a packed tree (:func:`jaxcomp.pack`), also inside loops over stacked layers:

    - dots with a quantized, a shared or a block-sparse leaf that sum over its first axis; or over
      its first axes, as attention does, unless they lie on explicit axes of a mesh;
    - dots that sum over the second of a quantized leaf's two axes, as those with tied embeddings;
    - convolutions of one position.

    Of a dense tree: dots and convolutions whose kernel is multiplied with a boolean mask, or
    selected by it, right there; or rounded by :func:`jaxcomp.quantize.fake_quant` to a
    :class:`jaxcomp.quantize.Format`, not by chance, also from some step on. What
    :func:`jaxcomp.compressed` does to parameters counts where ``apply_fn`` calls it, with its
    gradients.

    Everything else runs as it was, decoded where it is used; :meth:`Accelerated.describe` names it
    with the reason. The model does not change. What a kernel computes has no forward-mode
    derivative, and gives none to the scales of a quantized leaf.

    The program is read in each call: put it inside ``jit``, as a model is anyway.

    Args:
        apply_fn: a function of ``(params, *inputs)``, pytrees of arrays; what else the model takes
            is given in a ``lambda`` around it.
        implementation: of the kernels, see :mod:`jaxcomp.kernels`; None for the best on the
            platform.

    Returns:
        The model, to be called as ``apply_fn`` is.

    Raises:
        TypeError: ``apply_fn`` is no function.
        ValueError: there is no such implementation; when called: it does not take a weight.

    Example:
        >>> from jaxcomp.arrays import CodebookArray
        >>> indices = jnp.array([[0, 1], [1, 1]], jnp.uint8)
        >>> leaf = CodebookArray.from_indices(indices, jnp.array([-1.0, 2.0]), jnp.float32)
        >>> model = accelerate(lambda params, x: x @ params["kernel"])
        >>> model({"kernel": leaf}, jnp.array([[1.0, 10.0]]))
        Array([[19., 22.]], dtype=float32)
        >>> print(model.describe({"kernel": leaf}, jnp.ones((1, 2))))
        kernel           operation    weight
        codebook_matmul  dot_general  kernel
    """
    check_function("apply_fn", apply_fn, "(params, *inputs) -> outputs")
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation must be None or one of {list(IMPLEMENTATIONS)}, not {implementation!r}"
        )
    return Accelerated(apply_fn, implementation)


def _weight(at: Planned) -> str:
    how = "masked" if at.rounding is None else f"rounded to {at.rounding.bits} bits"
    return f"{how}, {' × '.join(map(str, at.reads[0].shape))}"


def _outline(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_compressed(leaf) else leaf


def _value(path: str, leaf: Any, plan: Plan) -> Any:
    if not is_compressed(leaf):
        return leaf
    # Nothing reads what no product needs decoded: NaN would tell.
    return leaf.decode() if path in plan.needed else jnp.full(leaf.shape, jnp.nan, leaf.dtype)
