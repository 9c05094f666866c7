"""Ranges against sorting, exhaustive search and torch-free references, at every granularity."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from quantize_reference import grouped, same_bits, shared_axes, wide

from jaxcomp.quantize.affine import encode, fake_quant, find_codes
from jaxcomp.quantize.formats import Format, GridFormat, PerBlock, PerChannel, PerGroup, PerTensor
from jaxcomp.quantize.named import binary, mxfp4, nvfp4, ternary
from jaxcomp.quantize.ranges import Entropy, HalfQuadratic, MeanSquare, Percentile
from jaxcomp.quantize.scales import find_scales
from jaxcomp.quantize.search import rank

SHAPE = (32, 6)
SEARCHED = (Percentile(90), MeanSquare(8), Entropy(64, 8), HalfQuadratic(iterations=5))
FORMATS = (
    Format(4),
    Format(3, False, PerGroup(16)),
    Format(2, zero=False, granularity=PerTensor()),
    Format(4, scale_dtype="float8_e8m0fnu"),
    GridFormat("nf4", PerBlock((8, 3))),
    mxfp4(),
    nvfp4(),
)


@functools.cache
def losses(format, norm=2.0):
    """Sum of the errors to a power in each unit, and the scales."""

    def run(x):
        error = jnp.abs(x - fake_quant(x, format))
        return jnp.sum(error**norm)

    return jax.jit(run)


def heavy(seed=0, shape=SHAPE):
    return jnp.asarray(np.random.default_rng(seed).standard_t(3, shape), jnp.float32)


@pytest.mark.parametrize("percent", [0.1, 50, 90, 99.9, 100])
@given(st.integers(0, 2**32 - 1))
def test_percentiles_are_those_of_numpy(percent, seed):
    rng = np.random.default_rng(seed)
    x = np.abs(rng.normal(size=(40, 5)) * 10.0 ** rng.integers(-6, 6, 5)).astype(np.float32)
    x[rng.random(x.shape) < 0.2] = 0.0
    expected = np.percentile(x, percent, axis=0, keepdims=True, method="inverted_cdf")
    np.testing.assert_array_equal(_rank(jnp.asarray(x), percent), expected)


_rank = jax.jit(lambda x, percent: rank(x, (0,), percent), static_argnums=1)


def test_a_percentile_clips_as_many():
    x = heavy(shape=(1000, 2))
    _, inside = find_codes(x, find_scales(x, Format(8, range=Percentile(99))), Format(8))
    assert np.all((~np.asarray(inside)).sum(axis=0) <= 10)
    assert np.all((~np.asarray(inside)).sum(axis=0) >= 5)
    lopsided = jnp.abs(x) + 1
    scales = find_scales(lopsided, Format(8, False, range=Percentile(99)))
    assert np.all(np.asarray(scales.zero_point) == 0)
    top = np.percentile(wide(lopsided), 99.5, axis=0, keepdims=True, method="inverted_cdf")
    np.testing.assert_allclose(wide(scales.scale) * 255, top, rtol=1e-5)
    everything = find_scales(x, Format(8, range=Percentile(100)))
    assert same_bits(everything.scale, find_scales(x, Format(8)).scale)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_mean_square_is_never_worse(format):
    found = losses(dataclasses.replace(format, range=MeanSquare(8)))
    plain = losses(format)
    pairs = [(float(found(heavy(seed))), float(plain(heavy(seed)))) for seed in range(5)]
    assert all(one <= other * (1 + 1e-6) for one, other in pairs)
    # Powers of two leave no choice in most blocks.
    if format != mxfp4():
        assert sum(one for one, _ in pairs) < 0.98 * sum(other for _, other in pairs)


@pytest.mark.parametrize("format", FORMATS[:4], ids=str)
def test_half_quadratic_is_never_worse_in_its_norm(format):
    found = losses(dataclasses.replace(format, range=HalfQuadratic()), 0.7)
    plain = losses(format, 0.7)
    pairs = [(float(found(heavy(seed))), float(plain(heavy(seed)))) for seed in range(5)]
    assert all(one <= other * (1 + 1e-5) for one, other in pairs)
    if format.scale_dtype == "float32":
        assert sum(one for one, _ in pairs) < 0.98 * sum(other for _, other in pairs)


@pytest.mark.parametrize(
    ("bits", "candidates", "mean", "most", "worst"),
    [(3, 32, 1.0003, 1.01, 1.05), (8, 32, 1, 1.05, 1.15), (3, 128, 1.0001, 1.002, 1.005)],
)
def test_mean_square_against_many_scales(bits, candidates, mean, most, worst):
    """Close to the best of 2,000 scales, in float64: in the mean, for 99%, and for all of 500."""
    x = np.random.default_rng(0).standard_t(4, (64, 500)).astype(np.float32)
    top, best = 2 ** (bits - 1) - 1, np.full(500, np.inf)
    for step in np.abs(x).max(axis=0) / top * np.linspace(0.02, 1, 2000)[:, None]:
        codes = np.clip(np.rint(x.astype(np.float64) / step), -top, top)
        best = np.minimum(best, ((codes * step - x) ** 2).sum(axis=0))
    found = wide(fake_quant(jnp.asarray(x), Format(bits, range=MeanSquare(candidates))))
    ratio = ((found - x) ** 2).sum(axis=0) / best
    assert np.mean(ratio) <= mean
    assert np.quantile(ratio, 0.99) <= most
    assert np.max(ratio) <= worst


@given(st.integers(0, 2**32 - 1))
def test_binary_is_the_mean(seed):
    x = heavy(seed)
    leaf = _binary(x)
    np.testing.assert_allclose(leaf.scale, np.abs(wide(x)).mean(0, keepdims=True), rtol=1e-5)
    np.testing.assert_array_equal(np.sign(leaf.decode()), np.where(np.asarray(x) < 0, -1, 1))


_binary = jax.jit(lambda x: encode(x, binary()))
_ternary = jax.jit(lambda x: encode(x, ternary(PerTensor())))


@given(st.integers(0, 2**32 - 1))
def test_ternary_is_the_optimum(seed):
    """By trying every number of weights that stay, in float64."""
    x = heavy(seed, (16, 2))
    flat = np.sort(np.abs(wide(x)).ravel())[::-1]
    best = min(
        ((flat[:k] - flat[:k].mean()) ** 2).sum() + (flat[k:] ** 2).sum()
        for k in range(1, flat.size + 1)
    )
    found = ((wide(_ternary(x).decode()) - wide(x)) ** 2).sum()
    assert best * (1 - 1e-5) <= found <= best * (1 + 1e-4)


@pytest.mark.parametrize("range_of", SEARCHED, ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_law_and_gradient(format, range_of):
    """Seen in training is what is packed; no gradient where it is clipped; each unit is alone."""
    format = dataclasses.replace(format, range=range_of)
    x = heavy()

    @jax.jit
    def run(x):
        leaf, grad = encode(x, format), jax.grad(lambda x: jnp.sum(fake_quant(x, format)))(x)
        return leaf, fake_quant(x, format), grad, find_codes(x, find_scales(x, format), format)[1]

    leaf, seen, grad, inside = run(x)
    assert same_bits(leaf.decode(), seen)
    np.testing.assert_array_equal(grad, np.asarray(inside, np.float32))
    assert np.all(np.isfinite(wide(leaf.scale)))
    if format.granularity == PerChannel():
        other = run(x.at[:, 1].multiply(100.0))[1]
        assert same_bits(np.delete(other, 1, axis=1), np.delete(seen, 1, axis=1))
        bad = np.asarray(run(x.at[3, 2].set(jnp.nan))[1])
        assert np.all(np.isnan(bad[:, 2]))
        assert np.all(np.isfinite(np.delete(bad, 2, axis=1)))
    zeros = np.asarray(run(jnp.zeros(SHAPE))[1])
    assert np.all(np.isfinite(zeros))
    assert np.all(zeros == 0) or not getattr(format, "zero", True)


@pytest.mark.parametrize("range_of", SEARCHED, ids=lambda r: type(r).__name__)
def test_powers_of_two_move_only_the_scale(range_of):
    x = heavy()
    for format in (Format(4, range=range_of), Format(3, False, range=range_of)):
        run = jax.jit(lambda x, f=format: find_scales(x, f))
        small, large = run(x), run(x * 256)
        np.testing.assert_array_equal(wide(small.scale) * 256, wide(large.scale))
        if small.zero_point is not None:
            np.testing.assert_array_equal(small.zero_point, large.zero_point)


def divergences(magnitudes, levels, bins, parts):
    """As in Migacz's slides, on a histogram of magnitudes: one for each part of the range."""
    histogram, _ = np.histogram(magnitudes, bins, (0, magnitudes.max()))
    centres = (np.arange(bins) + 0.5) / bins
    found = []
    for part in parts:
        inside = centres <= part
        p = np.where(inside, histogram, 0).astype(float)
        step = part / (levels - 1)
        cell = np.minimum(np.rint(centres / step), levels - 1).astype(int)
        q = np.zeros(bins)
        for code in range(levels):
            here = inside & (cell == code) & (histogram > 0)
            q[here] = histogram[inside & (cell == code)].sum() / max(here.sum(), 1)
        p[np.flatnonzero(inside)[-1]] += histogram[~inside].sum()
        p, q = p / p.sum(), q / q.sum()
        seen = p > 0
        found.append((p[seen] * np.log(p[seen] / np.maximum(q[seen], 1e-9))).sum())
    return np.array(found)


