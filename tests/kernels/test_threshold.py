import re
from functools import partial

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxcomp.kernels import threshold
from jaxcomp.kernels.threshold import (
    magnitude_bits,
    removal_count,
    removal_count_exact,
    smallest_masks,
    sortable_bits,
)

NARROW = [
    np.float16,
    ml_dtypes.bfloat16,
    ml_dtypes.float8_e4m3fn,
    ml_dtypes.float8_e5m2,
]


def reference(arrays, count):
    """Masks from a stable argsort of everything, in order of arrays and positions."""
    flat = np.concatenate([np.asarray(array).ravel() for array in arrays])
    kept = np.ones(flat.size, bool)
    kept[np.argsort(flat, kind="stable")[:count]] = False
    ends = np.cumsum([array.size for array in arrays])[:-1]
    parts = np.split(kept, ends)
    return [part.reshape(array.shape) for part, array in zip(parts, arrays, strict=True)]


def check(arrays, count, key=None, sorted_by=None):
    got = smallest_masks([jnp.asarray(array) for array in arrays], count, key=key)
    want = reference([sorted_by(array) if sorted_by else array for array in arrays], count)
    assert len(got) == len(want)
    for mask, expected in zip(got, want, strict=True):
        assert mask.dtype == bool
        np.testing.assert_array_equal(mask, expected)
    assert sum(int((~mask).sum()) for mask in got) == count


# Keys


def ordered(x):
    """Float64 stand-ins with numpy's order: NaN last, both zeros equal."""
    with np.errstate(invalid="ignore"):
        return np.asarray(x).astype(np.float64)


def assert_same_order(keys, x):
    keys, x = np.asarray(keys).astype(np.uint64), ordered(x)
    nan = np.isnan(x)
    assert np.all(keys[nan] == 0xFFFFFFFF)
    assert np.all(keys[~nan] < 0xFFFFFFFF)
    place = np.argsort(x, kind="stable")
    place = place[~nan[place]]
    x, keys = x[place], keys[place]
    np.testing.assert_array_equal(x[:-1] < x[1:], keys[:-1] < keys[1:])
    np.testing.assert_array_equal(x[:-1] == x[1:], keys[:-1] == keys[1:])


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("wrap", [jax.jit, lambda f: f])
def test_sortable_bits_orders_every_value_of_narrow_floats(dtype, wrap):
    width = np.dtype(dtype).itemsize * 8
    x = np.arange(2**width).astype(f"u{width // 8}").view(dtype)
    assert_same_order(wrap(sortable_bits)(jnp.asarray(x)), x)


@given(
    hnp.arrays(
        np.float32,
        st.sampled_from([0, 1, 50]),
        elements=st.floats(width=32, allow_subnormal=True),
    )
)
def test_sortable_bits_orders_float32(x):
    assert_same_order(sortable_bits(jnp.asarray(x)), x)
    magnitudes = np.asarray(magnitude_bits(jnp.asarray(x)))
    through_abs = np.asarray(sortable_bits(jnp.asarray(np.abs(x))))
    np.testing.assert_array_equal(
        np.argsort(magnitudes, kind="stable"), np.argsort(through_abs, kind="stable")
    )
    np.testing.assert_array_equal(
        magnitudes[:, None] == magnitudes, through_abs[:, None] == through_abs
    )


def test_sortable_bits_of_special_values():
    x = np.array([0xFFC00001, 0x7F800001, 0x7FC00000], np.uint32).view(np.float32)  # all NaN
    assert set(np.asarray(sortable_bits(jnp.asarray(x)))) == {0xFFFFFFFF}
    assert len(set(np.asarray(magnitude_bits(jnp.asarray(x))))) == 1
    assert sortable_bits(jnp.float32(-0.0)) == sortable_bits(jnp.float32(0.0))
    tiny = jnp.array([-1e-45, 0.0, 1e-45], jnp.float32)
    assert np.all(np.diff(np.asarray(sortable_bits(tiny)).astype(np.int64)) == 1)


@pytest.mark.parametrize("function", [sortable_bits, magnitude_bits])
def test_float64_is_refused_with_the_remedy(function):
    with jax.enable_x64(True), pytest.raises(TypeError, match=r"float64.*astype\(jnp.float32\)"):
        function(jnp.ones(3, jnp.float64))


