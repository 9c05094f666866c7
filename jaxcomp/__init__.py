"""jaxcomp: smaller and faster neural networks, as pure functions on parameter pytrees."""

from jaxcomp import checkpoint, distill, factorize, model, prune, quantize, search, share
from jaxcomp.arrays import (
    BlockSparseArray,
    CodebookArray,
    CompressedArray,
    GridArray,
    HashedArray,
    LowRankArray,
    LowRankSumArray,
    NMSparseArray,
    QuantizedArray,
    RescaledArray,
    RotatedArray,
    SparseArray,
    VectorCodebookArray,
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
    "HashedArray",
    "LowRankArray",
    "LowRankSumArray",
    "NMSparseArray",
    "QuantizedArray",
    "RescaledArray",
    "RotatedArray",
    "SparseArray",
    "State",
    "VectorCodebookArray",
    "chain",
    "checkpoint",
    "compressed",
    "decode",
    "distill",
    "factorize",
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
    "search",
    "share",
    "wrap_optimizer",
]
