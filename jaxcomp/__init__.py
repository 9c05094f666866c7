"""jaxcomp: smaller and faster neural networks, as pure functions on parameter pytrees."""

from jaxcomp import checkpoint, distill, model, prune, quantize, share
from jaxcomp.arrays import (
    BlockSparseArray,
    CodebookArray,
    CompressedArray,
    GridArray,
    LowRankArray,
    LowRankSumArray,
    NMSparseArray,
    QuantizedArray,
    RescaledArray,
    RotatedArray,
    SparseArray,
    decode,
    nbytes,
)
from jaxcomp.checkpoint import CheckpointError, inspect, load, save
from jaxcomp.compression import Compression, State, chain, identity, partition
from jaxcomp.optimizer import compressed, pack, wrap_optimizer

__version__ = "0.1.0"

__all__ = [
    "BlockSparseArray",
    "CheckpointError",
    "CodebookArray",
    "CompressedArray",
    "Compression",
    "GridArray",
    "LowRankArray",
    "LowRankSumArray",
    "NMSparseArray",
    "QuantizedArray",
    "RescaledArray",
    "RotatedArray",
    "SparseArray",
    "State",
    "chain",
    "checkpoint",
    "compressed",
    "decode",
    "distill",
    "identity",
    "inspect",
    "load",
    "model",
    "nbytes",
    "pack",
    "partition",
    "prune",
    "quantize",
    "save",
    "share",
    "wrap_optimizer",
]
