"""Fewer bits a weight: formats, fake quantization and the methods made of them."""

from jaxcomp.quantize.affine import encode, fake_quant
from jaxcomp.quantize.formats import Format, PerChannel, PerGroup, PerTensor
from jaxcomp.quantize.training.straight_through import train

__all__ = ["Format", "PerChannel", "PerGroup", "PerTensor", "encode", "fake_quant", "train"]
