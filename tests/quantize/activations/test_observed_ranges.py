"""Ranges from batches: against the values themselves, all of them at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcomp.quantize import Format, PerChannel, PerGroup, PerTensor
from jaxcomp.quantize.activations.bounds import fake_quant_within
from jaxcomp.quantize.activations.dynamic import activations
from jaxcomp.quantize.activations.observed import observe_ranges
from jaxcomp.quantize.activations.tracked import track_ranges
from jaxcomp.quantize.ranges import AbsMax, Entropy, HalfQuadratic, MeanSquare, Percentile
from jaxcomp.quantize.scales import find_scales

RNG = np.random.default_rng(2)
W = jnp.asarray(RNG.normal(size=(8, 2)).astype(np.float32))
# Heavy tails: what a range that clips is for.
BATCHES = [RNG.standard_t(3, size=(64, 8)).astype(np.float32) * s for s in (1.0, 2.0, 0.5)]
EVERYTHING = np.concatenate(BATCHES).astype(np.float64)


def product(params, x):
    return x @ params


def observed(format, batches=BATCHES):
    (bounds,) = observe_ranges(product, W, batches, format).values()
    return [float(edge.squeeze()) for edge in bounds]


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_range_that_holds_all_values(symmetric):
    low, high = observed(Format(8, symmetric, PerTensor()))
    if symmetric:
        assert (low, high) == (-np.abs(EVERYTHING).max(), np.abs(EVERYTHING).max())
    else:
        assert (low, high) == (EVERYTHING.min(), EVERYTHING.max())


@pytest.mark.parametrize("percent", [50.0, 99.0, 99.9])
def test_percentiles(percent):
    low, high = observed(Format(8, True, PerTensor(), range=Percentile(percent)))
    wanted = np.percentile(np.abs(EVERYTHING), percent, method="inverted_cdf")
    assert low == -high
    assert wanted <= high <= 1.017 * wanted
    low, high = observed(Format(8, False, PerTensor(), range=Percentile(percent)))
    ends = np.percentile(EVERYTHING, [50 - percent / 2, 50 + percent / 2], method="inverted_cdf")
    np.testing.assert_allclose([low, high], ends, rtol=0.02)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_least_mean_square_error(bits, symmetric):
    format = Format(bits, symmetric, PerTensor(), range=MeanSquare())
    steps = 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1
    shift = -(2 ** (bits - 1) - 1) if symmetric else 0

    def error(low, high):
        """By the definition, in float64."""
        scale = max(-low, high) / steps if symmetric else (high - low) / steps
        zero = 0 if symmetric else np.round(-low / scale)
        codes = np.clip(np.round(EVERYTHING / scale) + zero, shift, steps)
        return np.mean(((codes - zero) * scale - EVERYTHING) ** 2)

    parts = np.geomspace(0.02, 1, 120)
    low, high = EVERYTHING.min(), EVERYTHING.max()
    best = min(error(low * part, high * part) for part in parts)
    if symmetric:
        most = max(-low, high)
        best = min(error(-most * part, most * part) for part in parts)
    assert error(*observed(format)) <= 1.02 * best


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_least_entropy_is_that_of_the_values_at_once(symmetric):
    format = Format(4, symmetric, PerTensor(), range=Entropy(bins=512, candidates=64))
    # Many values, so that what is lost changes smoothly with the range.
    x = RNG.laplace(size=(4096, 8)).astype(np.float32)
    low, high = observed(format, [x[:1000], x[1000:]])
    steps = 7 if symmetric else 15
    wanted = find_scales(jnp.asarray(x), format).scale.squeeze()
    assert high < 0.9 * x.max()
    got = (high if symmetric else high - low) / steps
    np.testing.assert_allclose(got, wanted, rtol=0.1)


def test_channels_have_histograms_of_their_own():
    x = RNG.normal(size=(2, 3, 50, 4)).astype(np.float32) * np.array([1, 5, 25.0])[:, None, None]
    x = x.astype(np.float32)

    def attend(params, x):
        return jnp.einsum("bhqd,bhkd->bhqk", x * params, x)

    format = Format(8, True, PerChannel(1), range=Percentile(90.0))
    found = observe_ranges(attend, jnp.ones(4), [x], format)
    wanted = np.percentile(np.abs(x), 90, axis=(0, 2, 3), method="inverted_cdf")
    for bounds in found.values():
        np.testing.assert_allclose(bounds.high.ravel(), wanted, rtol=0.017)


def test_layers_of_a_scan_have_ranges_of_their_own():
    params = {"w": jnp.stack([jnp.eye(8), 10 * jnp.eye(8), jnp.eye(8)])}

    def layers(params, x):
        return jax.lax.scan(lambda h, w: (h @ w, None), x, params["w"])[0]

    bounds = observe_ranges(layers, params, BATCHES)["w"]
    most = np.abs(EVERYTHING).max()
    np.testing.assert_allclose(bounds.high.ravel(), [most, most, 10 * most], rtol=1e-6)
    clipping = Format(8, granularity=PerTensor(), range=Percentile(99.0))
    bounds = observe_ranges(layers, params, BATCHES, clipping)["w"]
    np.testing.assert_allclose(bounds.high[2], 10 * bounds.high[0], rtol=0.02)


def test_observed_ranges_are_used_as_they_are():
    ranges = observe_ranges(product, W, BATCHES)
    run = activations(product, W, BATCHES[0], ranges=ranges)
    x = jnp.asarray(100 * BATCHES[0])
    (bounds,) = ranges.values()
    rounded = fake_quant_within(x, bounds, Format(8, granularity=PerTensor()))
    assert jnp.abs(rounded).max() == bounds.high
    np.testing.assert_allclose(run(W, x), rounded @ W, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_batches_spread_over_devices(kind):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
    place = NamedSharding(mesh, P("data", None))
    batches = [jax.device_put(x, place) for x in BATCHES]
    w = jax.device_put(W, NamedSharding(mesh, P()))
    format = Format(8, granularity=PerTensor(), range=Percentile(99.0))
    (got,) = observe_ranges(product, w, batches, format).values()
    (wanted,) = observe_ranges(product, W, BATCHES, format).values()
    np.testing.assert_array_equal(got.high, wanted.high)


def test_messages():
    with pytest.raises(ValueError, match="batches is empty"):
        observe_ranges(product, W, [])
    with pytest.raises(TypeError, match="batches is one array"):
        observe_ranges(product, W, BATCHES[0])
    broken = BATCHES[1].copy()
    broken[2, :2] = np.nan, np.inf
    with pytest.raises(ValueError, match=r"batch 1: .* met 2 NaN or infinite"):
        observe_ranges(product, W, [BATCHES[0], broken, BATCHES[2]])
    with pytest.raises(ValueError, match="found anew in each call"):
        observe_ranges(product, W, BATCHES, Format(4, granularity=PerGroup(2, -1)))
    lasting = Format(8, granularity=PerTensor(), range=HalfQuadratic())
    with pytest.raises(ValueError, match="cannot be found from a histogram"):
        # Said before the batches are gone through, of which the second would fail.
        observe_ranges(product, W, [BATCHES[0], None], lasting)

    def branches(params, x):
        return jax.lax.cond(x[0, 0] > 1e9, lambda: x @ params["a"], lambda: x @ params["b"])

    with pytest.raises(ValueError, match="a: no batch led to it"):
        observe_ranges(branches, {"a": W, "b": W}, BATCHES)


def test_ranges_hold_what_is_rounded_to_16_bits():
    """A compiler would take the unrounded result of the operation before."""
    x = jnp.asarray(BATCHES[0], jnp.bfloat16)
    params = {"scale": jnp.asarray(1.37, jnp.bfloat16), "w": jnp.asarray(W, jnp.bfloat16)}
    largest = float(jnp.abs(jnp.asarray(x) * params["scale"]).max())

    def model(params, x):
        return (x * params["scale"]) @ params["w"]

    for found in (AbsMax(), Percentile(100.0)):
        format = Format(8, granularity=PerTensor(), range=found)
        assert float(observe_ranges(model, params, [x], format)["w"].high.squeeze()) == largest
    tracked = track_ranges(model, params, x)
    _, state = tracked(params, tracked.init(), x)
    assert float(tracked.freeze(state)["w"].high.squeeze()) == largest
