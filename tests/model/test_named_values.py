"""Named intermediate values over the zoo: every weight has one, and taking them changes nothing."""

import functools

import jax
import numpy as np
import pytest

from jaxcomp import tree as tree_lib
from jaxcomp.model.named_values import capture, find_named
from jaxcomp.model.program import read
from tests.model.zoo import ZOO

# What is not run here is of a kind with what is.
RUN = ["mlp remat", "nnx cnn", "branches", "loop", "resnet", "bert split", "scanned layers", "gru"]


@functools.cache
def case_of(name):
    return ZOO[name]()


@functools.cache
def program_of(name):
    case = case_of(name)
    return read(case.apply_fn, case.params, *case.inputs)


@pytest.mark.parametrize("name", ZOO)
def test_every_leaf_meets_data_somewhere_under_its_own_name(name):
    program, found = program_of(name), find_named(program_of(name))
    names = [named.name for named in found]
    assert len(names) == len(set(names))
    by_path = {n.name for n in found if n.source == "parameter" and "#" not in n.name}
    unused = program.leaves.keys() - by_path
    # A leaf that no operation reads, or only together with other leaves, cannot be there.
    read_ones = {v for op in program.block.ops for v in op.inputs}
    assert all(program.leaves[path] not in read_ones for path in unused)
    assert all(named.obstacle is None or named.obstacle.strip() for named in found)


@pytest.mark.parametrize("name", [name for name in RUN if name in ZOO])
def test_outputs_stay_and_every_value_has_its_shape(name):
    case, program = case_of(name), program_of(name)
    wanted = [named for named in find_named(program) if named.obstacle is None]

    @jax.jit
    def run(params, inputs):
        outputs, values = capture(program, jax.tree.leaves((params, inputs)), wanted)
        return jax.tree.unflatten(program.out_tree, outputs), values

    outputs, values = run(case.params, case.inputs)
    expected = jax.jit(case.apply_fn)(case.params, *case.inputs)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), outputs, expected
    )
    assert {n: v.shape for n, v in values.items()} == {n.name: n.shape for n in wanted}
    assert all(np.any(value) for value in values.values())
    assert len(tree_lib.matching("*", values)) == len(wanted) > 0
