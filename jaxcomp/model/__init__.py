"""See a model through its jaxpr."""
