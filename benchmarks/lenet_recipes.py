"""What lenet.py trains, on jaxcomp's public functions: Deep Compression, and the records."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import lenet_models as models
import numpy as np
from lenet_models import Network, Params
from lenet_runs import Stage

from jaxcomp import Compression, chain, identity, partition, prune, quantize, share
from jaxcomp.demo.data import Dataset


class Han(NamedTuple):
    """Deep Compression's settings for a network.

    Attributes:
        sparsities: fraction of each layer's weights that go.
        clusters: shared values of each layer.
        epochs: while weights go, and while the values that are left are shared.
        dropout: of pixels and hidden units, in both.
    """

    sparsities: dict[str, float]
    clusters: dict[str, int]
    epochs: tuple[int, int]
    dropout: tuple[float, float]


DENSE = {
    "lenet-300-100": Stage("dense", lambda steps: identity(), 20, 1e-3, (0.1, 0.2)),
    "lenet-5": Stage("dense", lambda steps: identity(), 8, 1e-3, (0.0, 0.4)),
}
HAN = {
    "lenet-300-100": Han(
        {"dense1": 0.92, "dense2": 0.88, "dense3": 0.5},
        {"dense1": 16, "dense2": 16, "dense3": 16},
        (40, 10),
        (0.15, 0.0),
    ),
    "lenet-5": Han(
        {"conv1": 0.34, "conv2": 0.88, "dense1": 0.94, "dense2": 0.81},
        {"conv1": 32, "conv2": 32, "dense1": 16, "dense2": 16},
        (5, 1),
        (0.0, 0.2),
    ),
}


def deep_compression(network: Network, settings: Han | None = None) -> list[Stage]:
    """Train, prune with retraining, share and retrain (Han et al., 2016)."""
    settings = settings or HAN[network.name]
    sizes = {layer: math.prod(shape) for layer, shape in network.kernels.items()}
    removed = sum(settings.sparsities[layer] * size for layer, size in sizes.items())
    total = removed / sum(sizes.values())

    def pruning(steps: int) -> Compression:
        schedule = prune.cubic(total, begin=0, end=steps // 2)
        fixed = {f"{layer}/kernel": s for layer, s in settings.sparsities.items()}
        return prune.gradual(prune.scores.magnitude, schedule, prune.allocation.fixed(fixed))

    def sharing(steps: int) -> Compression:
        clusters: Any = {
            f"{layer}/kernel": share.train(k) for layer, k in settings.clusters.items()
        }
        return chain(prune.keep_zeros(), partition(clusters))

    return [
        DENSE[network.name],
        Stage(f"pruned {settings.sparsities}", pruning, settings.epochs[0], 1e-3, settings.dropout),
        Stage(f"shared {settings.clusters}", sharing, settings.epochs[1], 3e-4, settings.dropout),
    ]


class Record(NamedTuple):
    """How a dense network is trained for the file.

    Attributes:
        penalty: what a bit of the file costs, in units of the loss.
        epochs: passes over the training images.
        rate: of Adam, at its peak.
        dropout: of pixels and hidden units.
        widths: channels or units of each hidden layer that are left of the dense network, those of
            the largest Taylor scores; None: all.
        step: all step sizes at the beginning.
        warmup: fraction of the steps in which the penalty rises to what it is.
        bits: of a code, at most.
    """

    penalty: float
    epochs: int
    rate: float = 3e-3
    dropout: tuple[float, float] = (0.0, 0.0)
    widths: tuple[int, ...] | None = None
    step: float = 0.05
    warmup: float = 0.3
    bits: int = 5


def record(network: Network, settings: Record) -> list[Stage]:
    """Train, remove channels if that is asked for, and train loss + penalty * bits."""

    def narrowed(params: Params, data: Dataset) -> Params:
        return models.narrowed(params, settings.widths or (), data) if settings.widths else params

    def coding(steps: int) -> Compression:
        def penalty(step):
            return settings.penalty * jnp.minimum(1.0, step / np.float32(settings.warmup * steps))

        format = quantize.Format(settings.bits, granularity=quantize.PerTensor())
        method = quantize.rate_distortion(penalty, format, step=settings.step)
        return partition({"*": method}, where=lambda path, leaf: True)

    stage = Stage(f"rate {settings}", coding, settings.epochs, settings.rate, settings.dropout)
    return [DENSE[network.name], stage._replace(prepare=narrowed)]


# Codes of few bits saturate in conv1: a clipped weight has no gradient, and cannot follow its step.
_NARROW = Record(2.5e-6, 20, 2e-3, (0.1, 0.0), widths=(8, 16, 64), bits=8)
# What is measured with every seed, and with the first one only.
RECORDS: dict[str, list[Record]] = {
    "lenet-300-100": [Record(1e-6, 30, 1e-3, (0.1, 0.0))],
    "lenet-5": [_NARROW, _NARROW._replace(penalty=4e-6, epochs=40)],
}
CURVE: dict[str, list[Record]] = {
    "lenet-300-100": [Record(3e-6, 30, 1e-3, (0.1, 0.0))],
    "lenet-5": [_NARROW._replace(penalty=6e-6, epochs=60)],
}
_CLUSTERS = HAN["lenet-300-100"].clusters
# What these were chosen from, on held-out images with another seed, in the order of trying.
SEARCH_SEED = 100
SEARCH: dict[str, list[Han | Record]] = {
    "lenet-300-100": [
        Record(6e-7, 30),
        Record(1e-6, 30, 1e-3),
        Record(1e-6, 30, 1e-3, (0.1, 0.0)),
        Record(3e-6, 30, 1e-3, (0.1, 0.0)),
        Record(6e-6, 40, 1e-3, (0.1, 0.0)),
        Han({"dense1": 0.93, "dense2": 0.9, "dense3": 0.5}, _CLUSTERS, (20, 5), (0.05, 0.1)),
        Han({"dense1": 0.92, "dense2": 0.88, "dense3": 0.5}, _CLUSTERS, (20, 5), (0.1, 0.1)),
        HAN["lenet-300-100"]._replace(epochs=(20, 5), dropout=(0.1, 0.0)),
        HAN["lenet-300-100"]._replace(dropout=(0.1, 0.0)),
        HAN["lenet-300-100"],
    ],
    "lenet-5": [
        _NARROW,
        _NARROW._replace(penalty=4e-6, epochs=40),
        _NARROW._replace(dropout=(0.0, 0.0)),
        _NARROW._replace(penalty=6e-6, epochs=60),
    ],
}


def table_of(network: Network) -> dict[str, list[Stage]]:
    """What is measured with every seed, by name."""
    han = deep_compression(network)
    return {"dense": han[:1], "Deep Compression": han} | _named(network, RECORDS[network.name])


def curve_of(network: Network) -> dict[str, list[Stage]]:
    """What is measured with one seed."""
    return _named(network, CURVE[network.name])


def search_of(network: Network) -> dict[str, list[Stage]]:
    """What the settings were chosen from."""
    found = {"dense": [DENSE[network.name]]}
    for how in SEARCH[network.name]:
        make = deep_compression if isinstance(how, Han) else record
        found[describe(how)] = make(network, how)  # type: ignore[arg-type]
    return found


def _named(network: Network, records: list[Record]) -> dict[str, list[Stage]]:
    return {f"penalty {how.penalty:g}": record(network, how) for how in records}


def describe(how: Han | Record) -> str:
    """The settings in words; of a record, what differs from the defaults."""
    if isinstance(how, Han):
        kept = "/".join(f"{100 - 100 * s:.0f}" for s in how.sparsities.values())
        return f"Deep Compression, {kept}% kept, epochs {how.epochs}, dropout {how.dropout}"
    defaults = Record(0.0, 0)
    told = (f"{n} {v}" for n, v in how._asdict().items() if v != getattr(defaults, n))
    return ", ".join(told)
