"""Remove weights and whole channels: scores, schedules, masks, and smaller models."""

from jaxcomp.prune import channel_scores, scores
from jaxcomp.prune.budget import Budget
from jaxcomp.prune.channel_groups import ScoredGroup, needs
from jaxcomp.prune.channels import channels
from jaxcomp.prune.gradual import gradual, masks
from jaxcomp.prune.iterative import Iterated, channels_iteratively
from jaxcomp.prune.schedules import cubic
from jaxcomp.prune.shrink import shrink
from jaxcomp.prune.smaller_model import SmallerModel

__all__ = [
    "Budget",
    "Iterated",
    "ScoredGroup",
    "SmallerModel",
    "channel_scores",
    "channels",
    "channels_iteratively",
    "cubic",
    "gradual",
    "masks",
    "needs",
    "scores",
    "shrink",
]
