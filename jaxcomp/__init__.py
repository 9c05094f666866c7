"""jaxcomp: smaller and faster neural networks, as pure functions on parameter pytrees."""

from jaxcomp.arrays import (
    CodebookArray,
    CompressedArray,
    QuantizedArray,
    SparseArray,
    decode,
    nbytes,
)
from jaxcomp.compression import Compression, State, chain, identity, partition
from jaxcomp.optimizer import compressed, pack, wrap_optimizer

__version__ = "0.1.0"

__all__ = [
    "CodebookArray",
    "CompressedArray",
    "Compression",
    "QuantizedArray",
    "SparseArray",
    "State",
    "chain",
    "compressed",
    "decode",
    "identity",
    "nbytes",
    "pack",
    "partition",
    "wrap_optimizer",
]
