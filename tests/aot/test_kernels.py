"""Kernels compiled for TPU v5e and v6e and an H100: what they became, and what memory they need."""

import functools
import json
import math
import pathlib
from typing import Any

import pytest
from compilers import H100, compiled

CHIPS = {"v5e": ("tpu", "v5e:2x2"), "v6e": ("tpu", "v6e:2x2"), "H100": ("cuda", H100)}
PROGRAMS = pathlib.Path(__file__).with_name("kernel_programs.py")
PACKED = ("int", "mxfp4", "nvfp4", "shared")
every_chip = pytest.mark.parametrize("chip", CHIPS)


@functools.cache
def told(chip: str) -> dict[str, Any]:
    platform, target = CHIPS[chip]
    text = compiled(platform, [str(PROGRAMS), platform, target])
    return json.loads(text.splitlines()[-1])


@every_chip
def test_each_program_holds_its_kernels(chip):
    for name, found in told(chip).items():
        assert found["kernels"] == found["expected"], name


@every_chip
def test_no_dense_weight_is_written_beside_its_own_gradient(chip):
    """No multiply comes before the masked product, and nothing is decoded into memory."""
    for name, found in told(chip).items():
        outputs = int(name.rpartition("x")[2])
        dense = [
            each for each in found["made"]
            if each[1] in ([4096, outputs], [outputs, 4096]) and each[0] in ("f32", "bf16", "f16")
        ]  # fmt: skip
        gradients = [shape for shape in found["results"] if shape == [4096, outputs]]
        assert len(dense) <= len(gradients), (name, dense)


@every_chip
def test_memory_beside_arguments_and_results_is_the_activations(chip):
    for name, found in told(chip).items():
        rows, outputs = (int(size) for size in name.split()[-1].split("x"))
        # The gradient of the product, once; rows may be padded to 64.
        activations = 2 * max(rows, 64) * (outputs + 4096)
        allowed = activations if "gradients" in name else 2 * math.prod((max(rows, 64), 4096))
        # Scales of 128 groups an output that are searched for: float32, three times.
        searched = 3 * 4 * 128 * outputs if name.startswith("rounded-groups") else 0
        # With few rows the inputs are cut into parts, whose sums are added up afterwards.
        parts = 4096 * outputs // 8 if name.startswith(PACKED) and rows == 16 else 0
        # Scales that are small floats themselves are widened.
        scales = 4 * {"mxfp4": 128, "nvfp4": 256}.get(name.split()[0], 0) * outputs
        # A warpgroup computes 64 rows at least, of which the few are taken; and lists of blocks.
        rest = 2 * 64 * outputs + (1 << 13) if "hopper" in name and rows == 16 else 0
        # Sums of rows that have a scale of their own stay in float32 until they are scaled.
        sums = 4 * rows * outputs if name.startswith("head") else 0
        assert found["temporary"] <= allowed + searched + parts + scales + rest + sums, name


# Of the bytes of arguments and results: groups' scales are laid out for the kernel before it.
MOVED = {"masked": 1.01, "int8": 1.01, "int8-groups": 1.15}


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
@pytest.mark.parametrize("operation", MOVED)
def test_nothing_is_moved_beside_what_a_kernel_reads_and_writes(operation, chip):
    """Nothing is multiplied, unpacked or copied before or after, as the compiler counts bytes."""
    programs = {name: each for name, each in told(chip).items() if name.split()[0] == operation}
    forward = {name: each for name, each in programs.items() if "gradients" not in name}
    assert len(forward) >= 2
    for name, found in forward.items():
        assert found["least"] <= found["bytes"] <= MOVED[operation] * found["least"], name


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_what_kernels_cost_is_told_to_the_compiler(chip):
    """Which plans transfers around them. For a GPU it tells nothing of what it compiled."""
    for name, found in told(chip).items():
        rows, outputs = (int(size) for size in name.split()[-1].split("x"))
        products = rows * 4096 * outputs
        if name.startswith("blocks"):
            products = rows * (4096 // 128 * outputs // 128 // 10) * 128**2
        flops = 2 * products * (3 if "gradients" in name else 1)
        # Scales, roundings and rows that fill a tile cost something, too.
        assert flops <= found["flops"] <= 1.3 * flops + 30 * 4096 * outputs, name
        assert found["bytes"] > 0, name


def test_products_of_many_rows_are_those_of_warpgroups():
    for name, found in told("H100").items():
        # What XLA makes of a gradient is its own; Mosaic's code is not among what XLA writes out.
        if " 2048x" in name and "gradients" not in name and "hopper" not in name:
            assert (found["warpgroups"], found["warps"]) == (1, 0), name
