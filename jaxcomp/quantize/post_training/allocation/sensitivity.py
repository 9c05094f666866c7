"""What each leaf alone costs in bytes, and does to the outputs, in each format that it may have."""

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp import tree as tree_lib
from jaxcomp.arrays import nbytes
from jaxcomp.checkpoint import CheckpointError, load, save
from jaxcomp.checkpoint.resuming import check_call, describe, file_in
from jaxcomp.checks import check_function
from jaxcomp.model.batches import peek, rereadable, spread
from jaxcomp.model.progress import watched
from jaxcomp.quantize.affine import encode, fake_quant
from jaxcomp.quantize.formats import AnyFormat, Format
from jaxcomp.quantize.post_training.tasks import plan

FILE = "bits.jxc"
_VERSION = 1
Candidates = tuple[AnyFormat | None, ...]


class LeafSensitivity(NamedTuple):
    """One leaf, in every format that it may have.

    Attributes:
        path: of the leaf.
        size: how many weights it has.
        formats: with concrete axes; None: left dense.
        nbytes: in each format.
        damages: to the outputs, while all other leaves are dense; NaN where that is not finite.
    """

    path: str
    size: int
    formats: Candidates
    nbytes: tuple[int, ...]
    damages: tuple[float, ...]


class Program(NamedTuple):
    """A model to compare with itself.

    Attributes:
        params: the dense ones.
        again: returns the batches from their beginning.
        outputs: ``(params, inputs) -> outputs, what compare says of them twice``, compiled.
        compared: ``(dense outputs, params, inputs) -> number``, compiled: one program for all.
    """

    params: Any
    again: Callable[[], Iterable[Any]]
    outputs: Callable[..., Any]
    compared: Callable[..., Any]

    @staticmethod
    def of(
        apply_fn: Callable[..., Any],
        params: Any,
        batches: Iterable[Any] | Callable[[], Iterable[Any]],
        compare: Any,
    ) -> "Program":
        """Compile, when first used.

        Raises:
            TypeError: something is no function, or the batches can be read only once.
        """
        check_function("apply_fn", apply_fn, "(params, *inputs)")
        check_function("compare", compare, "(dense outputs, quantized outputs)")

        def outputs(params: Any, inputs: tuple[Any, ...]) -> tuple[Any, Any]:
            dense = apply_fn(params, *inputs)
            return dense, _one_number(compare(dense, dense))

        def compared(dense: Any, params: Any, inputs: tuple[Any, ...]) -> Any:
            return _one_number(compare(dense, apply_fn(params, *inputs)))

        return Program(params, rereadable(batches), jax.jit(outputs), jax.jit(compared))

    def damages(self, trees: Sequence[Any]) -> list[float]:
        """What ``compare`` says of some trees, each batch alike, less what it says of the dense."""
        totals, count = np.zeros(len(trees)), 0
        for batch in self.again():
            inputs = spread(batch)
            dense, same = self.outputs(self.params, inputs)
            # All are under way before the first is waited for.
            found = [same, *(self.compared(dense, tree, inputs) for tree in trees)]
            base, *values = (float(value) for value in found)
            if not math.isfinite(base):
                raise ValueError(
                    f"compare gives {base} for the dense outputs and themselves, in batch {count}: "
                    "there is nothing to measure against"
                )
            totals, count = totals + np.subtract(values, base), count + 1
        return (totals / count).tolist()


def measure(
    program: Program,
    candidates: Mapping[str, Candidates],
    call: Callable[[], Mapping[str, str]],
    directory: str | os.PathLike | None = None,
    progress: bool | None = None,
) -> tuple[LeafSensitivity, ...]:
    """Round one leaf at a time to nearest, in each of its formats, and compare the outputs.

    Memory beside the model: one leaf, once for each of its formats.

    Args:
        program: the model.
        candidates: formats by path, from :func:`find_candidates`.
        call: gives what tells the call from others.
        directory: where finished leaves are kept; the same call goes on after them.
        progress: whether to show a progress bar on stderr; None: on a terminal, if it takes long.

    Returns:
        What was found, in the order of the candidates.

    Raises:
        ValueError: the dense model cannot be compared with itself; another call wrote the file.
        CheckpointError: the file is damaged.
    """
    leaves = tree_lib.take(program.params, candidates)
    path, lines = None, {}
    if directory is not None:
        path, lines = file_in(directory, FILE), dict(call())
    known = _read(path, lines) if path is not None and os.path.exists(path) else {}
    for name in watched(list(candidates), "measuring what each leaf costs", progress):
        missing = [f for f in candidates[name] if f is not None and _key(name, f) not in known]
        if not missing:
            continue
        trees = [
            tree_lib.replace(program.params, {name: fake_quant(leaves[name], format)})
            for format in missing
        ]
        found = program.damages(trees)
        known |= {_key(name, f): damage for f, damage in zip(missing, found, strict=True)}
        if path is not None:
            save(path, {"version": _VERSION, "call": lines, "damages": known})
    return tuple(
        LeafSensitivity(
            name,
            leaves[name].size,
            formats,
            tuple(stored_bytes(leaves[name], format) for format in formats),
            tuple(_damage(known, name, format) for format in formats),
        )
        for name, formats in candidates.items()
    )


