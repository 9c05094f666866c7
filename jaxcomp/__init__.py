"""jaxcomp: smaller and faster neural networks, as pure functions on parameter pytrees."""