# Counts


@given(
    st.one_of(
        st.integers(0, 10**7 - 1).map(lambda steps: steps / 1e7),
        st.floats(0, 1, exclude_max=True),
    ),
    st.lists(st.integers(0, 2**32 - 1), min_size=5, max_size=5),
)
@example(0.9, [25_000_000, 2**32 - 1, 0, 1, 10**7, 429 * 10**7])
@example(0.9999999, [2**32 - 1, 4_294_000_000, 9_999_999])
@example(0.99999999, [2**32 - 1])  # Rounds to 1 in float32.
@example(5e-8, [2**32 - 1])
@example(0.5, [1, 3, 2**31 + 1])
@example(1e-45, [2**32 - 1])
def test_removal_count_matches_its_twin(sparsity, sizes):
    want = [removal_count_exact(sparsity, size) for size in sizes]
    sizes = tuple(sizes)
    assert removal_count(sparsity, sizes).tolist() == want
    # Called as traced code is, without a compilation for every tuple of sizes.
    traced = jax.vmap(lambda s: removal_count(s, sizes))(jnp.float32(sparsity)[None])[0]
    assert traced.dtype == jnp.uint32
    assert traced.tolist() == want


@given(st.integers(0, 10**7 - 1), st.integers(0, 2**32 - 1))
def test_removal_count_is_the_decimal_one_on_its_grid(steps, size):
    half_up = (2 * steps * size + 10**7) // (2 * 10**7)
    assert removal_count_exact(steps / 10**7, size) == half_up
    assert removal_count_exact(float(np.float32(steps / 10**7)), size) == half_up


def test_removal_count_of_a_float32_is_what_was_meant():
    count = jax.jit(lambda s: removal_count(s, (25_000_000,)))
    assert count(jnp.float32(0.9)).tolist() == [22_500_000]
    assert count(jnp.bfloat16(0.5)).tolist() == [12_500_000]
    assert int(np.float32(0.9) * np.float32(25e6)) != int(25e6 * float(np.float32(0.9)))


def test_removal_count_of_nothing_is_empty():
    assert removal_count(0.5, ()).shape == (0,)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, np.nan, np.inf])
def test_known_sparsity_outside_its_range_is_refused(sparsity):
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        removal_count(sparsity, (10,))
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        removal_count(jnp.float32(sparsity), (10,))
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        removal_count_exact(sparsity, 10)


def test_traced_sparsity_is_clipped():
    count = jax.jit(lambda s: removal_count(s, (10**8,)))
    values = [-0.1, -np.inf, np.nan, 1.0, 2.0, np.inf]
    assert [int(count(jnp.float32(v))[0]) for v in values] == [0, 0, 0] + 3 * [99_999_990]


@pytest.mark.parametrize("size", [-1, 2**32])
def test_sizes_beyond_32_bits_are_refused(size):
    with pytest.raises(ValueError, match=str(size)):
        removal_count(0.5, (size,))
    with pytest.raises(ValueError, match=str(size)):
        removal_count_exact(0.5, size)


def test_removal_count_under_vmap():
    sparsities = np.linspace(0, 0.999, 7, dtype=np.float32)
    got = jax.vmap(lambda s: removal_count(s, (10, 2**32 - 1)))(sparsities)
    want = [[removal_count_exact(float(s), n) for n in (10, 2**32 - 1)] for s in sparsities]
    assert got.tolist() == want


# Masks

# Few combinations of shapes, as each is compiled anew.
SCOPES = [
    [(7,)],
    [(2, 3, 4)],
    [(1,), (), (3, 5)],
    [(2, 0, 3), (4, 4)],
    [(0,)],
    [(6, 1), (1, 1, 2, 2), (5,)],
]
# Small pools force ties; the full range reaches both ends of the keys.
words = st.one_of(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0, 1, 2, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1]),
    st.integers(0, 3),
)
key_arrays = st.sampled_from(SCOPES).flatmap(
    lambda scope: st.tuples(*(hnp.arrays(np.uint32, shape, elements=words) for shape in scope))
)


@given(key_arrays, st.floats(0, 1))
def test_masks_match_a_stable_argsort(arrays, fraction):
    check(arrays, round(fraction * sum(array.size for array in arrays)))