def test_entropy_against_numpy():
    for seed in range(4):
        x = heavy(seed, (4000, 1))
        format = Format(4, range=Entropy(128, 32))
        part = wide(find_scales(x, format).scale).item() * 7 / np.abs(wide(x)).max()
        parts = 1 - (1 - 8 / 128) * np.arange(32) / 31
        of_parts = divergences(np.abs(np.asarray(x)), 8, 128, [*parts, part])
        assert of_parts[-1] <= of_parts.min() * 1.02
        assert part < 0.8  # a heavy tail is clipped


def test_uniform_values_are_not_clipped_by_entropy():
    x = jnp.linspace(-1, 1, 8192)[:, None]
    scale = wide(find_scales(x, Format(8, range=Entropy(1024, 64))).scale).item() * 127
    assert scale > 0.9


def test_fields_of_ranges():
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        for percent in (0, -1, 100.1):
            with pytest.raises(ValueError, match="percent must be above 0 and at most 100"):
                Percentile(percent)
        with pytest.raises(ValueError, match=r"percent is 0.999, .* is Percentile\(99.9\)"):
            Percentile(0.999)
        for make, message in (
            (
                lambda: Percentile("99"),  # pyright: ignore[reportArgumentType]
                "percent must be a number",
            ),
            (
                lambda: MeanSquare(2.5),  # pyright: ignore[reportArgumentType]
                "candidates must be an int",
            ),
            (
                lambda: Entropy(bins="many"),  # pyright: ignore[reportArgumentType]
                "bins must be an int",
            ),
            (
                lambda: HalfQuadratic(norm=None),  # pyright: ignore[reportArgumentType]
                "norm must be a number",
            ),
        ):
            with pytest.raises(TypeError, match=message):
                make()
        for make, message in (
            (lambda: MeanSquare(1), "candidates must be at least 2"),
            (lambda: Entropy(8), "bins must be at least 16"),
            (lambda: HalfQuadratic(norm=1.5), "norm must be above 0 and at most 1"),
            (lambda: HalfQuadratic(beta=0), "beta must be above 0"),
            (lambda: HalfQuadratic(iterations=0), "iterations must be at least 1"),
        ):
            with pytest.raises(ValueError, match=message):
                make()
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def test_a_range_for_each_unit():
    """Groups and tiles are searched one by one: the same as each encoded alone."""
    x = heavy(1, (8, 6))
    format = Format(3, range=MeanSquare(8), granularity=PerBlock((4, 3)))
    whole = wide(find_scales(x, format).scale)
    axes = shared_axes(2, Format(granularity=PerTensor()))
    assert axes == (0, 1)
    assert grouped(np.asarray(x), Format(granularity=PerTensor())).shape == (8, 6)
    alone = dataclasses.replace(format, granularity=PerTensor())
    run = jax.jit(lambda x: find_scales(x, alone).scale)
    for row in range(2):
        for column in range(2):
            tile = x[4 * row : 4 * row + 4, 3 * column : 3 * column + 3]
            np.testing.assert_allclose(whole[row, 0, column, 0], wide(run(tile)).item(), rtol=1e-6)