def find_candidates(
    apply_fn: Callable[..., Any],
    params: Any,
    inputs: Sequence[Any],
    rules: Any,
    bits: Any,
) -> dict[str, Candidates]:
    """The formats that each leaf may have.

    Args:
        apply_fn: a function of ``(params, *inputs)``.
        params: any tree.
        inputs: those of one batch.
        rules: a format, a sequence of formats (None among them: left dense), or such by pattern,
            as methods after training have it. A uniform format alone stands for itself at each
            width in ``bits``, and any format alone also for leaving the leaf dense.
        bits: a sequence of widths.

    Returns:
        By path, with concrete axes, in the order of the program.

    Raises:
        ValueError: no formats or widths, or as :func:`~jaxcomp.quantize.post_training.tasks.plan`.
        TypeError: a rule is no format and no sequence of them.

    Example:
        >>> params = {"w": jnp.ones((4, 2))}
        >>> model = lambda p, x: x @ p["w"]
        >>> found = find_candidates(model, params, (jnp.ones((1, 4)),), Format(), (2, 4))
        >>> [None if format is None else format.bits for format in found["w"]]
        [2, 4, None]
    """
    _check_bits(bits)
    given = rules if isinstance(rules, Mapping) else {"*": rules}
    if not given:
        raise ValueError("rules is empty: {'*': format} is for every weight")
    listed = {pattern: _listed(pattern, rule, bits) for pattern, rule in given.items()}
    concrete = {pattern: [f for f in each if f is not None] for pattern, each in listed.items()}
    found: dict[str, list[AnyFormat | None]] = {}
    for at in range(max(map(len, concrete.values()), default=0)):
        # One place in all lists at a time; a list that is shorter repeats its last.
        column = {
            pattern: each[min(at, len(each) - 1)] if each else None
            for pattern, each in concrete.items()
        }
        for path, task in plan(apply_fn, params, inputs, column, needs_data=False).items():
            formats = found.setdefault(path, [])
            if task.format not in formats:
                formats.append(task.format)
    if not found:
        raise ValueError("every rule is None: there is nothing to quantize")
    chosen = tree_lib.assign(listed, tree_lib.select(params, check=False))
    dense = {path for path in found if None in listed[chosen[path]]}
    return {path: (*each, None) if path in dense else (*each,) for path, each in found.items()}


def _check_bits(bits: Any) -> None:
    if isinstance(bits, str) or not isinstance(bits, Sequence):
        raise TypeError(f"bits must be widths to choose from, such as (2, 4, 8), not {bits!r:.60}")
    if not bits:
        raise ValueError("bits is empty: give widths to choose from, such as (2, 4, 8)")


def _listed(pattern: str, rule: Any, bits: Sequence[int]) -> Candidates:
    """What a rule gives to choose from; a rule of None gives nothing else than None."""
    if rule is None:
        return (None,)
    if isinstance(rule, Format):
        return (*(dataclasses.replace(rule, bits=each) for each in bits), None)
    if isinstance(rule, AnyFormat):
        return (rule, None)
    known = isinstance(rule, Sequence) and all(f is None or isinstance(f, AnyFormat) for f in rule)
    if not known:
        raise TypeError(
            f"rule '{pattern}' must be a format, formats to choose from, or None, not {rule!r:.60}"
        )
    if all(format is None for format in rule):
        raise ValueError(f"rule '{pattern}' has no format to choose: give some, or None alone")
    return tuple(rule)


def stored_bytes(leaf: Any, format: AnyFormat | None) -> int:
    """Bytes of a leaf in a format, scales included; nothing is encoded.

    Args:
        leaf: anything with a shape and a dtype.
        format: None: as it is.

    Example:
        >>> stored_bytes(jnp.ones((4, 2)), Format(4)), stored_bytes(jnp.ones((4, 2)), None)
        (12, 32)
    """
    plain = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    if format is None:
        return nbytes(plain)
    return nbytes(jax.eval_shape(lambda x: encode(x, format), plain))


def describe_call(params: Any, batches: Any, compare: Callable[..., Any]) -> dict[str, str]:
    """What tells one call from another: parameters, the first batch, and what compares.

    Args:
        params: the dense parameters.
        batches: as given.
        compare: told by its name.

    Returns:
        By name, one line each.
    """
    lines = {"compare": getattr(compare, "__qualname__", type(compare).__qualname__)}
    first = jax.tree.map(np.asarray, spread(peek(rereadable(batches)())[0]))
    return lines | describe("first batch", first) | describe("params", params)


def _one_number(value: Any) -> Any:
    fine = isinstance(value, jax.Array) and value.shape == ()
    if not fine or not jnp.issubdtype(value.dtype, jnp.floating):
        what = f"{value.dtype} {value.shape}" if isinstance(value, jax.Array) else f"{value!r:.60}"
        raise TypeError(
            f"compare must return one floating number, not {what}: take the mean over examples"
        )
    return value


def _key(path: str, format: AnyFormat) -> str:
    return f"{path} {format!r}"


def _damage(known: Mapping[str, float], path: str, format: AnyFormat | None) -> float:
    return 0.0 if format is None else known[_key(path, format)]


def _read(path: str, call: Mapping[str, str]) -> dict[str, float]:
    tree = load(path)
    if not isinstance(tree, dict) or tree.keys() != {"version", "call", "damages"}:
        raise CheckpointError(f"{path}: not a file of measured damages")
    if tree["version"] != _VERSION:
        raise CheckpointError(f"{path}: not a file that this version wrote")
    check_call(path, tree["call"], call)
    damages = tree["damages"]
    if not isinstance(damages, dict) or not all(isinstance(d, float) for d in damages.values()):
        raise CheckpointError(f"{path}: the damages cannot be read")
    return dict(damages)
