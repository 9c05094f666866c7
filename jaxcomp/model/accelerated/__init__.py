"""A model whose products are computed by kernels that read compressed weights as they are."""

from jaxcomp.model.accelerated.run import Accelerated, accelerate

__all__ = ["Accelerated", "accelerate"]
