"""Stacked layers, convolutions, groups on every axis, and leaves spread over devices."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from quantize_reference import (
    codes_of,
    decode_jit,
    encode_jit,
    half_step,
    name_of,
    reference_range,
    same_bits,
    wide,
)

from jaxcomp.quantize import Format, PerChannel, PerGroup, PerTensor, encode, fake_quant

RNG = np.random.default_rng(0)


def normal(*shape, dtype=np.float32):
    return jax.device_put(RNG.normal(size=shape).astype(dtype))


@pytest.mark.parametrize("symmetric", [True, False])
def test_channels_of_stacked_layers(symmetric):
    format = Format(3, symmetric, PerChannel((0, -1)))
    x = normal(4, 8, 6) * jnp.array([1.0, 10, 0.1, 3])[:, None, None]
    leaf = encode_jit(x, format)
    assert leaf.scale.shape == (4, 1, 6)
    dense = decode_jit(leaf)
    alone = Format(3, symmetric, PerChannel(-1))
    assert same_bits(dense, np.stack([decode_jit(encode_jit(layer, alone)) for layer in x]))

    def layer(carry, leaf):
        assert (leaf.shape, leaf.scale.shape) == ((8, 6), (1, 6))
        return carry, leaf.decode()

    assert same_bits(jax.lax.scan(layer, 0, leaf)[1], dense)
    assert same_bits(jax.jit(jax.vmap(lambda leaf: leaf.decode()))(leaf), dense)


@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_of_stacked_layers(symmetric):
    format = Format(4, symmetric, PerGroup(2))
    x = normal(3, 4, 5)
    leaf = encode_jit(x, format)
    assert leaf.scale.shape == (3, 2, 1, 5)
    _, rows = jax.lax.scan(lambda c, leaf: (c, leaf.decode()), 0, leaf)
    assert same_bits(rows, decode_jit(leaf))
    assert same_bits(rows, np.stack([decode_jit(encode_jit(layer, format)) for layer in x]))


CASES = [
    ((6, 4), 2, 1, (6, 2, 1)),
    ((8,), 4, 0, (2, 1)),
    ((2, 6, 4), 3, 1, (2, 2, 1, 4)),
    ((3, 3, 4, 5), 3, 0, (1, 1, 3, 4, 5)),
    ((3, 3, 4, 5), 1, 2, (3, 3, 4, 1, 5)),
    ((3, 3, 4, 5), 5, 3, (3, 3, 4, 1, 1)),
]


@pytest.mark.parametrize(("shape", "size", "axis", "scales"), CASES, ids=str)
def test_groups_on_any_axis(shape, size, axis, scales):
    """Counted from either end; whole axes and single weights are groups too."""
    x = normal(*shape)
    format = Format(4, axis % 2 == 0, PerGroup(size, axis))
    leaf = encode_jit(x, format)
    assert leaf.scale.shape == scales
    # The same by moving the groups in front and encoding each as a tensor.
    moved = np.moveaxis(np.asarray(x), axis, 0).reshape(shape[axis] // size, size, -1)
    scale, _ = reference_range(x, format)
    np.testing.assert_allclose(wide(leaf.scale), scale, rtol=1e-6)
    largest = (
        np.abs(moved).max(1)
        if format.symmetric
        else np.ptp(np.concatenate([moved, np.zeros_like(moved[:, :1])], 1), axis=1)
    )
    steps = 7 if format.symmetric else 15
    found = np.moveaxis(wide(leaf.scale).squeeze(axis + 1), axis, 0).reshape(largest.shape)
    np.testing.assert_allclose(found, largest / steps, rtol=1e-6)
    from_the_end = Format(4, format.symmetric, PerGroup(size, axis - len(shape)))
    assert same_bits(decode_jit(encode_jit(x, from_the_end)), decode_jit(leaf))
    assert same_bits(jax.jit(lambda x: fake_quant(x, format))(x), decode_jit(leaf))
    error = np.abs(wide(decode_jit(leaf)) - wide(x))
    assert error.max() <= half_step(leaf, x.dtype).max()


@pytest.mark.parametrize("axis", [-1, 0, (2, 3), (0, 1, 2)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_channels_of_convolutions(axis, symmetric):
    x = normal(3, 3, 4, 5)
    leaf = encode_jit(x, Format(5, symmetric, PerChannel(axis)))
    kept = {a % 4 for a in (axis if isinstance(axis, tuple) else (axis,))}
    assert leaf.scale.shape == tuple(n if a in kept else 1 for a, n in enumerate(x.shape))
    for index in itertools.product(*(range(n) for n in leaf.scale.shape)):
        part = tuple(i if a in kept else slice(None) for a, i in enumerate(index))
        channel = np.asarray(x)[part]
        low = 0 if symmetric else min(channel.min(), 0)
        high = np.abs(channel).max() if symmetric else max(channel.max(), 0)
        steps = 15 if symmetric else 31
        np.testing.assert_allclose(float(leaf.scale[index]), (high - low) / steps, rtol=1e-6)


# --- over devices

SHARDED = (
    Format(4, True, PerTensor()),
    Format(8, False, PerChannel(-1)),
    Format(3, False, PerGroup(16, 0)),  # one group over all shards
    Format(8, True, PerGroup(8, -1)),  # each shard holds a part of two groups
)


@functools.cache
def mesh(kind):
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind, kind))


def put(x, kind, spec):
    return jax.device_put(x, NamedSharding(mesh(kind), spec))


kinds = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)


@pytest.mark.parametrize(
    ("kind", "spec"),
    [
        (AxisType.Auto, P("data", "model")),
        (AxisType.Explicit, P("data", "model")),
        (AxisType.Explicit, P(("data", "model"), None)),
    ],
    ids=str,
)
def test_sharded_leaves(kind, spec):
    """The same codes, scales and values, laid out as the weights are."""
    x = normal(16, 24)
    there = put(x, kind, spec)

    @jax.jit
    def run(x):
        leaves = [encode(x, format) for format in SHARDED]
        return leaves, [fake_quant(x, format) for format in SHARDED]

    leaves, values = run(there)
    for format, leaf, value in zip(SHARDED, leaves, values, strict=True):
        alone = encode_jit(x, format)
        np.testing.assert_array_equal(codes_of(leaf), codes_of(alone))
        assert same_bits(leaf.scale, alone.scale)
        assert same_bits(value, alone.decode())
        assert same_bits(leaf.decode(), alone.decode())
        if kind == AxisType.Explicit:
            assert value.sharding.is_equivalent_to(there.sharding, 2)


@kinds
def test_sharded_leaves_outside_jit(kind):
    """`pack` runs there; with and without the mesh being set."""
    format = SHARDED[2]
    x = normal(16, 24)
    there = put(x, kind, P("data", "model"))
    alone = encode_jit(x, format)
    leaf = encode(there, format)
    np.testing.assert_array_equal(codes_of(leaf), codes_of(alone))
    assert same_bits(leaf.decode(), alone.decode())
    if kind == AxisType.Explicit:
        with jax.set_mesh(mesh(kind)):
            assert same_bits(fake_quant(there, format), alone.decode())


@kinds
@pytest.mark.parametrize("format", SHARDED[1:3], ids=name_of)
def test_sharded_gradient_scan_and_vmap(kind, format):
    xs, weights = normal(3, 16, 24), normal(3, 16, 24)
    spec = P(None, "data", "model")
    there, cotangent = put(xs, kind, spec), put(weights, kind, spec)
    alone = np.stack([decode_jit(encode_jit(x, format)) for x in xs])

    @jax.jit
    def run(xs, cotangent):
        mapped, pull = jax.vjp(jax.vmap(lambda x: fake_quant(x, format)), xs)
        _, scanned = jax.lax.scan(lambda c, x: (c, fake_quant(x, format)), 0, xs)
        _, moved = jax.jvp(lambda xs: fake_quant(xs[0], format), (xs,), (cotangent,))
        return mapped, scanned, pull(cotangent)[0], moved

    mapped, scanned, grads, moved = run(there, cotangent)
    assert same_bits(mapped, alone)
    assert same_bits(scanned, alone)
    assert same_bits(grads, weights)
    assert same_bits(moved, weights[0])
    if kind == AxisType.Explicit:
        for result in (mapped, scanned, grads):
            assert result.sharding.is_equivalent_to(there.sharding, 3)


@kinds
def test_sharded_with_a_given_range(kind):
    x = normal(16, 24)
    scale = jnp.abs(normal(1, 24)) / 4
    zero_point = jnp.asarray(RNG.integers(0, 16, (1, 24)), jnp.uint8)
    format = Format(4, False)

    @jax.jit
    def run(x, scale, zero_point):
        return jax.vjp(lambda x: fake_quant(x, format, scale, zero_point), x)[0]

    there = put(x, kind, P("data", "model"))
    spread = (put(scale, kind, P(None, "model")), put(zero_point, kind, P(None, "model")))
    expected = fake_quant(x, format, scale, zero_point)
    assert same_bits(run(there, *spread), expected)
    if kind == AxisType.Explicit:
        assert run(there, *spread).sharding.is_equivalent_to(there.sharding, 2)
