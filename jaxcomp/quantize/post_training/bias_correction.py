"""Bias correction: the mean shift that quantization leaves in the outputs goes into the biases."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxcomp import columns
from jaxcomp import tree as tree_lib
from jaxcomp.arrays import decode, is_compressed
from jaxcomp.checks import check_count
from jaxcomp.model import tapped
from jaxcomp.model.batches import peek, rereadable, spread
from jaxcomp.model.layerwise import WalkFiles
from jaxcomp.model.program import Op, read
from jaxcomp.model.progress import watched
from jaxcomp.quantize.post_training.bias_places import BiasPlace, bias_places
from jaxcomp.sharding import automatic


class CorrectedBias(NamedTuple):
    """What correction did for a bias.

    Attributes:
        path: of the bias.
        weights: paths of the compressed leaves before it.
        before: root mean square, over the entries of the bias, of what the mean of its outputs had
            moved by, over the root mean square of the outputs.
        after: the same with all biases corrected.
    """

    path: str
    weights: tuple[str, ...]
    before: float
    after: float


class Corrected(NamedTuple):
    """A quantized model with corrected biases; ``print`` it for a table.

    Attributes:
        params: the tree, compressed leaves and all; corrected biases are dense.
        leaves: what became of each bias, in the order of the program.
        uncorrected: why a compressed leaf has no bias to correct, by path.
    """

    params: Any
    leaves: tuple[CorrectedBias, ...]
    uncorrected: dict[str, str]

    def __str__(self) -> str:
        return _table(self)


class _Means(NamedTuple):
    """Over all batches so far.

    Attributes:
        count: samples a slice.
        mean: of the outputs, for each entry of the bias.
        square: mean square of all outputs.
    """

    count: Any
    mean: Any
    square: Any


_Places = Mapping[str, tuple[BiasPlace, ...]]


def correct_bias(
    apply_fn: Callable[..., Any],
    params: Any,
    quantized: Any,
    batches: Iterable[Any] | Callable[[], Iterable[Any]],
    *,
    at_once: int = 1,
    directory: str | os.PathLike | None = None,
    progress: bool | None = None,
) -> Corrected:
    """Move biases so that the outputs of a quantized model's layers have their old means.

    Rounding shifts the mean of an output by the mean of its inputs times what the weights changed
    by. Behind each dot and convolution with a compressed leaf the bias is found in the program,
    also behind a BatchNorm with fixed statistics; the mean of what is added to it is measured in
    the dense model and in the quantized one, earlier biases corrected, and the bias takes the
    difference. A leaf without such a bias is named with the reason.

    Args:
        apply_fn: a function of ``(params, *inputs)``. Statistics of a BatchNorm must be fixed, as
            in evaluation.
        params: the dense tree.
        quantized: the same tree with compressed leaves.
        batches: a list or another iterable that starts over, or a function that returns one. A
            plain tuple is spread over ``inputs``.
        at_once: biases a pass over the batches; those of one pass do not see each other corrected.
            Three passes come on top, one of them through the dense model.
        directory: where finished biases are kept; the same call goes on after them.
        progress: whether to show a progress bar on stderr; None: on a terminal, if it takes long.

    Returns:
        The corrected tree and a report.

    Raises:
        ValueError: no compressed leaf, or other leaves than in ``params``; no bias can be
            corrected; outputs that are NaN or infinite; no batches; the directory holds files of
            another call.
        TypeError: ``batches`` can be read only once, or is one array.
        CheckpointError: a file is damaged.

    Example:
        >>> from jaxcomp.quantize import Format, encode
        >>> params = {"w": jnp.array([[0.4], [7.0]]), "b": jnp.zeros(1)}
        >>> quantized = {**params, "w": encode(params["w"], Format(bits=4))}
        >>> batches = [jnp.array([[1.0, 1.0], [2.0, -1.0]])]
        >>> found = correct_bias(lambda p, x: x @ p["w"] + p["b"], params, quantized, batches)
        >>> found.params["b"].round(3)
        Array([0.6], dtype=float32)
        >>> print(found)
        bias  weights  shift before  after
        b     w                8.8%   0.0%

    Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction",
    2019, section 4.2 and appendix D.
    """
    check_count("at_once", at_once)
    again = rereadable(batches)
    compressed = _compressed(params, quantized)
    first, _ = peek(again())
    places, weights, without = _plan(apply_fn, params, quantized, spread(first), compressed)
    files = None
    if directory is not None:
        now = decode(quantized)
        both = {"dense": params, "quantized": now}
        files = WalkFiles.open(directory, "bias_correction", {"at_once": str(at_once)}, both)
    measure = _Meter(apply_fn, compressed, places)
    dense = measure(params, again())
    before = measure(quantized, again())
    groups = [list(places)[i : i + at_once] for i in range(0, len(places), at_once)]
    news = tree_lib.Leaves()
    old = tree_lib.flatten(quantized)

    def check(path: str, parts: tuple[Any, ...]) -> None:
        (new,) = parts
        if new.shape != old[path].shape or new.dtype != old[path].dtype:
            raise ValueError(f"{path}: {new.dtype} {new.shape}")

    for number, group in enumerate(watched(groups, "correcting biases", progress)):
        done = None if files is None else files.read(number, group, check)
        if done is None:
            found = measure(tree_lib.replace(quantized, news), again()) if number else before
            done = {path: (_moved(old[path], dense[path], found[path]),) for path in group}
            if files is not None:
                files.write(number, done)
        for path, (new,) in done.items():
            news[path] = _placed(new, old[path])
    corrected = tree_lib.replace(quantized, news)
    after = measure(corrected, again())
    report = []
    for path in places:
        moved = np.asarray(news[path], np.float64) - np.asarray(old[path], np.float64)
        shifts = _shift(dense[path], before[path], 0), _shift(dense[path], after[path], moved)
        report.append(CorrectedBias(path, weights[path], *shifts))
    return Corrected(corrected, tuple(report), without)


def _compressed(params: Any, quantized: Any) -> list[str]:
    dense, there = tree_lib.flatten(params), tree_lib.flatten(quantized)
    if list(dense) != list(there):
        odd = sorted({*dense} ^ {*there})
        raise ValueError(
            f"params and quantized hold other leaves: {', '.join(odd[:3]) or 'in another order'}: "
            "give the dense tree and what quantization made of it"
        )
    for path, leaf in dense.items():
        if tuple(leaf.shape) != tuple(there[path].shape) or leaf.dtype != there[path].dtype:
            raise ValueError(
                f"{path}: {leaf.dtype} {tuple(leaf.shape)} in params, but "
                f"{there[path].dtype} {tuple(there[path].shape)} in quantized"
            )
    found = [path for path, leaf in there.items() if is_compressed(leaf)]
    if not found:
        raise ValueError("quantized holds no compressed leaf: pass the params of a quantized model")
    return found


def _plan(
    apply_fn: Callable[..., Any],
    params: Any,
    quantized: Any,
    inputs: tuple[Any, ...],
    compressed: Sequence[str],
) -> Any:
    """Places and weights by bias, and why a weight has none."""
    places, weights, without = bias_places(read(apply_fn, decode(params), *inputs), compressed)
    leaves = tree_lib.flatten(quantized)
    for bias in [bias for bias in places if is_compressed(leaves[bias])]:
        del places[bias]
        reason = f"its bias {bias} is compressed: leave it dense, with a rule of None"
        without.update(dict.fromkeys(weights.pop(bias), reason))
    if not places:
        reasons = "; ".join(f"{path}: {reason}" for path, reason in without.items())
        raise ValueError(f"no bias can be corrected: {reasons}")
    return places, weights, without


class _Meter:
    """Means at the places of biases, in passes over batches; a program for each kind of batch."""

    def __init__(
        self, apply_fn: Callable[..., Any], compressed: Sequence[str], places: _Places
    ) -> None:
        self.apply_fn, self.compressed, self.places = apply_fn, compressed, places
        self.steps: dict[Any, Any] = {}

    def __call__(self, params: Any, batches: Iterable[Any]) -> dict[str, _Means]:
        """The means of the outputs before each bias."""
        params = decode(params)
        state = {path: _begin(places[0]) for path, places in self.places.items()}
        for batch in batches:
            inputs = spread(batch)
            state = self.step(params, inputs)(state, params, inputs)
        found = jax.device_get(state)
        for path, means in found.items():
            if not np.all(np.isfinite(means.mean)) or not np.all(np.isfinite(means.square)):
                raise ValueError(f"{path}: added to NaN or infinite outputs: mend the batches")
            if np.any(means.count == 0):
                raise ValueError(f"{path}: no batch led to the sum with it")
        return found

    def step(self, params: Any, inputs: Any) -> Callable[..., Any]:
        leaves, structure = jax.tree.flatten((params, inputs))
        kind = (structure, tuple(map(jax.typeof, leaves)))
        if kind not in self.steps:
            program = read(self.apply_fn, params, *inputs)
            places, _, _ = bias_places(program, self.compressed)
            missing = [path for path in self.places if path not in places]
            if missing:
                raise ValueError(
                    f"{missing[0]}: a batch of another shape does not lead to the sum with it: "
                    "correct the biases with batches of one kind"
                )
            self.steps[kind] = _step(program, {path: places[path] for path in self.places})
        return self.steps[kind]


def _begin(place: BiasPlace) -> _Means:
    zeros = jnp.zeros(place.turns)
    return _Means(zeros, jnp.zeros((*place.turns, *place.sizes)), zeros)


def _step(program: Any, places: _Places) -> Callable[..., Any]:
    taps: dict[Op, list[tapped.Tap]] = {}
    for path, sums in places.items():
        for place in sums:
            taps.setdefault(place.op, []).append(tapped.Tap(path, place.loops, _fold(place)))

    def step(state: Any, params: Any, inputs: Any) -> Any:
        values = jax.tree.leaves((params, inputs))
        return tapped.run(program, values, taps, state)[1]

    return jax.jit(step)


def _fold(place: BiasPlace) -> Callable[[Any, tuple[Any, ...]], Any]:
    def update(entry: _Means, outputs: Array) -> _Means:
        if outputs.size == 0:
            return entry
        outputs = outputs.astype(jnp.float32)
        more = outputs.size / max(int(np.prod(place.sizes)), 1)
        count = entry.count + more
        part = more / count
        mean = entry.mean + (place.entries(outputs) - entry.mean) * part
        square = entry.square + (jnp.mean(outputs * outputs) - entry.square) * part
        return _Means(count, mean, square)

    return lambda entry, inputs: automatic(update)(entry, inputs[place.operand])


def _moved(bias: Any, dense: _Means, found: _Means) -> Array:
    moved = np.asarray(bias).astype(np.float64) + dense.mean - found.mean
    return jnp.asarray(moved.astype(np.float32)).astype(bias.dtype)


def _placed(new: Any, like: Any) -> Any:
    sharding = getattr(like, "sharding", None)
    return jnp.asarray(new) if sharding is None else jax.device_put(new, sharding)


def _shift(dense: _Means, found: _Means, moved: Any) -> float:
    """How far means are from the dense model's, the bias moved as well."""
    size = np.sqrt(np.mean(dense.square))
    shift = found.mean.astype(np.float64) - dense.mean + moved
    return float(np.sqrt(np.mean(np.square(shift))) / size) if size else 0.0


def _table(found: Corrected) -> str:
    rows: list[tuple[str, ...]] = [("bias", "weights", "shift before", "after")]
    for leaf in found.leaves:
        shifts = (f"{100 * shift:.1f}%" for shift in (leaf.before, leaf.after))
        rows.append((leaf.path, ", ".join(leaf.weights), *shifts))
    lines = [f"not corrected: {path}: {why}" for path, why in found.uncorrected.items()]
    return "\n".join([columns.table(rows, left=2), *lines])
