"""Products with a matrix of packed codes and their scales."""