def test_every_count_of_small_inputs():
    generator = np.random.default_rng(0)
    arrays = [
        generator.integers(0, 4, (3, 4)).astype(np.uint32),
        np.uint32(2).reshape(()),
        np.full(5, 2**32 - 1, np.uint32),
        np.zeros((0, 3), np.uint32),
        generator.integers(0, 2**32, (2, 2), dtype=np.uint32),
    ]
    for count in range(sum(array.size for array in arrays) + 1):
        check(arrays, count)


@given(
    hnp.arrays(
        np.float32,
        st.sampled_from([(1,), (40,), (3, 2, 5)]),
        elements=st.one_of(
            st.floats(width=32, allow_subnormal=True),
            st.sampled_from([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45]),
        ),
    ),
    st.floats(0, 1),
)
def test_float_keys_match_numpy(x, fraction):
    count = round(fraction * x.size)
    check([x], count, key=sortable_bits, sorted_by=ordered)
    check([x], count, key=magnitude_bits, sorted_by=lambda x: np.abs(ordered(x)))
    # Made beforehand or made in every pass, the keys give the same masks.
    (before,) = smallest_masks([sortable_bits(jnp.asarray(x))], count)
    (anew,) = smallest_masks([jnp.asarray(x)], count, key=sortable_bits)
    np.testing.assert_array_equal(before, anew)


@pytest.mark.parametrize("dtype", NARROW)
def test_narrow_floats(dtype):
    generator = np.random.default_rng(1)
    x = generator.normal(size=(30, 7)).astype(dtype)
    for count in (0, 1, 100, 209, 210):
        check([x], count, key=sortable_bits, sorted_by=ordered)


def test_arrays_of_several_dtypes_share_one_threshold():
    generator = np.random.default_rng(2)
    arrays = [
        generator.normal(size=(4, 5)).astype(np.float32),
        generator.normal(size=(30,)).astype(ml_dtypes.bfloat16),
        generator.normal(size=(2, 2, 2)).astype(np.float16),
    ]
    check(arrays, 31, key=sortable_bits, sorted_by=ordered)


def test_order_of_ties_is_arrays_then_positions():
    masks = smallest_masks([jnp.ones((2, 2), jnp.uint32), jnp.ones(3, jnp.uint32)], 5)
    assert masks[0].tolist() == [[False, False], [False, False]]
    assert masks[1].tolist() == [False, True, True]


