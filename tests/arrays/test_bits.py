"""Packing against one Python string of bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from leaf_samples import pack_reference, unpack_reference

from jaxcomp.arrays import bits as bits_lib
from jaxcomp.arrays.bits import (
    pack_bits,
    pack_bits_host,
    packed_length,
    unpack_bits,
    unpack_bits_host,
)

BITS = range(1, 17)


def codes_of(bits, shape, seed=0):
    dtype = np.uint8 if bits <= 8 else np.uint16
    codes = np.random.default_rng(seed).integers(0, 1 << bits, shape).astype(dtype)
    if codes.size > 1:
        codes.flat[0], codes.flat[-1] = 0, (1 << bits) - 1
    return codes


@st.composite
def arbitrary_codes(draw):
    bits = draw(st.integers(1, 16))
    shape = draw(hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=19))
    dtype = draw(st.sampled_from([d for d in ("u1", "u2", "i4", "i8") if bits < 8 * int(d[1])]))
    elements = st.integers(0, (1 << bits) - 1)
    return bits, draw(hnp.arrays(dtype, shape, elements=elements))


@given(arbitrary_codes())
def test_host_packing_is_the_bit_string(case):
    bits, codes = case
    packed = pack_bits_host(codes, bits)
    np.testing.assert_array_equal(packed, pack_reference(codes, bits))
    assert packed.dtype == np.uint8
    back = unpack_bits_host(packed, bits, codes.shape[-1])
    np.testing.assert_array_equal(back, codes)
    assert back.dtype == (np.uint8 if bits <= 8 else np.uint16)


@pytest.mark.parametrize("bits", BITS)
def test_device_packing_is_the_bit_string(bits):
    codes = codes_of(bits, (3, 2, 17))
    packed = pack_bits(jnp.asarray(codes), bits)
    np.testing.assert_array_equal(packed, pack_reference(codes, bits))
    back = unpack_bits(packed, bits, 17)
    np.testing.assert_array_equal(back, codes)
    assert (back.dtype, back.shape) == (codes.dtype, codes.shape)


@given(arbitrary_codes())
@settings(max_examples=8)
def test_device_packing_is_host_packing(case):
    bits, codes = case
    codes = codes.astype(np.uint16)
    packed = pack_bits(jnp.asarray(codes), bits)
    np.testing.assert_array_equal(packed, pack_bits_host(codes, bits))
    np.testing.assert_array_equal(unpack_bits(packed, bits, codes.shape[-1]), codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("length", [0, 1, 2, 7, 8, 9, 15, 1001])
def test_bytes_are_really_packed(bits, length):
    exact = -(-bits * length // 8)
    assert packed_length(length, bits) == exact
    assert pack_bits_host(codes_of(bits, (3, length)), bits).nbytes == 3 * exact
    abstract = jax.eval_shape(
        lambda codes: pack_bits(codes, bits), jax.ShapeDtypeStruct((3, length), jnp.uint16)
    )
    assert (abstract.shape, abstract.dtype) == ((3, exact), jnp.uint8)


@pytest.mark.parametrize("bits", [4, 11])
@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0)])
def test_nothing_packs_to_nothing(bits, shape):
    packed = pack_bits(jnp.zeros(shape, jnp.uint16), bits)
    assert packed.size == 0
    assert unpack_bits(packed, bits, shape[-1]).shape == shape


@pytest.mark.parametrize("bits", [3, 10])
def test_higher_bits_are_dropped(bits):
    codes = codes_of(bits, (21,)).astype(np.int32)
    packed = pack_bits(jnp.asarray(codes + (1 << bits) * 5), bits)
    np.testing.assert_array_equal(packed, pack_reference(codes, bits))


@pytest.mark.parametrize("bits", [1, 3, 4, 12])
def test_unused_last_bits_are_zero_and_ignored(bits):
    length = 3 if bits != 12 else 1
    packed = pack_bits_host(np.full(length, (1 << bits) - 1), bits)
    used = bits * length % 8
    assert used
    assert packed[-1] < 1 << used
    packed[-1] |= 0xFF & ~((1 << used) - 1)
    np.testing.assert_array_equal(unpack_bits_host(packed, bits, length), (1 << bits) - 1)
    np.testing.assert_array_equal(unpack_bits(jnp.asarray(packed), bits, length), (1 << bits) - 1)


@pytest.mark.parametrize("bits", [4, 13])
def test_vmap_over_any_axis(bits):
    codes = jnp.asarray(codes_of(bits, (4, 3, 11)))
    packed = pack_bits(codes, bits)
    np.testing.assert_array_equal(jax.vmap(lambda c: pack_bits(c, bits))(codes), packed)
    middle = jax.vmap(lambda p: unpack_bits(p, bits, 11), in_axes=1, out_axes=1)(packed)
    np.testing.assert_array_equal(middle, codes)


def test_one_bit_flips_one_code():
    codes = codes_of(5, (16,))
    packed = pack_bits_host(codes, 5)
    for at in range(80):
        flipped = packed.copy()
        flipped[at // 8] ^= 1 << (at % 8)
        wrong = np.flatnonzero(unpack_bits_host(flipped, 5, 16) != codes)
        assert wrong.tolist() == [at // 5]


@pytest.mark.parametrize("bits", [0, -1, 17])
def test_bits_outside_the_range_raise(bits):
    for pack, unpack, xp in [
        (pack_bits, unpack_bits, jnp),
        (pack_bits_host, unpack_bits_host, np),
    ]:
        with pytest.raises(ValueError, match="bits must be 1 to 16"):
            pack(xp.zeros(3, np.uint8), bits)
        with pytest.raises(ValueError, match="bits must be 1 to 16"):
            unpack(xp.zeros(3, np.uint8), bits, 3)


def test_scalars_and_wrong_lengths_raise():
    # With the run-time type checks installed, the signature speaks first.
    with pytest.raises((ValueError, TypeError), match=r"scalar|codes"):
        pack_bits(jnp.zeros((), jnp.uint8), 4)
    with pytest.raises((ValueError, TypeError), match=r"scalar|packed"):
        unpack_bits(jnp.zeros((), jnp.uint8), 4, 1)
    for length in (-1, 4, 7):
        with pytest.raises(ValueError, match="the last axis has 3"):
            unpack_bits(jnp.zeros(3, jnp.uint8), 4, length)
    with pytest.raises(ValueError, match="the last axis has 3"):
        unpack_bits_host(np.zeros(3, np.uint8), 4, 4)


def test_reference_undoes_itself():
    # The oracle of every other test in this folder.
    codes = codes_of(7, (2, 9))
    np.testing.assert_array_equal(unpack_reference(pack_reference(codes, 7), 7, 9), codes)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
def test_unpacking_compiles_to_loops_without_wide_copies(bits):
    # Codes in 32 bits would be four times the memory of the result.
    length = 1 << 16
    packed = jax.ShapeDtypeStruct((16, packed_length(length, bits)), jnp.uint8)
    compiled = jax.jit(lambda p: unpack_bits(p, bits, length)).lower(packed).compile()
    stats = compiled.memory_analysis()
    assert stats.temp_size_in_bytes <= 2 * 16 * length
    assert "gather" not in compiled.as_text()


def test_calls_do_not_recompile():
    for length in (64, 65):
        packed = pack_bits(jnp.zeros(length, jnp.uint8), 3)
        unpack_bits(packed, 3, length)
    before = bits_lib._pack_jit._cache_size(), bits_lib._unpack_jit._cache_size()
    for length in (64, 65):
        packed = pack_bits(jnp.ones(length, jnp.uint8), 3)
        unpack_bits(packed, 3, length)
    assert before == (bits_lib._pack_jit._cache_size(), bits_lib._unpack_jit._cache_size())
