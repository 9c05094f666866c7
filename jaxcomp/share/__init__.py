"""Shared weights: codebooks, and the method that trains them."""
