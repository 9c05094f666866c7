"""Products with a matrix or a kernel of which a mask keeps a part."""
