"""A model run on factors: two small products in the place of a large one."""

import dataclasses
import string
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcomp import columns
from jaxcomp import tree as tree_lib
from jaxcomp.arrays import CompressedArray, LowRankArray, LowRankSumArray, is_compressed
from jaxcomp.arrays.low_rank import terms_of
from jaxcomp.checks import check_function
from jaxcomp.factorize.products import Placed, Unfit, check_product, multiply, shapes_of
from jaxcomp.model import tapped
from jaxcomp.model.program import Op, Program, holds_tracers, read
from jaxcomp.model.trace import trace
from jaxcomp.model.uses import Use, find_uses

# What changes nothing but the layout or the dtype of a weight.
_LAYOUT = frozenset({"transpose", "reshape", "squeeze", "broadcast_in_dim", "convert_element_type"})
# Bodies that hand nothing around.
_INLINE = frozenset({"custom_jvp_call", "custom_vjp_call", "remat2", "checkpoint"})


class LowRankProduct(NamedTuple):
    """One dot or convolution that runs on factors.

    Attributes:
        operation: which, and where.
        form: of the weight, such as ``rank 8``.
        flops: of the products with the factors, in one turn of the loops around them.
        dense_flops: of the one product with the dense weight.
    """

    operation: str
    form: str
    flops: int
    dense_flops: int


@dataclasses.dataclass(frozen=True, eq=False)
class LowRankModel:
    """A model whose products run on factors where they can; ``print`` it for a table.

    Attributes:
        executed: the products that run on factors, by the path of their weight (and ``#2`` and so
            on for its other uses).
        left: every other use of a leaf that holds factors, with the reason; it is decoded there.
    """

    executed: Mapping[str, LowRankProduct]
    left: Mapping[str, str]
    _call: Callable[..., Any] = dataclasses.field(repr=False)

    def apply(self, params: Any, *inputs: Any) -> Any:
        """What the model returns; a pure function to jit, differentiate, vmap, scan or shard.

        Args:
            params: a tree like the one that the model was made with, with any numbers in it.
            *inputs: of the model, of any shapes.

        Raises:
            ValueError: the tree has another structure.
        """
        return self._call(params, *inputs)

    def __str__(self) -> str:
        return _table(self.executed, self.left)


def low_rank_apply(apply_fn: Callable[..., Any], params: Any, *inputs: Any) -> LowRankModel:
    """Run a model on the factors of its low-rank leaves, with no change to the model.

    ``x @ (U @ V)`` becomes ``(x @ U) @ V``: fewer operations, and the dense weight is never made.
    A dot takes its factors in the order of the fewest operations; a convolution becomes one for
    each factor (1 × 1, a column, a row, one channel at a time), with the strides, paddings and
    dilations where they belong. It is done to every dot and convolution that reads such a leaf
    through nothing but changes of layout that keep its axes apart, and where that takes fewer
    operations. What comes out is the same up to the rounding of sums.

    Args:
        apply_fn: a function of ``(params, *inputs)``.
        params: a tree with :class:`~jaxcomp.arrays.LowRankArray` leaves.
        *inputs: examples of the other inputs; ``jax.ShapeDtypeStruct`` will do.

    Returns:
        The model: ``model.apply(params, *inputs)``. Printed, it tells what runs on factors, what
        that takes, and what does not.

    Raises:
        TypeError: ``apply_fn`` is no function.
        ValueError: nothing can run on factors.

    Example:
        >>> from jaxcomp.factorize import LowRank, svd
        >>> params = {"kernel": jnp.ones((8, 6)), "bias": jnp.ones(6)}
        >>> packed = svd(None, params, None, LowRank(1)).params
        >>> model = low_rank_apply(lambda p, x: x @ p["kernel"] + p["bias"], packed, jnp.ones(8))
        >>> model.apply(packed, jnp.arange(8.0)).round(4)
        Array([29., 29., 29., 29., 29., 29.], dtype=float32)
        >>> print(model)
        on factors  form    operation    FLOPs  dense
        kernel      rank 1  dot_general     28     96
    """
    check_function("apply_fn", apply_fn, "(params, *inputs) -> outputs")
    kinds = jax.tree.structure(params)
    first = _plan(apply_fn, params, inputs)
    if not first.products:
        reasons = "; ".join(f"{name}: {why}" for name, why in first.left.items())
        raise ValueError(f"nothing can run on factors: {reasons or 'there is no LowRankArray'}")
    runs: dict[Any, Any] = {}

    def call(params: Any, *inputs: Any) -> Any:
        if jax.tree.structure(params) != kinds:
            raise ValueError(
                "params: another structure than that of the tree that this model was made with"
            )
        arguments, structure = jax.tree.flatten((params, inputs))
        # An analysis depends on nothing but structure, shapes and dtypes, so it may be kept.
        key = (structure, tuple(map(jax.typeof, arguments)))
        if key in runs:
            return runs[key](params, inputs)
        plan = _plan(apply_fn, params, inputs)

        def compute(params: Any, inputs: Any) -> Any:
            return _compute(plan, params, inputs)

        if holds_tracers(plan.program):
            return compute(params, inputs)
        runs[key] = jax.jit(compute)
        return runs[key](params, inputs)

    told = {
        name: LowRankProduct(str(at.placed.op), at.form, at.flops, at.dense_flops)
        for name, at in first.products.items()
    }
    return LowRankModel(told, first.left, call)


