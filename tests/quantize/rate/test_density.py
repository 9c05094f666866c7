"""The learned density: probabilities that add up to one, and bits that a coder needs."""

import jax
import jax.numpy as jnp
import numpy as np

import jaxcomp
from jaxcomp.quantize import Format, PerTensor, encode
from jaxcomp.quantize.rate.density import CodeDensity, code_bits, fitted_density, initial_density

RNG = np.random.default_rng(0)
HIGH = 3


def some_density(shape):
    return CodeDensity(
        jnp.float32(-0.7),
        tuple(
            jnp.asarray(RNG.normal(size=np.where(np.arange(len(shape)) == axis, n, 1)), jnp.float32)
            for axis, n in enumerate(shape)
        ),
        jnp.asarray(RNG.normal(size=HIGH - 1), jnp.float32),
    )


def test_probabilities_of_all_codes_add_up_to_one():
    density = some_density((4, 5))
    total = np.zeros((4, 5))
    for code in range(-HIGH, HIGH + 1):
        total += 2.0 ** -np.asarray(code_bits(jnp.full((4, 5), float(code)), density))
    np.testing.assert_allclose(total, 1, rtol=1e-5)


def test_slopes_lie_on_the_line_between_neighbouring_codes():
    density = some_density((4, 5))
    levels = jnp.asarray(RNG.uniform(-2.9, 2.9, (4, 5)), jnp.float32)
    slopes = jax.grad(lambda x: code_bits(x, density).sum())(levels)
    # Numbers of one shape: no other program is compiled.
    above = code_bits(jnp.ceil(levels), density) - code_bits(jnp.floor(levels), density)
    np.testing.assert_allclose(slopes, above, atol=2e-5)
    beyond = jax.grad(lambda x: code_bits(x, density).sum())(jnp.full((4, 5), 9.0))
    last = code_bits(jnp.full((4, 5), 3.0), density) - code_bits(jnp.full((4, 5), 2.0), density)
    np.testing.assert_allclose(beyond, last, atol=2e-5)


def test_what_is_fitted_needs_the_first_order_entropy_and_less_where_rows_differ():
    even = RNG.choice(7, (60, 40), p=[0.01, 0.03, 0.1, 0.7, 0.1, 0.04, 0.02]) - 3
    _, counts = np.unique(even, return_counts=True)
    entropy = -(counts * np.log2(counts / even.size)).sum()
    density = fitted_density(even, HIGH)
    found = float(code_bits(jnp.asarray(even, jnp.float32), density).sum())
    # Logits of 100 rows and columns fit some of what is chance.
    assert 0.95 * entropy < found < 1.02 * entropy
    rows = np.where(RNG.random((60, 1)) < 0.5, 0, even)
    _, counts = np.unique(rows, return_counts=True)
    entropy = -(counts * np.log2(counts / rows.size)).sum()
    found = float(code_bits(jnp.asarray(rows, jnp.float32), fitted_density(rows, HIGH)).sum())
    assert found < 0.85 * entropy


def test_the_fit_has_no_slope_left():
    codes = RNG.integers(-1, 2, (60, 40)) * (RNG.random((60, 1)) < 0.3)
    density = fitted_density(codes, HIGH)
    loss = lambda density: code_bits(jnp.asarray(codes, jnp.float32), density).sum()
    slope = jax.grad(loss)(density)
    # The prior's share is what is left on the axes.
    for logits, left in zip(density.axes, slope.axes, strict=True):
        np.testing.assert_allclose(left * np.log(2), -logits / 4, atol=0.05)
    assert abs(float(slope.nonzero)) < 0.1


def test_fits_what_is_empty_or_all_the_same():
    for codes in (
        np.zeros((0, 4), int),
        np.zeros((3, 4), int),
        np.full((3, 4), 2),
        np.ones(5, int),
    ):
        density = fitted_density(codes, HIGH)
        assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(density))
        assert density.more.shape == initial_density(codes.shape, HIGH).more.shape


def test_the_file_takes_about_these_bits(tmp_path):
    busy = RNG.random((200, 1)) * RNG.random((1, 100)) < 0.1
    codes = np.round(RNG.laplace(size=(200, 100))) * busy
    codes = np.clip(codes, -HIGH, HIGH)
    codes[0, 0] = HIGH
    bits = code_bits(jnp.asarray(codes, jnp.float32), fitted_density(codes.astype(int), HIGH))
    format = Format(3, granularity=PerTensor())
    leaf = encode(jnp.asarray(codes, jnp.float32), format)
    np.testing.assert_array_equal(leaf.decode(), codes)
    jaxcomp.save(tmp_path / "codes.jxc", [leaf])
    size = (tmp_path / "codes.jxc").stat().st_size
    # The container comes to it, and what the coder pays to learn 300 logits.
    assert 0.95 * float(bits.sum()) < 8 * size < 1.1 * float(bits.sum()) + 8 * 300
