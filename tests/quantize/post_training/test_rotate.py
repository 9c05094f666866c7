"""Quantization in a rotated basis: the definition, outliers, GPTQ there, stacks, layouts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from jaxcomp.arrays.rotated import RotatedArray, flips_of
from jaxcomp.model.matrices import MatrixForm, to_matrix
from jaxcomp.quantize.affine import encode
from jaxcomp.quantize.formats import Format, PerGroup
from jaxcomp.quantize.post_training.gptq import gptq, gptq_leaf
from jaxcomp.quantize.post_training.rotate import rotate, rotate_leaf, rotated_axes
from jaxcomp.quantize.post_training.round_to_nearest import round_to_nearest
from jaxcomp.quantize.post_training.tasks import Task

RNG = np.random.default_rng(0)
INPUTS = RNG.normal(size=(64, 32)).astype(np.float32)
BATCHES = [jnp.asarray(INPUTS[:32]), jnp.asarray(INPUTS[32:])]


def outliers(*shape, seed=0):
    """Weights of which one in forty is twelve times larger."""
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=shape)
    weight[rng.random(shape) < 1 / 40] *= 12
    return jnp.asarray(weight.astype(np.float32))


def product(params, x):
    return x @ params["w"]


def dense_basis(size):
    return scipy.linalg.hadamard(size) / np.sqrt(size)


def output_error(weight, leaf):
    """Relative, in float64."""
    x, exact = INPUTS.astype(np.float64), np.asarray(weight, np.float64)
    change = x @ (np.asarray(leaf.decode(), np.float64) - exact)
    return (change**2).sum() / ((x @ exact) ** 2).sum()


def test_it_is_rounding_in_the_basis_of_the_dense_matrix():
    weight = outliers(32, 6)
    found = rotate(product, {"w": weight}, BATCHES, Format(4), key=jax.random.key(3))
    leaf = found.params["w"]
    assert isinstance(leaf, RotatedArray)
    flips = np.asarray(flips_of(leaf.signs, leaf.shape, leaf.axes))[:, 0]
    assert 4 < flips.sum() < 28
    basis = dense_basis(32) * np.where(flips, -1.0, 1.0)
    turned = basis @ np.asarray(weight, np.float64)
    scale = np.abs(turned).max(0) / 7
    expected = basis.T @ (np.clip(np.round(turned / scale), -7, 7) * scale)
    # A weight in the middle of two levels may go either way: not so among these.
    np.testing.assert_allclose(leaf.decode(), expected, atol=1e-4)
    assert found.leaves[0].output_error == pytest.approx(output_error(weight, leaf), rel=1e-4)


def test_outliers_lose_much_less_rotated_and_plain_weights_stay_plain():
    weight = outliers(32, 16)
    plain = round_to_nearest(product, {"w": weight}, BATCHES, Format(4)).leaves[0]
    found = rotate(product, {"w": weight}, BATCHES, Format(4))
    assert "rotated" in found.leaves[0].form
    assert found.leaves[0].output_error < 0.5 * plain.output_error
    # Signs alone lose nothing in 4 bits, but do once they are mixed.
    even = jnp.asarray(np.sign(RNG.normal(size=(32, 16))), jnp.float32)
    kept = rotate(product, {"w": even}, BATCHES, Format(4))
    assert type(kept.params["w"]) is type(encode(even, Format(4)))
    assert kept.leaves[0].output_error < 1e-12


def test_gptq_in_the_rotated_basis_loses_less_than_in_the_plain_one():
    key = jax.random.key(1)
    scales = np.exp(RNG.normal(size=32)).astype(np.float32)
    mixing = RNG.normal(size=(32, 32)).astype(np.float32) / 6 + np.eye(32, dtype=np.float32)
    batches = [x * scales @ mixing for x in BATCHES]
    params = {"w": outliers(32, 16, seed=1)}
    format = Format(3, granularity=PerGroup(16))
    nearest = rotate(product, params, batches, format, key=key).leaves[0]
    solved = rotate(product, params, batches, format, key=key, solve=gptq_leaf).leaves[0]
    plain = gptq(product, params, batches, format).leaves[0]
    assert "rotated" in solved.form
    assert solved.output_error < 0.7 * nearest.output_error
    assert solved.output_error < plain.output_error


def turned(form, moment, key):
    """A leaf, and what a solver is handed of it: as it is, and rotated."""
    seen = []

    def solve(task, leaf, moment):
        seen.append((leaf, moment))
        return encode(leaf, task.format)

    leaf = outliers(*form.shape, seed=2)
    rotate_leaf(Task("w", form, Format(2)), leaf, moment, key, solve)
    return leaf, seen


@pytest.mark.parametrize(
    "form",
    [
        MatrixForm((8, 6), (0,), (1,)),
        MatrixForm((6, 8), (1,), (0,)),
        MatrixForm((3, 8, 6), (0, 1), (2,), kernel_axes=(0,)),
        MatrixForm((4, 8, 6), (1, 0), (2,)),
        MatrixForm((2, 8, 6), (1,), (2,), outer_axes=(0,)),
    ],
    ids=["dense", "transposed", "conv", "joined the other way", "stack"],
)
@pytest.mark.parametrize("signed", [True, False])
def test_products_with_rotated_inputs_are_the_same(form, signed):
    features = form.features
    x = np.random.default_rng(4).normal(size=(50, features))
    moment = jnp.asarray(x.T @ x / 50, jnp.float32)
    moment = jnp.broadcast_to(moment, (*form.groups, features, features))
    key = jax.random.key(5) if signed else None
    leaf, seen = turned(form, moment, key)
    (_, plain), (new, rotated) = seen
    assert plain is moment

    def energy(leaf, moment):

        matrix = np.asarray(to_matrix(form, leaf), np.float64)
        return np.swapaxes(matrix, -1, -2) @ np.asarray(moment, np.float64) @ matrix

    assert np.abs(np.asarray(new) - np.asarray(leaf)).max() > 0.5
    # Outputs have the same second moments in both bases.
    np.testing.assert_allclose(energy(new, rotated), energy(leaf, moment), rtol=1e-3, atol=1e-3)


def test_which_axes_are_mixed():
    assert rotated_axes(MatrixForm((3, 3, 8, 5), (0, 1, 2), (3,), kernel_axes=(0, 1))) == (-2,)
    assert rotated_axes(MatrixForm((4, 8, 6), (0, 1), (2,))) == (-3, -2)
    assert rotated_axes(MatrixForm((7, 6), (0,), (1,))) == ()


def test_a_stack_of_layers_scans_over_its_leaves():
    def model(params, x):
        def layer(x, w):
            return jnp.tanh(x @ w), None

        return jax.lax.scan(layer, x, params["layers"])[0]

    params = {"layers": outliers(3, 32, 32) / 8}
    found = rotate(model, params, BATCHES, Format(4), key=jax.random.key(0))
    leaf = found.params["layers"]
    assert isinstance(leaf, RotatedArray)
    assert leaf.signs.shape == (3, 4)
    exact = model({"layers": leaf.decode()}, INPUTS)

    @jax.jit
    def run(stack, x):
        return jax.lax.scan(lambda x, leaf: (jnp.tanh(x @ leaf.decode()), None), x, stack)[0]

    np.testing.assert_allclose(run(leaf, INPUTS), exact, atol=1e-6)


def test_without_a_product_and_without_data():
    params = {"table": outliers(9, 8), "w": outliers(8, 8)}

    def model(params, ids):
        return params["table"][ids] @ params["w"]

    found = rotate(model, params, [jnp.arange(9)], Format(4))
    assert "rotated" not in found.leaves[0].form
    assert found.leaves[0].path == "table"
    task = Task("w", MatrixForm((8, 8), (0,), (1,)), Format(4))
    weight = jnp.zeros((8, 8)).at[0].set(20.0).at[1:].set(1.0)
    leaf = rotate_leaf(task, weight, None)
    errors = [
        float(jnp.sum((each.decode() - weight) ** 2)) for each in (leaf, encode(weight, Format(4)))
    ]
    assert errors[0] <= errors[1]


def test_bfloat16_is_rounded_once():
    weight = outliers(32, 8).astype(jnp.bfloat16)
    leaf = rotate(product, {"w": weight}, BATCHES, Format(4)).params["w"]
    assert isinstance(leaf, RotatedArray)
    assert leaf.dtype == jnp.bfloat16
    assert leaf.inner.dtype == jnp.float32


def test_what_is_no_key_or_solver_is_refused():
    params = {"w": outliers(32, 4)}
    with pytest.raises(TypeError, match="key must be one PRNG key"):
        rotate(product, params, BATCHES, Format(4), key=0)
    with pytest.raises(TypeError, match="solve"):
        rotate(product, params, BATCHES, Format(4), solve=None)  # type: ignore[arg-type]
