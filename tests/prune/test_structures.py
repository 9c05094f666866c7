"""Units of every structure, against loops over positions."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcomp.prune import NM, Block, Channel, Element, Kernel, masks
from jaxcomp.prune.structures import check_structure, pool, spread, units_shape

CASES = [
    (Element(), (4, 6)),
    (Block((2, 3)), (4, 6)),
    (Block((2,)), (3, 4)),
    (Block((1, 2, 2)), (2, 3, 4, 2)),
    (Channel(), (3, 5)),
    (Channel(0), (3, 5)),
    (Channel((0, -1)), (2, 3, 4)),
    (Kernel(), (3, 2, 4, 5)),
    (Kernel((1,)), (4, 3, 2)),
]


def units_of(structure, shape):
    """Flat positions of each unit, in the order of the units."""
    places = np.arange(np.prod(shape)).reshape(shape)
    if isinstance(structure, Element):
        return [[place] for place in places.ravel()]
    if isinstance(structure, Block):
        sizes = (1,) * (len(shape) - len(structure.shape)) + tuple(structure.shape)
        corners = itertools.product(*(range(0, n, s) for n, s in zip(shape, sizes, strict=True)))
        return [
            places[tuple(slice(c, c + s) for c, s in zip(corner, sizes, strict=True))].ravel()
            for corner in corners
        ]
    if isinstance(structure, Channel):
        named = structure.axis if isinstance(structure.axis, tuple) else (structure.axis,)
        apart = sorted(axis % len(shape) for axis in named)
    else:
        window = [axis % len(shape) for axis in structure.axes]
        apart = [axis for axis in range(len(shape)) if axis not in window]
    found = []
    for index in itertools.product(*(range(shape[axis]) for axis in apart)):
        place = [slice(None)] * len(shape)
        for axis, i in zip(apart, index, strict=True):
            place[axis] = i
        found.append(places[tuple(place)].ravel())
    return found


def lowest_gone(scores, groups, count):
    """The first of the lowest groups removed, as a mask."""
    flat = np.asarray(scores, np.float64).ravel()
    means = [flat[np.asarray(group)].mean() for group in groups]
    mask = np.ones(flat.size, bool)
    for unit in np.argsort(means, kind="stable")[:count]:
        mask[np.asarray(groups[unit])] = False
    return mask.reshape(np.shape(scores))


@pytest.mark.parametrize(("structure", "shape"), CASES, ids=str)
def test_pool_and_spread_are_means_and_copies(structure, shape):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    groups = units_of(structure, shape)
    pooled = np.asarray(pool(structure, jnp.asarray(x)))
    assert pooled.shape == units_shape(structure, shape)
    means = [x.ravel()[np.asarray(group)].mean() for group in groups]
    np.testing.assert_allclose(pooled.ravel(), means, rtol=1e-5, atol=1e-6)
    numbers = jnp.arange(len(groups)).reshape(pooled.shape)
    copied = np.asarray(spread(structure, numbers, jnp.asarray(x))).ravel()
    for number, group in enumerate(groups):
        assert np.all(copied[np.asarray(group)] == number)


@settings(max_examples=40)
@given(st.data())
def test_masks_remove_the_lowest_units_the_first_of_equals_first(data):
    structure, shape = data.draw(st.sampled_from(CASES))
    size = int(np.prod(shape))
    # Whole numbers: their sums are exact, and often equal.
    scores = np.array(data.draw(st.lists(st.integers(-3, 3), min_size=size, max_size=size)))
    scores = scores.astype(np.float32).reshape(shape)
    groups = units_of(structure, shape)
    count = data.draw(st.integers(0, len(groups) - 1))
    found = masks({"w": jnp.asarray(scores)}, count / len(groups), structure)["w"]
    np.testing.assert_array_equal(found, lowest_gone(scores, groups, count))


@settings(max_examples=30)
@given(st.data())
def test_runs_and_rows_lose_the_same_number_each(data):
    shape = data.draw(st.sampled_from([(8, 3), (4, 12), (2, 8, 5)]))
    scores = np.array(
        data.draw(
            st.lists(st.integers(-3, 3), min_size=int(np.prod(shape)), max_size=int(np.prod(shape)))
        )
    ).reshape(shape)
    axis = data.draw(st.sampled_from(range(-len(shape), 0)))
    sizes = [m for m in (2, 4, 6, 8) if shape[axis] % m == 0]
    if sizes:
        m = data.draw(st.sampled_from(sizes))
        n = data.draw(st.integers(1, m - 1))
        found = masks({"w": jnp.asarray(scores, jnp.float32)}, structure=NM(n, m, axis))["w"]
        moved = np.moveaxis(scores, axis, -1).reshape(-1, m)
        expected = np.stack([lowest_gone(run, [[i] for i in range(m)], m - n) for run in moved])
        got = np.moveaxis(np.asarray(found), axis, -1).reshape(-1, m)
        np.testing.assert_array_equal(got, expected)
    half = masks({"w": jnp.asarray(scores, jnp.float32)}, 0.5, Element(within=axis))["w"]
    rows = np.moveaxis(scores, axis, 0).reshape(shape[axis], -1)
    count = int(np.floor(0.5 * rows.shape[1] + 0.5))
    expected = np.stack([lowest_gone(row, [[i] for i in range(row.size)], count) for row in rows])
    got = np.moveaxis(np.asarray(half), axis, 0).reshape(shape[axis], -1)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
    ("structure", "shape", "words"),
    [
        (NM(2, 4), (6, 8), r"kernel: NM.*divisible by 4, but axis -2 .* has size 6"),
        (NM(4, 4), (8, 8), "kernel: .*keep 1 to m - 1 of m"),
        (NM(0, 4), (8, 8), "kernel: .*keep 1 to m - 1 of m"),
        (NM(1, 2, axis=2), (8, 8), "kernel: .*axis that shape"),
        (Block((3, 2)), (8, 8), "kernel: .*axis 0 of size 8 is no multiple of 3"),
        (Block((1, 1, 1)), (8, 8), "kernel: .*give 1 to 2 sizes"),
        (Block((0, 2)), (8, 8), "kernel: .*does not fit"),
        (Channel(2), (8, 8), "kernel: .*axis that shape"),
        (Channel((0, -2)), (8, 8), "kernel: .*different axes"),
        (Kernel((0, 4)), (3, 3, 1, 2), "kernel: .*axis that shape"),
        (Element(within=()), (8, 8), "kernel: .*at least one"),
    ],
)
def test_structures_that_do_not_fit_are_refused_by_path(structure, shape, words):
    with pytest.raises(ValueError, match=words):
        check_structure("kernel", structure, shape)
    with pytest.raises(ValueError, match=words):
        masks({"kernel": jnp.ones(shape)}, 0.5, structure)


@pytest.mark.parametrize(
    ("structure", "words"),
    [
        (Block(4), r"kernel: shape of Block.* must be a tuple of whole numbers, not 4"),
        (Block((4.0, 4.0)), r"kernel: shape of Block.* must be a tuple of whole numbers"),
        (Kernel(0), r"kernel: axes of Kernel.* must be a tuple of whole numbers, not 0"),
        (Channel("a"), r"kernel: axis of Channel.* must be whole, not 'a'"),
        (Channel(None), r"kernel: axis of Channel.* must be whole, not None"),
        (Element(within="a"), r"kernel: within of Element.* must be whole, not 'a'"),
        (NM(2.0, 4), r"kernel: n of NM.* must be whole, not 2.0"),
        (NM(2, 4, (0, 1)), r"kernel: axis of NM.* must be whole, not \(0, 1\)"),
    ],
)
def test_structures_of_what_are_no_whole_numbers(structure, words):
    with pytest.raises(TypeError, match=words):
        check_structure("kernel", structure, (8, 8))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_sharded_masks_are_those_of_one_device(kind):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)
    scores = jax.random.normal(jax.random.key(0), (16, 32))
    structures = (NM(2, 4), Block((4, 2)), Channel(0), Element(within=-1))
    with jax.set_mesh(mesh):
        laid = jax.device_put(scores, NamedSharding(mesh, P("data", "model")))
        for structure in structures:
            sparsity = None if isinstance(structure, NM) else 0.5
            got = jax.jit(lambda x, s=structure, f=sparsity: masks({"w": x}, f, s))(laid)["w"]
            expected = masks({"w": np.asarray(scores)}, sparsity, structure)["w"]
            np.testing.assert_array_equal(np.asarray(got), np.asarray(expected))