class _Planned(NamedTuple):
    """How to run one product on factors."""

    path: str
    placed: Placed
    loops: tuple[Op, ...]
    spent: bool
    form: str
    flops: int
    dense_flops: int


class _Plan(NamedTuple):
    """A program, what of it runs on factors, why the rest does not, and what is decoded."""

    program: Program
    products: dict[str, _Planned]
    left: dict[str, str]
    needed: frozenset[str]


def _plan(apply_fn: Callable[..., Any], params: Any, inputs: tuple[Any, ...]) -> _Plan:
    leaves = tree_lib.flatten(params)
    outlines = tree_lib.Leaves((path, _outline(leaf)) for path, leaf in leaves.items())
    program = read(apply_fn, tree_lib.replace(params, outlines), *inputs)
    bodies = dict(tapped.around(program))
    products: dict[str, _Planned] = {}
    left: dict[str, str] = {}
    needed = set(leaves)
    uses = find_uses(program)
    for path, leaf in leaves.items():
        if not isinstance(leaf, (LowRankArray, LowRankSumArray)):
            continue
        mine = [use for use in uses if use.path == path]
        names = [path if i == 0 else f"{path}#{i + 1}" for i in range(len(mine))]
        walks = tapped.walks(program, path)
        for name, use in zip(names, mine, strict=True):
            try:
                products[name] = _planned(path, leaf, use, walks, bodies)
            except Unfit as error:
                left[name] = str(error)
        if not mine:
            left[path] = "no output depends on it"
        if all(name in products for name in names):
            needed.discard(path)
    return _Plan(program, products, left, frozenset(needed))


