"""Remove weights: scores, schedules, masks and the methods made of them."""

from jaxcomp.prune import scores
from jaxcomp.prune.gradual import gradual, masks
from jaxcomp.prune.schedules import cubic

__all__ = ["cubic", "gradual", "masks", "scores"]
