"""Shared weights: codebooks, and the method that trains them."""

from jaxcomp.share.codebooks import kmeans, train

__all__ = ["kmeans", "train"]
