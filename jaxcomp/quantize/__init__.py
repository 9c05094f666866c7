"""Fewer bits a weight: formats, fake quantization and the methods made of them."""
