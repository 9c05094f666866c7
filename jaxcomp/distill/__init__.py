"""Distillation: losses that let a student learn from a teacher, as functions on arrays."""

from jaxcomp.distill.logits.hinton import hinton_loss, kl_divergence

__all__ = ["hinton_loss", "kl_divergence"]
