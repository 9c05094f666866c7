"""Masks at exact counts, schedules, and the gradual method's promises."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxcomp
from jaxcomp import prune
from jaxcomp.prune import cubic, gradual, scores
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
    masks = prune.masks(tree, sparsity, allocation=methods.ALLOCATIONS[scope])
    resolved = round(sparsity * 1e7) / 1e7
    if scope == "layer":
        count = int(np.floor(resolved * 12 + 0.5))
        for name, leaf in tree.items():
            np.testing.assert_array_equal(masks[name], reference_mask(leaf, count))
    else:
        count = int(np.floor(resolved * 24 + 0.5))
        joined = np.concatenate([np.ravel(masks["one"]), np.ravel(masks["two"])])
        np.testing.assert_array_equal(joined, reference_mask(data, count))


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


def test_cubic_is_the_published_formula():
    schedule = cubic(0.9, begin=10, end=110, initial_sparsity=0.2)
    for step in (0, 9, 10, 11, 60, 109, 110, 111, 10**6):
        t = np.clip((step - 10) / 100, 0, 1)
        expected = 0.0 if step < 10 else 0.9 + (0.2 - 0.9) * (1 - t) ** 3
        assert float(schedule(step)) == pytest.approx(expected, abs=1e-6)
        assert float(jax.jit(schedule)(step)) == pytest.approx(expected, abs=1e-6)
    assert float(cubic(0.9, 5, 5)(5)) == pytest.approx(0.9)
    for bad in ((0.9, 5, 4), (0.9, -1, 4)):
        with pytest.raises(ValueError, match="begin"):
            cubic(*bad)
    with pytest.raises(ValueError, match="exchange"):
        cubic(0.3, 0, 10, initial_sparsity=0.5)


def drive(method, steps, params=None, grads=None):
    params = methods.params() if params is None else params
    state = method.init(params)
    for _ in range(steps):
        state = method.update(params, state, grads)
        yield params, state
        params = method.apply(params, state)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_exact_count_at_every_step_and_never_regrown(scope):
    schedule = cubic(0.85, begin=2, end=9)
    removed_before = None
    for step, (params, state) in enumerate(
        drive(gradual(scores.magnitude, schedule, methods.ALLOCATIONS[scope], every=1), 12)
    ):
        removed = {path: np.asarray(~mask) for path, mask in state.buffers.masks.items()}
        sizes = [mask.size for mask in removed.values()]
        resolved = round(float(schedule(step)) * 1e7) / 1e7
        count = lambda n, part=resolved: int(np.floor(part * n + 0.5))
        total = sum(int(mask.sum()) for mask in removed.values())
        assert total == (sum(map(count, sizes)) if scope == "layer" else count(sum(sizes)))
        if removed_before is not None:
            assert all(np.all(removed[p] >= removed_before[p]) for p in removed)
        removed_before = removed
        del params


def test_cadence_and_plateau():
    """Masks move every few steps, and at once where the schedule comes to rest."""
    schedule = cubic(0.8, begin=0, end=13)
    counts = [
        int(sum(jnp.sum(~m) for m in state.buffers.masks.values()))
        for _, state in drive(gradual(scores.magnitude, schedule, every=5), 20)
    ]
    changed = [i for i in range(1, 20) if counts[i] != counts[i - 1]]
    assert changed == [5, 10, 13]
    assert counts[-1] == round(0.8 * 48) + round(0.8 * 32)


def test_any_optax_schedule_and_one_that_falls():
    method = gradual(
        scores.magnitude, optax.piecewise_constant_schedule(0.5, {3: 1.2, 6: 0.5}), every=1
    )
    fractions = [
        float(jnp.mean(~state.buffers.masks["first/kernel"])) for _, state in drive(method, 9)
    ]
    assert fractions[0] == 0.5
    assert max(fractions) == fractions[-1] == pytest.approx(0.6, abs=0.02)


def test_a_score_of_the_gradient():
    def taylor(weight, gradient):
        return jnp.abs(weight * gradient)

    params = methods.params()
    grads = jax.tree.map(lambda w: jnp.cos(9 * w), params)
    method = gradual(taylor, cubic(0.5, 0, 0))
    state = method.update(params, method.init(params), grads)
    for name in ("first", "second"):
        kernel, gradient = params[name]["kernel"], grads[name]["kernel"]
        expected = reference_mask(jnp.abs(kernel * gradient), kernel.size // 2)
        np.testing.assert_array_equal(state.buffers.masks[f"{name}/kernel"], expected)


def test_signed_scores_order_below_zero_too():
    method = gradual(lambda weight, gradient: weight, cubic(0.25, 0, 0))
    params = {"kernel": jnp.array([[-3.0, -1.0, 0.0, 2.0]])}
    state = method.update(params, method.init(params), None)
    np.testing.assert_array_equal(state.buffers.masks["kernel"], [[False, True, True, True]])


def test_ties_and_equal_weights_are_removed_at_the_exact_count():
    for leaf in (jnp.ones((10, 10)), jnp.zeros((10, 10)), jnp.eye(10)):
        method = gradual(scores.magnitude, cubic(0.37, 0, 0))
        params = {"kernel": leaf}
        state = method.update(params, method.init(params), None)
        assert int(jnp.sum(~state.buffers.masks["kernel"])) == 37


def test_a_resumed_schedule_past_its_end_changes_nothing():
    params = methods.params()
    method = gradual(scores.magnitude, cubic(0.5, 0, 3), every=1)
    *_, (_, state) = drive(method, 6)
    later = state._replace(buffers=state.buffers._replace(step=jnp.int32(10**6)))
    again = method.update(params, later, None)
    for path, mask in state.buffers.masks.items():
        np.testing.assert_array_equal(again.buffers.masks[path], mask)
    longer = gradual(scores.magnitude, cubic(0.75, 0, 20), every=1)
    for _ in range(16):
        state = longer.update(params, state, None)
    assert float(jnp.mean(~state.buffers.masks["first/kernel"])) == pytest.approx(0.75)


def test_pack_keeps_dense_what_lost_nothing():
    params = methods.params()
    method = gradual(scores.magnitude, cubic(0.5, begin=5, end=9))
    assert method.pack(params, method.init(params))["first"]["kernel"] is params["first"]["kernel"]
    done = gradual(scores.magnitude, cubic(0.5, 0, 0))
    state = done.update(params, done.init(params), None)
    packed = done.pack(params, state)["first"]["kernel"]
    assert isinstance(packed, jaxcomp.SparseArray)
    assert packed.nbytes == 6 * 1 + 24 * 4