def _outline(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_compressed(leaf) else leaf


def _planned(path: str, leaf: CompressedArray, use: Use, walks: Any, bodies: Any) -> _Planned:
    """How to run one use of a leaf on its factors, or :class:`Unfit`."""
    if not isinstance(leaf, LowRankArray):
        raise Unfit("what its factors leave over is added to them")
    if leaf.mask is not None:
        raise Unfit("it is masked")
    if use.op not in bodies:
        raise Unfit("it is an output of the model")
    reason = tapped.obstacle(bodies[use.op])
    if reason is not None:
        raise Unfit(reason)
    walk = walks[use.op.inputs[use.operand]]
    changed = (walk.inside | walk.outside) - _LAYOUT
    if changed:
        raise Unfit(f"{', '.join(sorted(changed))} changes it before {use.op} reads it")
    stack = leaf.ndim - len(terms_of(leaf.equation)[1])
    walked = tuple(role == "stack" for role in use.roles)
    if walked != (True,) * stack + (False,) * (leaf.ndim - stack) or len(walk.loops) != stack:
        raise Unfit("its stacked axes are not those that loops walk along")
    if stack and walk.outside & {"transpose", "reshape"}:
        raise Unfit("its stacked axes change places before a loop walks along them")
    placed = Placed(use.op, use.operand, _letters(leaf, use, stack), leaf.equation)
    check_product(placed)
    flops, dense = _flops(placed, leaf, stack)
    if flops >= dense:
        raise Unfit(f"its factors take {flops:,} FLOPs, the dense weight {dense:,}")
    around = tuple(op for op, _ in bodies[use.op] if op.name not in _INLINE)
    return _Planned(path, placed, walk.loops, around == walk.loops, leaf.form(), flops, dense)


def _letters(leaf: LowRankArray, use: Use, stack: int) -> str:
    """The letter of each axis of the operand."""
    _, result = terms_of(leaf.equation)
    shape = use.op.inputs[use.operand].shape
    found: dict[int, str] = {}
    small = []
    for axis, letter in enumerate(result, stack):
        lies, size = use.axes[axis], leaf.shape[axis]
        if lies is None or lies.start != 0:
            raise Unfit(f"{use.op} reads a part of it, or its axes mixed")
        if not lies.parts:
            small.append(letter)
            continue
        whole = len(lies.parts) == 1 and lies.parts[0][:2] == (size, 1)
        part = lies.parts[0]
        if not whole or (part.stride, part.offset) != (1, 0) or shape[part.axis] != size:
            raise Unfit(f"{use.op} reads its axes joined, or cut")
        found[part.axis] = letter
    # An axis of one position may stand for any other such.
    free = [axis for axis in range(len(shape)) if axis not in found]
    more = [letter for letter in string.ascii_letters if letter not in leaf.equation]
    spare = len(free) - len(small) if use.kind == "conv" else 0
    if len(free) != len(small) + max(spare, 0) or any(shape[axis] != 1 for axis in free):
        raise Unfit(f"{use.op} reads its axes joined, or cut")
    if spare > 0:
        # Axes that the leaf lacks are those of a window of one position.
        window = use.op.params["dimension_numbers"].rhs_spec[2:]
        free.sort(key=lambda axis: axis in window)
    found |= dict(zip(free, [*small, *more], strict=False))
    return "".join(found[axis] for axis in range(len(shape)))


def _flops(placed: Placed, leaf: LowRankArray, stack: int) -> tuple[int, int]:
    """What the product takes on factors, and on the dense weight."""
    op, other = placed.op, 1 - placed.operand
    x = jax.ShapeDtypeStruct(op.inputs[other].shape, op.inputs[other].dtype)
    kernel = op.inputs[placed.operand]
    weight = {"w": jax.ShapeDtypeStruct(kernel.shape, kernel.dtype)}

    def dense(p: Any, x: Any) -> Any:
        return tapped.bind(op, *((x, p["w"]) if placed.operand else (p["w"], x)))[0]

    def small(p: Any, x: Any) -> Any:
        return multiply(placed, x, tuple(p))

    factors = list(shapes_of(leaf.factors, stack))
    return trace(small, factors, x).total.flops, trace(dense, weight, x).total.flops


def _compute(plan: _Plan, params: Any, inputs: Any) -> Any:
    leaves = tree_lib.flatten(params)
    values = []
    for path, leaf in leaves.items():
        if not is_compressed(leaf):
            values.append(leaf)
        elif path in plan.needed:
            values.append(leaf.decode())
        else:
            # Nothing reads it: NaN would tell.
            values.append(jnp.full(leaf.shape, jnp.nan, leaf.dtype))
    state = {name: leaves[at.path].factors for name, at in plan.products.items()}
    arguments = [*values, *jax.tree.leaves(inputs)]
    outputs, _ = tapped.run(plan.program, arguments, {}, state, _swaps(plan))
    return jax.tree.unflatten(plan.program.out_tree, outputs)


def _swaps(plan: _Plan) -> dict[Op, tapped.Swap]:
    swaps = {}
    for name, at in plan.products.items():

        def perform(
            entries: Any, inputs: tuple[Any, ...], bind: Any, name: str = name, at: Any = at
        ) -> Any:
            result = multiply(at.placed, inputs[1 - at.placed.operand], entries[name])
            # A loop that gets slices of factors would stack them up again.
            return [result], {name: () if at.spent else entries[name]}

        swaps[at.placed.op] = tapped.Swap((name,), at.loops, perform)
    return swaps


def _table(executed: Mapping[str, LowRankProduct], left: Mapping[str, str]) -> str:
    rows = [("on factors", "form", "operation", "FLOPs", "dense")]
    for name, at in executed.items():
        rows.append((name, at.form, at.operation, f"{at.flops:,}", f"{at.dense_flops:,}"))
    lines = columns.table(rows, left=3)
    return "\n".join([lines, *(f"left: {name}: {why}" for name, why in left.items())])
