"""Remove weights and whole channels: scores, structures, schedules, masks, smaller models."""

from jaxcomp.prune import allocation, penalties, proximal, scores
from jaxcomp.prune.allocation import Allocation
from jaxcomp.prune.channels import scores as channel_scores
from jaxcomp.prune.channels.budget import Budget
from jaxcomp.prune.channels.groups import ScoredGroup, needs
from jaxcomp.prune.channels.iterative import Iterated, channels_iteratively
from jaxcomp.prune.channels.removal import channels
from jaxcomp.prune.channels.shrink import shrink
from jaxcomp.prune.channels.smaller_model import SmallerModel
from jaxcomp.prune.masks import apply_masks, masks
from jaxcomp.prune.post_training import evidence, obs
from jaxcomp.prune.post_training.sensitivity import Sensitivity, sensitivity
from jaxcomp.prune.post_training.sensitivity_allocation import allocation_from_sensitivity
from jaxcomp.prune.post_training.sparsegpt import Repaired, sparsegpt
from jaxcomp.prune.post_training.synflow import synaptic_flow
from jaxcomp.prune.post_training.to_accuracy import ToAccuracy, to_accuracy
from jaxcomp.prune.post_training.wanda import wanda
from jaxcomp.prune.schedules import constant, cubic, one_shot, staircase
from jaxcomp.prune.scores import RunningScore
from jaxcomp.prune.structures import NM, Block, Channel, Element, Kernel
from jaxcomp.prune.training.alternating import alternating
from jaxcomp.prune.training.dynamic import rigl, sparse_evolution
from jaxcomp.prune.training.gradual import gradual
from jaxcomp.prune.training.hard_concrete import expected_density, hard_concrete, without_noise
from jaxcomp.prune.training.lottery import lottery_ticket
from jaxcomp.prune.training.movement import movement, soft_movement
from jaxcomp.prune.training.soft_threshold import soft_threshold
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
    "Repaired",
    "RunningScore",
    "ScoredGroup",
    "Sensitivity",
    "SmallerModel",
    "ToAccuracy",
    "allocation",
    "allocation_from_sensitivity",
    "alternating",
    "apply_masks",
    "channel_scores",
    "channels",
    "channels_iteratively",
    "constant",
    "cubic",
    "evidence",
    "expected_density",
    "gradual",
    "hard_concrete",
    "keep_zeros",
    "lottery_ticket",
    "masks",
    "movement",
    "needs",
    "obs",
    "one_shot",
    "penalties",
    "proximal",
    "rigl",
    "scores",
    "sensitivity",
    "shrink",
    "soft_movement",
    "soft_threshold",
    "sparse_evolution",
    "sparsegpt",
    "staircase",
    "straight_through",
    "synaptic_flow",
    "to_accuracy",
    "wanda",
    "without_noise",
]
