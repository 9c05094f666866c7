"""Distillation: losses that let a student learn from a teacher, as functions on arrays."""

from jaxcomp.distill.features import FeatureList, Features, features, frozen, list_features
from jaxcomp.distill.intermediate.hint import hint_loss
from jaxcomp.distill.intermediate.projection import init_projection, project
from jaxcomp.distill.logits.hinton import hinton_loss, kl_divergence

__all__ = [
    "FeatureList",
    "Features",
    "features",
    "frozen",
    "hint_loss",
    "hinton_loss",
    "init_projection",
    "kl_divergence",
    "list_features",
    "project",
]
