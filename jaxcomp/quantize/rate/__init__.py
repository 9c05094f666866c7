"""Trading error for the bits of the file: while training, and by rounding after it."""
