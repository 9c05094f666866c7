"""The gradual method's promises: exact counts, nothing regrown, schedules of all kinds."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcomp
from jaxcomp import prune
from jaxcomp.prune import NM, Block, cubic, gradual, scores
from tests import methods
from tests.prune.test_masks import reference_mask


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


@pytest.mark.parametrize(
    ("structure", "kind"),
    [
        (NM(1, 2), jaxcomp.NMSparseArray),
        (Block((2, 2)), jaxcomp.BlockSparseArray),
        (prune.Channel(-1), jaxcomp.SparseArray),
    ],
    ids=str,
)
def test_pack_takes_the_form_of_the_structure(structure, kind):
    params = methods.params()
    method = gradual(scores.magnitude, cubic(0.5, 0, 0), structure=structure)
    state = method.update(params, method.init(params), None)
    packed = method.pack(params, state)
    seen = method.apply(params, state)
    for name in params:
        assert isinstance(packed[name]["kernel"], kind)
        np.testing.assert_array_equal(packed[name]["kernel"].decode(), seen[name]["kernel"])


def test_a_run_on_its_way_is_packed_as_single_weights():
    params = {"kernel": jax.random.normal(jax.random.key(0), (8, 4))}
    method = gradual(scores.magnitude, cubic(0.25, 0, 0), structure=NM(2, 4))
    state = method.update(params, method.init(params), None)
    assert int(jnp.sum(state.buffers.masks["kernel"])) == 24
    assert isinstance(method.pack(params, state)["kernel"], jaxcomp.SparseArray)


def test_a_score_that_remembers_sees_every_step():
    """Movement pruning by hand: the sum of -w g over all steps, not only those of mask updates."""
    params = methods.params()
    method = gradual(scores.movement(), prune.one_shot(0.5, step=3), every=2)
    state, total = method.init(params), {name: 0.0 for name in params}
    for step in range(4):
        grads = jax.tree.map(lambda w, s=step: jnp.cos((s + 2) * w), params)
        state = method.update(params, state, grads)
        for name in params:
            total[name] = total[name] - params[name]["kernel"] * grads[name]["kernel"]
    for name in params:
        expected = reference_mask(total[name], params[name]["kernel"].size // 2)
        np.testing.assert_array_equal(state.buffers.masks[f"{name}/kernel"], expected)
    with pytest.raises(ValueError, match="gradient"):
        method.update(params, state, None)


def test_a_score_of_another_shape_is_refused_by_path():
    method = gradual(lambda weight, gradient: jnp.sum(weight), cubic(0.5, 0, 0))
    params = methods.params()
    with pytest.raises(ValueError, match=r"first/kernel: the score has shape \(\), its leaf"):
        method.update(params, method.init(params), None)
