"""Remove weights and whole channels: scores, structures, schedules, masks, smaller models."""

from jaxcomp.prune import allocation, scores
from jaxcomp.prune.allocation import Allocation
from jaxcomp.prune.channels import scores as channel_scores
from jaxcomp.prune.channels.budget import Budget
from jaxcomp.prune.channels.groups import ScoredGroup, needs
from jaxcomp.prune.channels.iterative import Iterated, channels_iteratively
from jaxcomp.prune.channels.removal import channels
from jaxcomp.prune.channels.shrink import shrink
from jaxcomp.prune.channels.smaller_model import SmallerModel
from jaxcomp.prune.masks import apply_masks, masks
from jaxcomp.prune.schedules import constant, cubic, one_shot, staircase
from jaxcomp.prune.scores import RunningScore
from jaxcomp.prune.structures import NM, Block, Channel, Element, Kernel
from jaxcomp.prune.training.alternating import alternating
from jaxcomp.prune.training.dynamic import rigl, sparse_evolution
from jaxcomp.prune.training.gradual import gradual
from jaxcomp.prune.training.lottery import lottery_ticket
from jaxcomp.prune.training.straight_through import straight_through
from jaxcomp.prune.training.zeros import keep_zeros

__all__ = [
    "NM",
    "Allocation",
    "Block",
    "Budget",
    "Channel",
    "Element",
    "Iterated",
    "Kernel",
    "RunningScore",
    "ScoredGroup",
    "SmallerModel",
    "allocation",
    "alternating",
    "apply_masks",
    "channel_scores",
    "channels",
    "channels_iteratively",
    "constant",
    "cubic",
    "gradual",
    "keep_zeros",
    "lottery_ticket",
    "masks",
    "needs",
    "one_shot",
    "rigl",
    "scores",
    "shrink",
    "sparse_evolution",
    "staircase",
    "straight_through",
]
