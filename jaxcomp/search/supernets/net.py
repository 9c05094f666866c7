"""Any model as a supernet: its sub-networks as masks, what they cost, and how one is taken out."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jaxcomp import checks
from jaxcomp import tree as tree_lib
from jaxcomp.model.couple import analyse
from jaxcomp.model.dims import find
from jaxcomp.model.program import read
from jaxcomp.model.removed import Size, kept_positions, size_of
from jaxcomp.search.spaces import Choice
from jaxcomp.search.supernets import declare, masks, sizes
from jaxcomp.search.supernets.checks import (
    check_also,
    check_candidate,
    check_dense,
    check_known,
    check_paths,
    check_shapes,
    check_weights,
)
from jaxcomp.search.supernets.edit import cropped, inlined, kernel_axes
from jaxcomp.search.supernets.masks import Mask, Part, by_kind
from jaxcomp.search.supernets.removal import Removal, smaller
from jaxcomp.search.supernets.sizes import Costing
from jaxcomp.search.supernets.subnetwork import Subnetwork, on_smaller

Candidate = dict[str, dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Supernet:
    """A model whose sub-networks share its parameters; ``print`` it to see what may be chosen.

    A candidate is of ``space``: ``{"width": {group: units}, "kernel": {leaf: size},
    "depth": {stage: branches}, "connections": {name: bool}}``, with those kinds only that were
    asked for. Its numbers may be traced: a compiled function of it serves all candidates, and maps
    over those that :func:`jaxcomp.search.stack` puts together.

    Attributes:
        apply_fn: the model, as it was given.
        space: what there is to choose from.
        largest: the candidate with the most of everything.
        smallest: the one with the least.
        parts: what there is to choose, in order.
        masks: of the leaves.
        ranks: by group of channels, from the first unit to go in to the last, from 0.
        costing: what costs depend on.
        full_params: shapes and dtypes of the largest model's parameters.
    """

    apply_fn: Callable[..., Any] = field(repr=False)
    space: dict[str, dict[str, Choice]]
    largest: Candidate = field(repr=False)
    smallest: Candidate = field(repr=False)
    parts: tuple[Part, ...] = field(repr=False)
    masks: tuple[Mask, ...] = field(repr=False)
    ranks: Mapping[str, np.ndarray] = field(repr=False)
    costing: Costing = field(repr=False)
    full_params: Any = field(repr=False)

    def masked(self, params: Any, candidate: Any) -> Any:
        """The largest model's parameters with zeros where a candidate has nothing.

        ``apply_fn`` on them gives what the extracted sub-network gives, to rounding.

        Args:
            params: the largest model's, or the part of it that a gradient is taken of.
            candidate: of ``space``; its numbers may be traced, and are not checked then.

        Returns:
            The same tree. Only what is there has a gradient.

        Raises:
            ValueError: the candidate does not fit the space, or a leaf is of another shape.
        """
        check_candidate(self, candidate)
        check_shapes(self, params)
        return masks.apply(params, self.masks, candidate)

    def mixed(self, params: Any, weights: Any) -> Any:
        """The largest model's parameters under a weighted mean of every part's masks.

        Args:
            params: the largest model's.
            weights: by kind and name, (options,), as :mod:`jaxcomp.search.differentiable` makes
                them. Where each is 1 for one option this is :meth:`masked`.

        Returns:
            The same tree; differentiable in both. Each leaf of a width is scaled by itself, so that
            between two options a channel is weakened where it is made and where it is read.

        Raises:
            ValueError: weights are not one for each option, or a leaf is of another shape.
        """
        check_weights(self, weights)
        check_shapes(self, params)
        return masks.mix(params, self.masks, weights)

    def random(self, key: Any) -> Any:
        """A candidate with every part drawn evenly, as traced numbers.

        Args:
            key: a PRNG key.

        Returns:
            int32 scalars in the place of numbers.
        """
        checks.check_key(key)
        counts = np.array([len(part.options) for part in self.parts])
        drawn = jax.random.randint(key, (len(counts),), 0, counts)
        values = {
            part: jnp.asarray(part.options, jnp.int32)[drawn[i]]
            for i, part in enumerate(self.parts)
        }
        return by_kind(self.parts, values)

    def cost(self, candidate: Any) -> Size:
        """What the extracted sub-network is and costs, read from the traced model.

        Exact, but for a FLOP here and there between constants, which are folded otherwise where the
        extracted network is traced itself.

        Args:
            candidate: of ``space``, plain numbers.

        Returns:
            MACs and FLOPs of one call at the batch size that was traced, parameters and bytes.
        """
        return sizes.size_of(self.costing, self._values(candidate))

    def expected_cost(self, weights: Any) -> Size:
        """The mean cost of candidates whose parts are drawn with given probabilities.

        Args:
            weights: by kind and name, (options,) that sum to one.

        Returns:
            As :meth:`cost`, differentiable scalars.

        Raises:
            ValueError: weights are not one for each option; an operation depends on too many parts
                at once to take the mean over.
        """
        check_weights(self, weights)
        return sizes.expected(self._tables, weights)

    def extract(self, params: Any, candidate: Any) -> Subnetwork:
        """Take a sub-network out: channels, kernel borders and branches leave for real.

        Its functions are the model's own operations on smaller arrays. Rematerialization is not
        among them: ask for it anew with ``jax.checkpoint``.

        Args:
            params: the largest model's, trained.
            candidate: of ``space``, plain numbers.

        Returns:
            The sub-network.

        Raises:
            TypeError: a number is traced, or a leaf compressed.
            ValueError: the candidate does not fit the space, or the parameters are not those of
                the largest model.
        """
        check_dense(params)
        check_paths(self, params)
        check_shapes(self, params)
        values = self._values(candidate)
        removal = self._removal(values)
        before = tree_lib.flatten(self.full_params)
        cut = smaller(self.full_params, removal)
        after = tree_lib.flatten(cut)
        shapes = {p: (before[p].shape, leaf.shape) for p, leaf in after.items()
                  if leaf.shape != before[p].shape}  # fmt: skip
        return Subnetwork(
            params=smaller(params, removal),
            apply=on_smaller(self.apply_fn, self.full_params, removal),
            candidate=by_kind(self.parts, values),
            removal=removal,
            shapes=shapes,
            before=size_of(self.costing.coupling, {}),
            after=sizes.size_of(self.costing, values),
            full_params=self.full_params,
        )

    def _removal(self, values: Mapping[Part, int]) -> Removal:
        costing = self.costing
        units = {
            part.name: self.ranks[part.name] < values[part]
            for part in costing.atoms
            if values[part] < len(self.ranks[part.name])
        }
        zeros = sizes.zero_leaves(costing, values)
        gone = sizes.gone_leaves(costing, sizes.cut_program(costing, values), zeros)
        channels = kept_positions(costing.coupling, units)
        kept = dict(channels)
        cuts = {}
        for part, path in costing.kernels.items():
            leaf = costing.coupling.program.leaves[path]
            axes = kernel_axes(costing.coupling.program, path)
            if path not in gone and any(leaf.shape[axis] > values[part] for axis in axes):
                cuts[path] = int(values[part])
                pairs = zip(channels[path], cropped(leaf, axes, values[part]), strict=True)
                kept[path] = tuple(a if a is not None else b for a, b in pairs)
        return Removal(channels, kept, cuts, zeros, gone)

    def _values(self, candidate: Any) -> dict[Part, int]:
        check_candidate(self, candidate)
        values = {}
        for part in self.parts:
            value = part.of(candidate)
            if isinstance(value, jax.core.Tracer):
                raise TypeError(
                    f"{part.kind}/{part.name}: a traced number has no value yet: give plain ones"
                )
            values[part] = type(part.options[0])(value)
        return values

    @functools.cached_property
    def _tables(self) -> tuple[sizes.Table, ...]:
        return sizes.tabulate(self.costing)

    def __str__(self) -> str:
        lines = [f"{part.kind} {part.name}: {', '.join(map(str, part.options))}"
                 for part in self.parts]  # fmt: skip
        least, most = self.cost(self.smallest), self.cost(self.largest)
        for name, a, b in zip(("MACs", "FLOPs", "parameters", "bytes"), least, most, strict=True):
            lines.append(f"{name}: {a:,} to {b:,}")
        return "\n".join(lines)


def supernet(
    apply_fn: Callable[..., Any],
    params: Any,
    *inputs: Any,
    width: Any = None,
    kernel: Any = None,
    depth: Any = None,
    connections: Any = None,
    order: str = "first",
    also: Any = (),
) -> Supernet:
    """Make a supernet of a model as it is: its sub-networks are masks over its parameters.

    Nothing of the model is written anew. What can be cut, and what goes with it, is read from the
    traced function, so a masked model and the extracted one give the same outputs: channels as in
    :func:`jaxcomp.model.couple`, the centres of convolutions' kernels, and branches that add
    nothing where the leaves that they name are zero.

    Args:
        apply_fn: the model as it is used for inference, a function of ``(params, *inputs)``.
        params: the largest model's, with ``batch_stats`` and the like if it takes them; arrays or,
            unless ``order`` looks at them, ``jax.ShapeDtypeStruct``.
        *inputs: an example batch; only shapes and dtypes matter. Costs are those at this size.
        width: by pattern of slices of a group (``"params/Conv_0/kernel[3]"``) or of leaves that
            make its channels (``"*Conv*"``), how many units of it may stay: counts, or fractions of
            all, rounded up. A unit is what goes as one: a channel, a head, or one channel of each
            group of a group norm. Each group of channels chooses by itself; the first pattern that
            names it counts.
        kernel: by pattern of leaves, heights and widths of the kernel's centre that may stay; an
            axis that is shorter stays as it is.
        depth: by name of a stage, its branches in order, of which the first so many stay; a branch
            is one or several patterns of leaves. Where these are zero it must add nothing to what
            goes around it: the last kernel and bias of a residual block, the scale and bias of its
            last norm, or everything in it.
        connections: by name of a branch, its patterns: the branch stays or goes.
        order: which channels go in first: the first ones, or those of the largest l1 norm, as
            once-for-all networks do before they are trained to be elastic.
        also: other functions of the same parameters, each with its inputs, that must run on the
            extracted ones too, such as a training step's forward pass.

    Returns:
        The supernet.

    Raises:
        TypeError: a leaf is no array or compressed, or options are not of the right kind.
        ValueError: nothing is elastic; a pattern names nothing that can be cut, with the reasons;
            an option does not fit; something is left of a branch without its leaves.

    Example:
        >>> def mlp(p, x):
        ...     return x + jax.nn.relu(x @ p["up"] + p["bias"]) @ p["down"]
        >>> params = {"up": jnp.ones((3, 8)), "bias": jnp.ones(8), "down": jnp.ones((8, 3))}
        >>> net = supernet(
        ...     mlp, params, jnp.ones((1, 3)), width={"up": (0.5, 1.0)}, connections={"mlp": "down"}
        ... )
        >>> print(net)
        width up[1]: 4, 8
        connections mlp: False, True
        MACs: 0 to 48
        FLOPs: 0 to 115
        parameters: 0 to 56
        bytes: 0 to 224
        >>> candidate = {"width": {"up[1]": 4}, "connections": {"mlp": True}}
        >>> small = net.extract(params, candidate)
        >>> small.params["down"].shape, small.apply(small.params, jnp.ones((1, 3)))
        ((4, 3), Array([[17., 17., 17.]], dtype=float32))
        >>> mlp(net.masked(params, candidate), jnp.ones((1, 3)))
        Array([[17., 17., 17.]], dtype=float32)

    Cai, Gan, Wang, Zhang and Han, Once-for-All (2020), section 3; Yu, Yang, Xu, Yang and Huang,
    Slimmable Neural Networks (2019), section 3.
    """
    check_dense(params)
    if order not in ("first", "l1"):
        raise ValueError(f"order must be 'first' or 'l1', not {order!r}")
    if order == "l1":
        check_known(params)
    check_also(also)
    program = inlined(read(apply_fn, params, *inputs))
    others = [inlined(read(function, params, *given)) for function, given in also]
    coupling = analyse(program, others)
    ranks = declare.unit_ranks(coupling.groups, params, order)
    channels = declare.widths(coupling, width, ranks)
    centres = declare.kernels([program, *others], kernel)
    branches, gates = declare.branches(
        [program, *others],
        depth,
        connections,
    )
    parts = (*channels, *centres, *branches)
    if not parts:
        raise ValueError("nothing is elastic: give width=, kernel=, depth= or connections=")
    space = by_kind(parts, {part: Choice(part.options) for part in parts})
    every = [mask for each in (*channels.values(), *centres.values()) for mask in each]
    costing = Costing(
        coupling,
        {part: find(coupling.units[part.name]) for part in channels},
        {part: part.name for part in centres},
        branches,
    )
    return Supernet(
        apply_fn,
        space,
        largest=by_kind(parts, {part: part.options[-1] for part in parts}),
        smallest=by_kind(parts, {part: part.options[0] for part in parts}),
        parts=parts,
        masks=(*every, *gates),
        ranks={part.name: ranks[part.name] for part in channels},
        costing=costing,
        full_params=jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params),
    )
