"""Fewer bits a number: formats; methods while training and after it; integers at run time."""

from jaxcomp.quantize.activations.bounds import Bounds
from jaxcomp.quantize.activations.dynamic import activations
from jaxcomp.quantize.activations.observed import observe_ranges
from jaxcomp.quantize.activations.tracked import track_ranges
from jaxcomp.quantize.affine import encode, fake_quant
from jaxcomp.quantize.formats import (
    Format,
    GridFormat,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
)
from jaxcomp.quantize.forms import FloorForm, RoundForm, floor_form, round_form, scales_of_form
from jaxcomp.quantize.integer.applied import Integer, integer_apply
from jaxcomp.quantize.named import binary, fp8, mxfp4, mxfp8, nf4, nvfp4, power_of_two, ternary
from jaxcomp.quantize.post_training.adaround import adaround
from jaxcomp.quantize.post_training.allocation import damage
from jaxcomp.quantize.post_training.allocation.allocate import Allocation, Budget, allocate
from jaxcomp.quantize.post_training.awq import awq
from jaxcomp.quantize.post_training.bias_correction import Corrected, correct_bias
from jaxcomp.quantize.post_training.gptq import gptq, gptq_leaf
from jaxcomp.quantize.post_training.hqq import hqq
from jaxcomp.quantize.post_training.rescaling.equalize import equalize
from jaxcomp.quantize.post_training.rescaling.rescaler import Rescaled
from jaxcomp.quantize.post_training.rescaling.smooth import smooth
from jaxcomp.quantize.post_training.rotate import rotate
from jaxcomp.quantize.post_training.round_to_nearest import round_to_nearest
from jaxcomp.quantize.post_training.walk import Quantized
from jaxcomp.quantize.ranges import AbsMax, Entropy, HalfQuadratic, MeanSquare, Percentile
from jaxcomp.quantize.rate.post_training import rate_rounding
from jaxcomp.quantize.rate.training import estimated_bits, rate_distortion
from jaxcomp.quantize.scales import find_scales
from jaxcomp.quantize.steps import Scales
from jaxcomp.quantize.training.batch_norm import Folded, fold_batch_norm, freeze_batch_norm
from jaxcomp.quantize.training.dorefa import dorefa
from jaxcomp.quantize.training.learned_clipping import fake_quant_clipped, learned_clipping
from jaxcomp.quantize.training.learned_step import learned_step
from jaxcomp.quantize.training.step_gradient import fake_quant_learned, initial_step
from jaxcomp.quantize.training.straight_through import train

__all__ = [
    "AbsMax",
    "Allocation",
    "Bounds",
    "Budget",
    "Corrected",
    "Entropy",
    "FloorForm",
    "Folded",
    "Format",
    "GridFormat",
    "HalfQuadratic",
    "Integer",
    "MeanSquare",
    "PerBlock",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "Percentile",
    "Quantized",
    "Rescaled",
    "RoundForm",
    "Scales",
    "activations",
    "adaround",
    "allocate",
    "awq",
    "binary",
    "correct_bias",
    "damage",
    "dorefa",
    "encode",
    "equalize",
    "estimated_bits",
    "fake_quant",
    "fake_quant_clipped",
    "fake_quant_learned",
    "find_scales",
    "floor_form",
    "fold_batch_norm",
    "fp8",
    "freeze_batch_norm",
    "gptq",
    "gptq_leaf",
    "hqq",
    "initial_step",
    "integer_apply",
    "learned_clipping",
    "learned_step",
    "mxfp4",
    "mxfp8",
    "nf4",
    "nvfp4",
    "observe_ranges",
    "power_of_two",
    "rate_distortion",
    "rate_rounding",
    "rotate",
    "round_form",
    "round_to_nearest",
    "scales_of_form",
    "smooth",
    "ternary",
    "track_ranges",
    "train",
]
