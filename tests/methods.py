"""The table of methods that every contract test runs through, and small models to run them on."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxcomp import Compression, chain, factorize, identity, partition, prune, quantize, share
from jaxcomp.quantize import Format, PerGroup, PerTensor


@dataclasses.dataclass(frozen=True)
class Case:
    """A method and what is known about it beforehand."""

    name: str
    make: Callable[[], Compression]
    learns: bool = False
    removes: bool = False

    def __str__(self) -> str:
        return self.name


ALLOCATIONS = {
    "layer": prune.allocation.uniform,
    "global": prune.allocation.global_threshold,
}


def pruner(scope: str = "layer", sparsity: float = 0.6, **options: Any) -> Compression:
    schedule = prune.cubic(sparsity, begin=1, end=4)
    return prune.gradual(prune.scores.magnitude, schedule, ALLOCATIONS[scope], every=1, **options)


CASES = [
    Case("identity", identity),
    Case("prune-layer", pruner, removes=True),
    Case("prune-global", lambda: pruner("global"), removes=True),
    Case(
        "prune-blocks",
        lambda: prune.gradual(
            prune.scores.movement(),
            prune.staircase(0.5, rounds=2, every=2),
            prune.allocation.lamp,
            {"*first*": prune.Block((2, 4)), "*second*": prune.Channel(0)},
        ),
    ),
    Case("keep-zeros", prune.keep_zeros),
    Case(
        "set",
        lambda: prune.sparse_evolution(
            0.5, every=4, key=jax.random.key(3), structure={"*first*": prune.Block((2, 2))}
        ),
    ),
    Case(
        "alternating",
        lambda: prune.alternating(0.6, begin=1, end=5, sparse_steps=1, dense_steps=1),
    ),
    Case(
        "lottery-ticket",
        lambda: prune.lottery_ticket(
            0.6, rounds=2, every=2, rewind_to=1, score=prune.scores.running_fisher(0.9)
        ),
    ),
    Case(
        "straight-through",
        lambda: prune.straight_through(
            prune.scores.magnitude, prune.constant(0.5), structure=prune.NM(1, 2), decay=0.01
        ),
    ),
    # Weights that grew together are of one size under Adam, up to their last bits: a second change
    # within the few steps of these tests would have to choose among equals.
    Case("rigl", lambda: prune.rigl(0.6, end=9, every=4, fraction=0.5, key=jax.random.key(3))),
    Case("soft-threshold", lambda: prune.soft_threshold(decay=0.01, initial=-2.0), learns=True),
    Case(
        "movement",
        lambda: prune.movement(prune.cubic(0.6, begin=1, end=4), prune.Channel(-1), every=2),
        learns=True,
    ),
    Case("soft-movement", lambda: prune.soft_movement(threshold=0.47, penalty=1e-3), learns=True),
    Case(
        "hard-concrete",
        lambda: prune.hard_concrete(
            1e-3, key=jax.random.key(0), structure=prune.Block((2, 2)), end=4
        ),
        learns=True,
    ),
    Case("quantize-now", lambda: quantize.train(Format(4))),
    Case("quantize-later", lambda: quantize.train(Format(8, symmetric=False), begin=3)),
    Case("quantize-groups", lambda: quantize.train(Format(3, False, PerGroup(2, axis=-2)))),
    Case("quantize-grid", lambda: quantize.train(quantize.GridFormat("nf4", PerGroup(2)))),
    Case(
        "quantize-gradually",
        lambda: quantize.train(Format(4), begin=1, bits={0: 8, 2: 6, 4: 4}),
    ),
    Case(
        "learned-step",
        lambda: quantize.learned_step(Format(4, granularity=PerTensor())),
        learns=True,
    ),
    Case(
        "learned-step-later",
        lambda: quantize.learned_step(Format(3, granularity=PerGroup(2)), begin=1, bits={3: 4}),
        learns=True,
    ),
    Case(
        "learned-clipping",
        lambda: quantize.learned_clipping(Format(4, granularity=PerTensor()), decay=0.01),
        learns=True,
    ),
    Case(
        "learned-clipping-later",
        lambda: quantize.learned_clipping(Format(3), begin=2),
        learns=True,
    ),
    Case("dorefa", lambda: quantize.dorefa(Format(3, zero=False))),
    Case(
        "dorefa-binary",
        lambda: quantize.dorefa(
            Format(1, zero=False, granularity=PerTensor()), begin=2, bits={4: 2}
        ),
    ),
    Case("quantize-tensor", lambda: quantize.train(Format(2, granularity=PerTensor()), begin=2)),
    Case(
        "rate-distortion",
        lambda: quantize.rate_distortion(lambda step: 1e-4 * step, Format(4), step=0.1),
        learns=True,
    ),
    Case(
        "rate-distortion-later",
        lambda: quantize.rate_distortion(1e-3, begin=2, settle=4, examples=16),
        learns=True,
    ),
    # What rounds to zero may come back; what is pruned may not (tests/quantize/rate).
    Case(
        "prune-then-rate-distortion",
        lambda: chain(pruner(), quantize.rate_distortion(1e-4)),
        learns=True,
    ),
    Case("share-now", lambda: share.train(5), learns=True),
    Case("share-later", lambda: share.train(8, begin=3), learns=True),
    Case(
        "share-reassigned",
        lambda: share.train(4, 1, axis=-1, group_size=2, reassign_every=2, importance_decay=0.9),
        learns=True,
    ),
    Case("share-model", lambda: share.train(6, begin=2, scope="model"), learns=True),
    Case("share-straight-through", lambda: share.straight_through(5, begin=1), learns=True),
    Case("share-soft", lambda: share.soft(6, 1, end=4), learns=True),
    Case(
        "share-vectors",
        lambda: share.train_vectors(share.VectorFormat(3, 2), key=jax.random.key(0)),
        learns=True,
    ),
    Case(
        "prune-then-share-vectors",
        lambda: chain(
            pruner(),
            share.train_vectors(
                share.VectorFormat(2, 2, stages=2, axis=-1, per_space=True),
                key=jax.random.key(0),
                begin=2,
            ),
        ),
        learns=True,
        removes=True,
    ),
    Case("share-hashed", lambda: share.train_hashed(0.5), learns=True),
    Case("share-hashed-later", lambda: share.train_hashed(0.5, seed=1, begin=3), learns=True),
    Case(
        "share-kernels",
        lambda: share.train_kernel_patterns(2, key=jax.random.key(0), begin=1, axes=(-2,)),
        learns=True,
    ),
    Case("low-rank-now", lambda: factorize.train(factorize.LowRank(2)), learns=True),
    Case("low-rank-later", lambda: factorize.train(factorize.LowRank(1), begin=3), learns=True),
    Case(
        "prune-then-low-rank",
        lambda: chain(pruner(), factorize.train(factorize.LowRank(2), begin=2)),
        learns=True,
        removes=True,
    ),
    Case(
        "prune-then-quantize",
        lambda: chain(pruner(), quantize.train(Format(4, symmetric=False), begin=2)),
        removes=True,
    ),
    Case(
        "prune-then-share",
        lambda: chain(pruner("global"), share.train(6, begin=3)),
        learns=True,
        removes=True,
    ),
    Case("share-then-prune", lambda: chain(share.train(6), pruner()), learns=True, removes=True),
    Case(
        "partition",
        lambda: partition(
            {"*first*": chain(pruner(), share.train(4, begin=2)), "*": quantize.train(Format(5))}
        ),
        learns=True,
    ),
    Case(
        "partition-none",
        lambda: chain(partition({"*first*": None, "*": pruner()}), quantize.train(Format(4))),
    ),
]


def params(seed: int = 0, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Weights of a two-layer perceptron, 6 → 8 → 4, nested as Linen nests them."""
    keys = jax.random.split(jax.random.key(seed), 2)
    return {
        "first": {
            "kernel": jax.random.normal(keys[0], (6, 8), dtype) * 0.4,
            "bias": jnp.full((8,), 0.1, dtype),
        },
        "second": {
            "kernel": jax.random.normal(keys[1], (8, 4), dtype) * 0.4,
            "bias": jnp.zeros((4,), dtype),
        },
    }


def model(weights: Any, x: Any) -> Any:
    """The perceptron."""
    hidden = jnp.tanh(x @ weights["first"]["kernel"] + weights["first"]["bias"])
    return hidden @ weights["second"]["kernel"] + weights["second"]["bias"]


def batch(seed: int = 1, size: int = 16) -> tuple[Any, Any]:
    """Inputs and targets."""
    keys = jax.random.split(jax.random.key(seed), 2)
    return jax.random.normal(keys[0], (size, 6)), jax.random.normal(keys[1], (size, 4))


def loss(weights: Any, x: Any, y: Any) -> Any:
    """Mean squared error of the perceptron."""
    return jnp.mean((model(weights, x) - y) ** 2)
