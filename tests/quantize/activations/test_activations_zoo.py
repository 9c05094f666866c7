"""Every network of the zoo with rounded activations: near the float model, nothing forgotten."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.model.program import read, walk
from jaxcomp.quantize import Format, train
from jaxcomp.quantize.activations.dynamic import activations
from jaxcomp.quantize.activations.points import PRODUCTS, find_points
from tests.model.zoo import ZOO

# What is not run here is of a kind with what is.
RUN = [
    "mlp remat",
    "nnx cnn",
    "equinox mlp",
    "haiku mlp",
    "hand-written",
    "branches",
    "loop",
    "resnet",
    "vit",
    "scanned layers",
    "gru",
]


@functools.cache
def case_of(name):
    return ZOO[name]()


def error_of(name):
    """The largest error of an output, in parts of its largest value."""
    case = case_of(name)
    run = activations(case.apply_fn, case.params, *case.inputs)
    rounded = jax.jit(run)(case.params, *case.inputs)
    exact = jax.jit(case.apply_fn)(case.params, *case.inputs)
    errors = jax.tree.map(lambda a, b: jnp.abs(a - b).max() / jnp.abs(b).max(), rounded, exact)
    return float(max(jax.tree.leaves(errors)))


@pytest.mark.parametrize("name", ZOO)
def test_every_product_is_a_point_or_left_out_with_a_reason(name):
    case = case_of(name)
    run = activations(case.apply_fn, case.params, *case.inputs)
    # Counted apart: products in the program, and places that the function tells of.
    program = read(case.apply_fn, case.params, *case.inputs)
    products = [op for op in walk(program.block) if op.name in PRODUCTS]
    found = find_points(program)
    told = {point.op for point in found.products if point.name in {**run.points, **run.left_out}}
    assert len(told) + len(found.without) == len(products)
    assert len(run.points) >= len(told) - len(run.left_out)
    assert all(run.left_out.values())
    # Each weight that is multiplied by data has its name.
    assert sum("/kernel" in path for path in run.points) <= len(products)


@pytest.mark.parametrize("name", RUN)
def test_eight_bits_change_the_outputs_a_little(name):
    assert 0 < error_of(name) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ZOO if name not in RUN])
def test_eight_bits_change_the_outputs_of_all_others_a_little(name):
    assert 0 < error_of(name) < 0.05


@pytest.mark.parametrize("name", ["mlp bfloat16", "scanned remat", "gru"])
def test_what_training_simulates_is_what_the_packed_network_computes(name):
    case = case_of(name)
    method = train(Format(8))
    state = method.init(case.params)
    run = activations(case.apply_fn, case.params, *case.inputs)
    simulated = jax.jit(lambda p: run(method.apply(p, state), *case.inputs))(case.params)
    packed = jax.jit(run)(method.pack(case.params, state), *case.inputs)
    jax.tree.map(np.testing.assert_array_equal, simulated, packed)


@pytest.mark.parametrize(
    "name", ["gru", *(pytest.param(name, marks=pytest.mark.slow) for name in ("resnet", "vit"))]
)
def test_gradients_stay_near_those_of_the_float_model(name):
    case = case_of(name)
    run = activations(case.apply_fn, case.params, *case.inputs)

    def gradient(function):
        def loss(params):
            outputs = jax.tree.leaves(function(params, *case.inputs))
            return sum((out**2).mean() for out in outputs)

        return jax.jit(jax.grad(loss, allow_int=True))(case.params)

    got, wanted = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(gradient(function))])
        for function in (run, case.apply_fn)
    )
    cosine = got @ wanted / np.linalg.norm(got) / np.linalg.norm(wanted)
    assert cosine > 0.98
