"""Search for architectures and for the choices around them."""