def hostile_inputs():
    generator = np.random.default_rng(3)
    n = 20_000
    normal = generator.normal(size=n).astype(np.float32)
    cluster = (2.0**31 * generator.random(n) ** 20).astype(np.uint32)
    return {
        "normal": np.abs(normal).view(np.uint32),
        "zeros": np.where(generator.random(n) < 0.8, 0, np.abs(normal).view(np.uint32)),
        "constant": np.full(n, 123456789),
        "two ends": np.where(generator.random(n) < 0.5, 0, 2**32 - 1),
        "one far": np.r_[np.full(n, 5), 2**32 - 1],
        "one near": np.r_[0, np.full(n, 2**32 - 1)],
        "powers": np.repeat(2.0 ** np.linspace(0, 31.99, n // 50), 50).astype(np.uint32),
        "cluster low": cluster,
        "cluster high": 2**32 - 1 - cluster.astype(np.int64),
        "cantor": sum((generator.integers(0, 2, n) * 3) << (2 * i) for i in range(16)),
        "consecutive": np.arange(n) + 2**31,
        "int8 grid": np.abs(np.round(normal * 30) * np.float32(0.013)).view(np.uint32),
        "uniform": generator.integers(0, 2**32, n),
    }


HOSTILE = hostile_inputs()
PASSES = []


def counted(x):
    """Keys as they are. Programs with this key count their passes, and no other test runs them."""
    return x


def counting_loop(condition, body, start, loop=jax.lax.while_loop):
    number, state = loop(
        lambda s: condition(s[1]), lambda s: (s[0] + 1, body(s[1])), (jnp.int32(0), start)
    )
    jax.debug.callback(lambda n: PASSES.append(int(n)), number)
    return state


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_distributions_are_exact_in_bounded_passes(name, monkeypatch):
    keys = np.asarray(HOSTILE[name]).astype(np.uint32)
    # Seen where a size is compiled for the first time.
    monkeypatch.setattr(threshold.lax, "while_loop", counting_loop)
    PASSES.clear()
    for fraction in (0.0, 1e-3, 0.1, 0.5, 0.8, 0.9, 0.999, 1.0):
        check([keys], round(fraction * keys.size), key=counted)
        jax.effects_barrier()
    assert len(PASSES) == 16
    assert max(PASSES) <= 32
    if name in ("normal", "zeros", "constant", "int8 grid"):
        assert max(PASSES) <= 14


def test_a_million_weights():
    x = np.random.default_rng(4).normal(size=(1000, 1000)).astype(np.float32)
    x[x < -1] = 0
    count = removal_count_exact(0.9, x.size)
    check([x], count, key=magnitude_bits, sorted_by=np.abs)
    check([x], 100_001, key=magnitude_bits, sorted_by=np.abs)  # Cuts through the zeros.


# Transformations


def test_no_recompilation_when_the_count_changes():
    x = jnp.asarray(np.random.default_rng(5).normal(size=(20, 10)), jnp.float32)
    traces = []

    @jax.jit
    def masks(x, count):
        traces.append(1)
        return smallest_masks([x], count, key=magnitude_bits)[0]

    for count in (0, 7, 150, 200):
        assert int((~masks(x, jnp.uint32(count))).sum()) == count
    assert len(traces) == 1
    before = threshold._masks._cache_size()
    for count in (1, 2, 3):
        smallest_masks([x], count, key=magnitude_bits)
    assert threshold._masks._cache_size() <= before + 1


def test_traced_count_is_clipped_to_the_entries():
    x = jnp.arange(6, dtype=jnp.uint32)
    masks = jax.jit(lambda c: smallest_masks([x], c)[0])
    assert not masks(jnp.uint32(99)).any()
    assert masks(jnp.int32(-1)).all()


@pytest.mark.parametrize("axes", [(0, 0), (0, None), (None, 0)])
def test_vmap(axes):
    generator = np.random.default_rng(6)
    keys = generator.integers(0, 5, (4, 6, 5)).astype(np.uint32)
    keys[1] = 7
    keys[2] = generator.integers(0, 2**32, (6, 5), dtype=np.uint32)
    keys = jnp.asarray(keys)
    counts = jnp.array([0, 13, 29, 30], jnp.uint32)
    call = partial(jax.vmap, in_axes=axes)(lambda k, c: smallest_masks([k], c)[0])
    got = call(keys if axes[0] == 0 else keys[0], counts if axes[1] == 0 else counts[1])
    for i in range(4):
        row, count = keys[i if axes[0] == 0 else 0], counts[i if axes[1] == 0 else 1]
        np.testing.assert_array_equal(got[i], reference([row], int(count))[0])


def test_scan_over_a_schedule():
    x = jnp.asarray(np.random.default_rng(7).normal(size=50), jnp.float32)

    def step(x, sparsity):
        (count,) = removal_count(sparsity, (50,))
        (mask,) = smallest_masks([x], count, key=magnitude_bits)
        return x * mask, mask.sum()

    sparsities = jnp.array([0.0, 0.2, 0.5, 0.5, 0.9], jnp.float32)
    final, kept = jax.lax.scan(step, x, sparsities)
    assert kept.tolist() == [50, 40, 25, 25, 5]
    assert int((final != 0).sum()) == 5


def test_gradients_pass_through_the_masked_weights_only():
    x = jnp.array([0.1, -2.0, 3.0])

    def loss(x):
        (mask,) = smallest_masks([x], 1, key=magnitude_bits)
        return jnp.sum(x**2 * mask)

    assert jax.grad(loss)(x).tolist() == [0.0, -4.0, 6.0]


def test_with_64_bit_types_enabled():
    keys = np.random.default_rng(8).integers(0, 9, (5, 5)).astype(np.uint32)
    with jax.enable_x64(True):
        check([keys], 11)
        assert removal_count(0.9, (25_000_000,)).tolist() == [22_500_000]
        assert removal_count(0.9, (25_000_000,)).dtype == jnp.uint32


# Bad input


def test_float_keys_are_refused_with_the_remedy():
    with pytest.raises(TypeError, match=r"keys\[1\].*float32.*key=sortable_bits"):
        smallest_masks([jnp.zeros(2, jnp.uint32), jnp.zeros(3)], 1)
    with pytest.raises(TypeError, match=r"keys\[0\].*float32\[3\]"):
        smallest_masks([jnp.zeros(3)], 1, key=jnp.abs)
    with pytest.raises(TypeError, match="shape"):
        smallest_masks([jnp.zeros(3)], 1, key=lambda x: sortable_bits(x)[:2])


@pytest.mark.parametrize("count", [-1, 4])
def test_known_count_outside_the_entries_is_refused(count):
    with pytest.raises(ValueError, match=f"count is {count}, but there are 3"):
        smallest_masks([jnp.zeros(3, jnp.uint32)], count)


def test_too_many_entries_for_one_scope_are_refused():
    big = jax.ShapeDtypeStruct((2**16, 2**15), jnp.uint32)
    with pytest.raises(ValueError, match="split them into several scopes"):
        jax.eval_shape(lambda a, b: smallest_masks([a, b], 1), big, big)


def test_no_arrays():
    assert smallest_masks([], 0) == ()


# Sharding


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
def mesh(request):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(request.param,) * 2)


def sharded_arrays(mesh):
    generator = np.random.default_rng(9)
    layouts = [
        ((16, 32), PartitionSpec("data", "model")),
        ((8, 6, 4), PartitionSpec(None, "model")),
        ((64,), PartitionSpec(("data", "model"))),
        ((5, 3), PartitionSpec()),
    ]
    arrays = [generator.integers(0, 30, shape).astype(np.float32) - 15 for shape, _ in layouts]
    placed = [
        jax.device_put(array, NamedSharding(mesh, spec))
        for array, (_, spec) in zip(arrays, layouts, strict=True)
    ]
    return arrays, placed


@pytest.mark.parametrize("made", ["before", "anew"])
def test_sharded_masks(mesh, made):
    arrays, placed = sharded_arrays(mesh)

    def masks(arrays, count):
        if made == "anew":
            return smallest_masks(arrays, count, key=sortable_bits)
        return smallest_masks([sortable_bits(array) for array in arrays], count)

    total = sum(array.size for array in arrays)
    with jax.set_mesh(mesh):
        run = jax.jit(masks)
        for count in (0, 1, 333, total - 1, total):
            got = run(placed, jnp.uint32(count))
            for mask, expected, array in zip(got, reference(arrays, count), placed, strict=True):
                np.testing.assert_array_equal(mask, expected)
                assert mask.sharding.is_equivalent_to(array.sharding, mask.ndim)

        def same_type(arrays, count):
            out = masks(arrays, count)
            for mask, array in zip(out, arrays, strict=True):
                assert jax.typeof(mask).sharding == jax.typeof(array).sharding
            return out

        jax.eval_shape(same_type, placed, jnp.uint32(5))


def test_sharded_masks_without_jit_or_a_mesh_in_context(mesh):
    arrays, placed = sharded_arrays(mesh)
    for got, want in zip(
        smallest_masks(placed, 200, key=sortable_bits), reference(arrays, 200), strict=True
    ):
        np.testing.assert_array_equal(got, want)


COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|"
    r"collective-broadcast|ragged-all-to-all)(?:-start)?\("
)


def test_devices_exchange_counts_but_never_entries(mesh):
    shape = (512, 256)
    keys = jax.ShapeDtypeStruct(
        shape, jnp.uint32, sharding=NamedSharding(mesh, PartitionSpec("data", "model"))
    )
    with jax.set_mesh(mesh):
        compiled = jax.jit(lambda k, c: smallest_masks([k], c)).lower(keys, jnp.uint32(1)).compile()
    moved = COLLECTIVE.findall(compiled.as_text())
    assert moved, "no collective found: the pattern no longer reads the compiler's text"
    for result, kind in moved:
        sizes = [
            int(np.prod([int(n) for n in dims.split(",") if n]))
            for dims in re.findall(r"\[([\d,]*)\]", result)
        ]
        # The partial results of a reduction: one scalar for each device.
        assert kind in ("all-reduce", "all-gather"), (kind, result)
        assert max(sizes) <= 8, (kind, result)
    share = shape[0] * shape[1] // 8
    assert compiled.memory_analysis().temp_size_in_bytes < share
