"""LSQ as a method: what it learns, what it shows and what it packs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcomp
from jaxcomp.model.trace import trace
from jaxcomp.quantize import Format, PerChannel, PerGroup, PerTensor
from jaxcomp.quantize.formats import PerBlock
from jaxcomp.quantize.scales import Scales, spread_scales
from jaxcomp.quantize.training.learned_step import learned_step
from jaxcomp.quantize.training.step_gradient import initial_step
from tests.quantize.quantize_reference import same_bits

RNG = np.random.default_rng(0)
KERNEL = jnp.asarray(RNG.normal(size=(8, 6)), jnp.float32)
LAW = [
    Format(1, granularity=PerTensor(), zero=False),
    Format(2, granularity=PerTensor(), scale_dtype="bfloat16"),
    Format(3, granularity=PerBlock((4, 3))),
    Format(4, granularity=PerChannel(-1)),
    Format(8, granularity=PerGroup(4), scale_dtype="float8_e8m0fnu"),
]


def test_shown_is_packed_to_the_bit():
    """Eager, compiled, and decoded; with steps of any size and sign."""
    for dtype in (jnp.float32, jnp.bfloat16):
        params = {"kernel": KERNEL.astype(dtype)}
        methods = [learned_step(format) for format in LAW]
        states = []
        for method in methods:
            state = method.init(params)
            factor = lambda s: s * jnp.asarray(RNG.uniform(-2, 2, s.shape), jnp.float32)
            states.append(state._replace(learned=jax.tree.map(factor, state.learned)))

        @jax.jit
        def shown(params, states, methods=methods):
            return [m.apply(params, s) for m, s in zip(methods, states, strict=True)]

        for method, state, seen in zip(methods, states, shown(params, states), strict=True):
            packed = method.pack(params, state)["kernel"]
            assert isinstance(packed, jaxcomp.QuantizedArray)
            assert bool(jnp.all(packed.scale.astype(jnp.float32) > 0))
            assert same_bits(packed.decode(), seen["kernel"])
            assert same_bits(method.apply(params, state)["kernel"], seen["kernel"])
            assert seen["kernel"].dtype == dtype


@pytest.mark.parametrize("format", LAW, ids=lambda f: f"{f.bits}")
def test_levels_are_those_of_the_format(format):
    """Each weight sits on the level next to it that the format has, in float64."""
    method = learned_step(format)
    packed = method.pack({"kernel": KERNEL}, method.init({"kernel": KERNEL}))["kernel"]
    step = spread_scales(Scales(packed.scale), KERNEL.shape, format).scale
    step = np.asarray(step, np.float64)
    top = 2 ** (format.bits - 1) - 1
    levels = np.arange(-top, top + 1.0) if format.zero else np.array([-1.0, 1.0])
    weights = np.asarray(KERNEL, np.float64)
    distance = np.abs(weights[..., None] - levels * step[..., None])
    got = np.abs(weights - np.asarray(packed.decode(), np.float64))
    np.testing.assert_allclose(got, distance.min(-1), atol=1e-6)


def test_optimizer_is_handed_the_papers_gradient():
    format = Format(3, granularity=PerTensor())
    tx = jaxcomp.wrap_optimizer(optax.sgd(1.0), learned_step(format))
    params = {"kernel": KERNEL}
    opt_state = tx.init(params)
    ct = jnp.asarray(RNG.normal(size=KERNEL.shape), jnp.float32)
    loss = lambda p: jnp.sum(jaxcomp.compressed(p, opt_state)["kernel"] * ct)
    updates, new = jax.jit(tx.update)(jax.grad(loss)(params), opt_state, params)
    w, step = np.asarray(KERNEL, np.float64), 2 * np.abs(np.float64(KERNEL)).mean() / np.sqrt(3)
    ratio = w / step
    slope = np.where(np.abs(ratio) >= 3, 3 * np.sign(ratio), np.rint(ratio) - ratio)
    want = step - np.sum(slope * ct) / np.sqrt(w.size * 3)
    np.testing.assert_allclose(new.compression.learned["kernel"], [[want]], rtol=1e-5)
    np.testing.assert_allclose(updates["kernel"], np.where(np.abs(ratio) < 3, -ct, 0), rtol=1e-6)


def test_steps_begin_at_the_weights_of_that_step():
    method = learned_step(Format(4), begin=2)
    state = method.init({"kernel": KERNEL})
    later = {"kernel": 3 * KERNEL}
    for step in range(4):
        seen = method.apply(later, state)["kernel"]
        assert same_bits(seen, later["kernel"]) == (step < 2)
        if step < 2:
            assert method.pack(later, state) is later
        state = jax.jit(method.update)(later, state, later)
    np.testing.assert_allclose(
        state.learned["kernel"], initial_step(later["kernel"], Format(4)), rtol=1e-6
    )


def test_a_trace_names_the_channels():
    """Stored (output, input): one step an output."""
    params = {"kernel": KERNEL}
    seen = trace(lambda p, x: x @ p["kernel"].T, params, jnp.ones((2, 6)))
    method = learned_step(Format(4), trace=seen)
    assert method.init(params).learned["kernel"].shape == (8, 1)


def test_a_bad_rate_does_not_lose_a_layer():
    """Steps that one update throws far across zero are steps all the same."""
    tx = jaxcomp.wrap_optimizer(optax.sgd(50.0), learned_step(Format(2)))
    params = {"kernel": KERNEL}
    opt_state = tx.init(params)
    for _ in range(3):
        grads = {"kernel": jnp.asarray(RNG.normal(size=KERNEL.shape), jnp.float32)}
        _, opt_state = tx.update(grads, opt_state, params)
    assert bool(jnp.any(opt_state.compression.learned["kernel"] < 0))
    packed = jaxcomp.pack(params, opt_state)["kernel"]
    assert bool(jnp.all(packed.scale > 0))
    assert same_bits(packed.decode(), jaxcomp.compressed(params, opt_state)["kernel"])


def test_what_is_refused():
    from jaxcomp.quantize.formats import GridFormat

    with pytest.raises(ValueError, match="symmetric=True"):
        learned_step(Format(4, symmetric=False))
    with pytest.raises(Exception, match=r"uniform|GridFormat"):
        learned_step(GridFormat("nf4"))
    method = learned_step(Format(4, granularity=PerGroup(3)))
    with pytest.raises(ValueError, match="first/kernel: groups of 3 do not divide"):
        method.init({"first": {"kernel": KERNEL}})
