"""Masks of single weights: exact counts, ties, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcomp import prune
from jaxcomp import tree as tree_lib
from jaxcomp.prune import NM, Element, allocation, apply_masks, cubic, gradual, scores
from jaxcomp.prune.masks import renew
from jaxcomp.prune.structures import check_structure
from tests import methods


def reference_mask(values, count):
    """Remove the lowest, the first of equals first."""
    flat = np.asarray(values, np.float64).ravel()
    mask = np.ones(flat.size, bool)
    mask[np.argsort(flat, kind="stable")[:count]] = False
    return mask.reshape(np.shape(values))


values = st.one_of(
    st.floats(0, 10, width=32),
    st.sampled_from([0.0, 0.0, 1.0, 1e-40, 3.4e38]),
)


@settings(max_examples=25)
@given(
    st.lists(values, min_size=24, max_size=24),
    st.floats(0, 0.999),
    st.sampled_from(["layer", "global"]),
)
def test_masks_against_a_stable_sort(data, sparsity, scope):
    data = np.asarray(data, np.float32)
    tree = {
        "one": jnp.asarray(data[:12].reshape(3, 4)),
        "two": jnp.asarray(data[12:].reshape(6, 2)),
    }
    resolved = round(sparsity * 1e7) / 1e7
    count = lambda size: int(np.floor(resolved * size + 0.5))
    if scope == "layer":
        expected = [reference_mask(leaf, count(12)) for leaf in tree.values()]
    else:
        joined = reference_mask(data, count(24))
        expected = [joined[:12].reshape(3, 4), joined[12:].reshape(6, 2)]
    call = lambda: prune.masks(tree, sparsity, allocation=methods.ALLOCATIONS[scope])
    if not all(mask.any() for mask in expected):
        with pytest.raises(ValueError, match="all 12 weights would be removed"):
            call()
        return
    for found, mask in zip(call().values(), expected, strict=True):
        np.testing.assert_array_equal(found, mask)


def test_masks_keep_biases_and_structure():
    params = methods.params()
    masks = prune.masks(jax.tree.map(scores.magnitude, params), 0.9)
    assert jax.tree.structure(masks) == jax.tree.structure(params)
    assert bool(jnp.all(masks["first"]["bias"]))
    assert int(jnp.sum(~masks["first"]["kernel"])) == round(0.9 * 48)
    assert all(leaf.dtype == bool for leaf in jax.tree.leaves(masks))


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 90, float("nan")])
def test_sparsity_outside_its_range(sparsity):
    with pytest.raises(ValueError, match=r"fraction of weights removed, in \[0, 1\)"):
        prune.masks(methods.params(), sparsity)
    with pytest.raises(ValueError, match="final_sparsity"):
        cubic(sparsity, 0, 10)


def test_bad_scores_and_schedules():
    bad = {"layer": {"kernel": jnp.array([[1.0, jnp.nan]])}}
    with pytest.raises(ValueError, match="layer/kernel: 1 of 2 values are NaN"):
        prune.masks(bad, 0.5)
    with pytest.raises(ValueError, match="no weight to compress"):
        prune.masks({}, 0.5)
    with pytest.raises(ValueError, match="every must be at least 1"):
        gradual(scores.magnitude, cubic(0.5, 0, 1), every=0)
    with pytest.raises(TypeError, match="score"):
        gradual("magnitude", cubic(0.5, 0, 1))


def test_a_selection_gives_masks_of_all_its_leaves():
    chosen = tree_lib.Leaves({"norm/scale": jnp.array([3.0, 1.0])})
    found = prune.masks(chosen, 0.5)
    assert isinstance(found, tree_lib.Leaves)
    np.testing.assert_array_equal(found["norm/scale"], [True, False])


def test_masks_inside_jit_and_vmap():
    stack = jax.random.normal(jax.random.key(0), (3, 6, 8))
    one = lambda leaf: prune.masks({"w": leaf}, 0.4)["w"]
    expected = np.stack([np.asarray(one(leaf)) for leaf in stack])
    np.testing.assert_array_equal(jax.vmap(jax.jit(one))(stack), expected)


def test_apply_masks_zeroes_what_is_not_kept_and_nothing_else():
    params = methods.params(dtype=jnp.bfloat16)
    masks = prune.masks(jax.tree.map(scores.magnitude, params), 0.5)
    pruned = apply_masks(params, masks)
    for name in params:
        kept = np.asarray(masks[name]["kernel"])
        np.testing.assert_array_equal(
            np.asarray(pruned[name]["kernel"]), np.where(kept, params[name]["kernel"], 0)
        )
        assert pruned[name]["kernel"].dtype == jnp.bfloat16
    part = tree_lib.Leaves({"first/kernel": masks["first"]["kernel"]})
    assert apply_masks(params, part)["second"]["kernel"] is params["second"]["kernel"]


def test_what_is_no_array_needs_no_mask():
    """As in a partitioned Equinox module: its functions are None in the parameters."""
    params = {"kernel": jnp.ones((2, 2)), "activation": None}
    masks = prune.masks(params, 0.5)
    assert masks["activation"] is None
    pruned = apply_masks(params, masks)
    assert pruned["activation"] is None
    assert int(jnp.sum(pruned["kernel"])) == 2
    with pytest.raises(TypeError, match="masks is None: pass what"):
        apply_masks(params, None)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda m: m["first"].update(kernel=None), TypeError, "first/kernel: the mask is None"),
        (lambda m: m["first"].update(kernel=jnp.ones((6, 8))), TypeError, "first/kernel: .*bool"),
        (
            lambda m: m["first"].update(kernel=jnp.ones((8, 6), bool)),
            ValueError,
            r"first/kernel: a mask of shape \(8, 6\) does not fit weights of \(6, 8\)",
        ),
        (lambda m: m.pop("second"), ValueError, "second/bias: no mask for this leaf"),
        (
            lambda m: m.update(secnod=m.pop("second")),
            ValueError,
            "secnod/bias: a mask, but params have no such leaf; nearest: second/bias",
        ),
    ],
)
def test_masks_that_do_not_belong_to_the_weights(change, error, words):
    params = methods.params()
    masks = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), params)
    change(masks)
    with pytest.raises(error, match=words):
        apply_masks(params, masks)


def test_a_sparsity_is_needed_and_must_fit_the_runs():
    kernels = {"a": jnp.ones((4, 4)), "c": jnp.ones((4, 4))}
    with pytest.raises(ValueError, match=r"a: Element.* needs a sparsity"):
        prune.masks(kernels)
    with pytest.raises(ValueError, match=r"c: Element.* needs a sparsity"):
        prune.masks(kernels, structure={"a": NM(2, 4)})
    with pytest.raises(ValueError, match=r"a: NM.* removes at most 0.5, and sparsity is 0.75"):
        prune.masks(kernels, 0.75, NM(2, 4))
    quarter = prune.masks(kernels, 0.25, NM(1, 4))
    assert all(int(jnp.sum(~mask)) == 4 for mask in quarter.values())
    with pytest.raises(TypeError, match="a: 'NM' is no structure"):
        check_structure("a", "NM", (4, 4))


@settings(max_examples=20)
@given(st.integers(2, 9), st.integers(1, 6), st.floats(0, 0.9))
def test_each_group_loses_its_own_count_rounded_once(size, groups, sparsity):
    resolved = round(float(np.float32(sparsity)) * 1e7) / 1e7
    count = int(np.floor(resolved * size + 0.5))
    found = renew(
        {"w": jnp.ones((size, groups))}, sparsity, {"w": Element(within=-1)}, allocation.uniform
    )
    np.testing.assert_array_equal(np.sum(~np.asarray(found["w"]), axis=0), count)


def test_a_group_of_many_is_counted_once():
    """0.494 of 100 is 49; of 200 it is 99, of which each of two groups would have half."""
    found = prune.masks({"w": jnp.ones((100, 2))}, 0.494, Element(within=-1))
    np.testing.assert_array_equal(np.sum(~np.asarray(found["w"]), axis=0), [49, 49])


def test_fixed_sparsities_hold_for_runs_too():
    kernels = {"a": jnp.ones((8, 4)), "c": jnp.ones((8, 4))}
    found = prune.masks(kernels, structure=NM(2, 4), allocation=allocation.fixed({"a": 0.25}))
    assert int(jnp.sum(~found["a"])) == 8
    assert bool(jnp.all(found["c"]))
    with pytest.raises(ValueError, match=r"a: NM.* removes at most 0.5, and its allocation asks"):
        prune.masks(kernels, structure=NM(2, 4), allocation=allocation.fixed({"a": 0.75}))


@pytest.mark.parametrize(
    ("end", "options", "words"),
    [
        (0.9, {"structure": Element(within=-1)}, "kernel: all 4 units of each group would be"),
        (0.9, {"structure": NM(2, 4)}, r"kernel: NM.* removes at most 0.5, and sparsity is 0.9"),
        (1.5, {"allocation": allocation.global_threshold}, "ends with a sparsity of 1.5"),
        (float("nan"), {}, "ends with a sparsity of nan"),
    ],
)
def test_a_schedule_that_ends_where_it_cannot_be_is_refused(end, options, words):
    method = gradual(scores.magnitude, lambda step: end, **options)
    with pytest.raises(ValueError, match=words):
        method.init({"kernel": jnp.ones((4, 8))})
