"""What teacher_images.py, teacher_bits.py and teacher_text.py share: kept runs, a last line."""

import hashlib
import importlib.metadata
import os
import pathlib
import platform
from collections.abc import Callable
from typing import Any

import jax
from sparsity import mean_and_spread
from threshold import cpu_model

import jaxcomp


def file_of(directory: pathlib.Path, name: str, settings: Any, seed: int) -> pathlib.Path:
    """Where a run is kept: settings that differ give different files."""
    digest = hashlib.sha256(repr(settings).encode()).hexdigest()[:8]
    return directory / f"{name}-{digest}-{seed}.jxc"


def kept(file: pathlib.Path, train: Callable[[], Any]) -> Any:
    """The weights in a file; trained and written first where there is none."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        # Renamed when complete: what a killed run leaves behind is not taken for a finished one.
        unfinished = file.with_suffix(".part")
        jaxcomp.save(unfinished, train())
        unfinished.rename(file)
    return jaxcomp.load(file)


def over_seeds(values: list[float], digits: int) -> str:
    """Mean and sample standard deviation over the seeds; of one seed the value alone."""
    return mean_and_spread(values, digits) if len(values) > 1 else f"{values[0]:.{digits}f}"


def conditions(seeds: list[int]) -> str:
    """Seeds, hardware and versions, for the last line under a table."""
    versions = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in ("jax", "flax", "optax"))
    return (
        f"Seeds {seeds}, mean ± standard deviation. {cpu_model()}, {os.cpu_count()} cores, backend "
        f"{jax.default_backend()}; Python {platform.python_version()}, {versions}."
    )
