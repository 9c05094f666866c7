"""What a weight can become: one representation a file, all of them pytree nodes that decode."""

from jaxcomp.arrays.base import CompressedArray, decode, is_compressed, nbytes
from jaxcomp.arrays.block_sparse import BlockSparseArray
from jaxcomp.arrays.codebook import CodebookArray
from jaxcomp.arrays.grid import GridArray
from jaxcomp.arrays.hashed import HashedArray
from jaxcomp.arrays.low_rank import LowRankArray
from jaxcomp.arrays.low_rank_sum import LowRankSumArray
from jaxcomp.arrays.nm_sparse import NMSparseArray
from jaxcomp.arrays.parts import Parts, Symbols
from jaxcomp.arrays.quantized import QuantizedArray
from jaxcomp.arrays.rescaled import RescaledArray
from jaxcomp.arrays.rotated import RotatedArray
from jaxcomp.arrays.sparse import SparseArray
from jaxcomp.arrays.vector_codebook import VectorCodebookArray

__all__ = [
    "BlockSparseArray",
    "CodebookArray",
    "CompressedArray",
    "GridArray",
    "HashedArray",
    "LowRankArray",
    "LowRankSumArray",
    "NMSparseArray",
    "Parts",
    "QuantizedArray",
    "RescaledArray",
    "RotatedArray",
    "SparseArray",
    "Symbols",
    "VectorCodebookArray",
    "decode",
    "is_compressed",
    "nbytes",
]
