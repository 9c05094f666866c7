"""Shared weights: codebooks of values and of vectors, hashing, and the methods that train them."""

from jaxcomp.share.codebooks import codebooks, kmeans
from jaxcomp.share.hashing import hashed, train_hashed
from jaxcomp.share.kernel_patterns import kernel_patterns, train_kernel_patterns
from jaxcomp.share.products import (
    VectorFormat,
    train_vectors,
    vector_codebook,
    vector_codebooks,
)
from jaxcomp.share.soft import attend, soft
from jaxcomp.share.training import straight_through, train

__all__ = [
    "VectorFormat",
    "attend",
    "codebooks",
    "hashed",
    "kernel_patterns",
    "kmeans",
    "soft",
    "straight_through",
    "train",
    "train_hashed",
    "train_kernel_patterns",
    "train_vectors",
    "vector_codebook",
    "vector_codebooks",
]
