"""Products and convolutions with weights, and activations, that are rounded on the way."""
