"""The product with a matrix of shared values, read as packed indices."""
