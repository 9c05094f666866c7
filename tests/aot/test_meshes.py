"""The train steps of two examples for 16 TPU chips: what compression adds to what they exchange."""

import collections
import functools
import json
import pathlib

import pytest
from compilers import compiled

PROGRAMS = pathlib.Path(__file__).with_name("mesh_programs.py")
MODEL = 4  # devices along the axis that weights are split over
FLOAT = COUNT = 4  # bytes


@functools.cache
def told() -> dict[str, list[tuple[str, str, int]]]:
    text = compiled("tpu", [str(PROGRAMS), "v5e:4x4"])
    found = json.loads(text.splitlines()[-1])
    return {name: [tuple(each) for each in programs] for name, programs in found.items()}


def added(name: str) -> tuple[list[int], list[int]]:
    """Bytes of the collectives that a compressed step has and the plain one has not.

    First those of loops, then those of the step itself; none may have left.
    """
    plain, small = (collections.Counter(told()[f"{name} {kind}"]) for kind in ("plain", "small"))
    assert not plain - small
    new = sorted((small - plain).elements())
    return tuple([each[2] for each in new if each[1] == place] for place in ("loop", "ENTRY"))


@pytest.mark.parametrize("kind", ["plain", "small"])
@pytest.mark.parametrize("name", ["resnet", "transformer"])
@pytest.mark.parametrize("shape", ["4x4", "16x1"])
def test_nothing_is_gathered(name, shape, kind):
    found = told()[f"{name} {shape} {kind}"]
    assert {each[0] for each in found} == {"all-reduce"}


@pytest.mark.parametrize("name", ["resnet", "transformer"])
def test_compression_adds_nothing_where_only_the_data_is_split(name):
    assert added(f"{name} 16x1") == ([], [])


def test_a_global_threshold_adds_one_small_all_reduce_to_each_of_its_searches():
    loops, _ = added("resnet 4x4")
    # One search is for the threshold, the other for how many of those equal to it go. A pass counts
    # below three pivots and finds two extremes, for each of the two kernels that are split.
    assert loops == [5 * COUNT * 2 * MODEL] * 2


def test_a_scale_over_split_inputs_adds_one_float_an_output():
    # The kernel whose inputs are split; of several, the compiler joins the exchanges as it likes.
    _, scales = added("resnet 4x4")
    assert sum(scales) == FLOAT * 4 * 64
    loops, scales = added("transformer 4x4")
    # 2:4 masks and groups of 32 lie within shards: what is added is for attention's last kernel.
    assert sum(scales) == FLOAT * 256
    assert loops == []


@pytest.mark.parametrize("name", ["resnet", "transformer"])
def test_what_is_added_is_little_beside_what_is_exchanged_anyway(name):
    plain = sum(each[2] for each in told()[f"{name} 4x4 plain"])
    assert sum(map(sum, added(f"{name} 4x4"))) < plain / 1000
