"""Shared weights: codebooks of values and of vectors, hashing, and the methods that train them."""

from jaxcomp.share.codebooks import kmeans, train
from jaxcomp.share.hashing import hashed, train_hashed
from jaxcomp.share.kernel_patterns import kernel_patterns, train_kernel_patterns
from jaxcomp.share.products import (
    VectorFormat,
    train_vectors,
    vector_codebook,
    vector_codebooks,
)

__all__ = [
    "VectorFormat",
    "hashed",
    "kernel_patterns",
    "kmeans",
    "train",
    "train_hashed",
    "train_kernel_patterns",
    "train_vectors",
    "vector_codebook",
    "vector_codebooks",
]
