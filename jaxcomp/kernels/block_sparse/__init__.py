"""The product with a block-sparse matrix, over the blocks that are kept."""
