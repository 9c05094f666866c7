"""Remove weights and whole channels: scores, schedules, masks, and smaller models."""

from jaxcomp.prune import scores
from jaxcomp.prune.channels import scores as channel_scores
from jaxcomp.prune.channels.budget import Budget
from jaxcomp.prune.channels.groups import ScoredGroup, needs
from jaxcomp.prune.channels.iterative import Iterated, channels_iteratively
from jaxcomp.prune.channels.removal import channels
from jaxcomp.prune.channels.shrink import shrink
from jaxcomp.prune.channels.smaller_model import SmallerModel
from jaxcomp.prune.gradual import gradual, masks
from jaxcomp.prune.schedules import cubic

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
