"""Learned soft thresholds against the paper's formulas in float64 and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcomp
from jaxcomp.arrays import SparseArray
from jaxcomp.prune.training.soft_threshold import soft_threshold
from tests import methods


def by_hand(weight, s):
    weight = np.asarray(weight, np.float64)
    threshold = 1 / (1 + np.exp(-np.float64(s)))
    return np.sign(weight) * np.maximum(np.abs(weight) - threshold, 0)


def bits(x):
    x = np.asarray(x)
    return x.view({2: np.uint16, 4: np.uint32}[x.dtype.itemsize])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_forward_pass_and_the_packed_leaf(dtype):
    method, params = soft_threshold(1e-3, initial=-1.0), methods.params(dtype=dtype)
    params["first"]["kernel"] = (
        params["first"]["kernel"].at[0, :3].set(jnp.array([0.0, -0.0, 9.0], dtype))
    )
    state = method.init(params)
    seen = jax.jit(method.apply)(params, state)
    packed = method.pack(params, state)
    for layer in ("first", "second"):
        got = np.asarray(seen[layer]["kernel"])
        exact = by_hand(params[layer]["kernel"], -1.0)
        eps = float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(got.astype(np.float64), exact, rtol=eps, atol=1e-7)
        np.testing.assert_array_equal(got == 0, exact == 0)
        assert 0 < np.sum(exact == 0) < exact.size
        # Bit for bit, the sign of zero included.
        leaf = packed[layer]["kernel"]
        assert isinstance(leaf, SparseArray)
        assert leaf.values.size == np.sum(exact != 0)
        np.testing.assert_array_equal(bits(leaf.decode()), bits(got))
        assert packed[layer]["bias"] is params[layer]["bias"]


def test_a_leaf_without_zeros_is_shipped_shrunk():
    method, params = soft_threshold(0.0, initial=-3.0), {"kernel": jnp.full((2, 2), 2.0)}
    packed = method.pack(params, method.init(params))["kernel"]
    assert isinstance(packed, jax.Array)
    np.testing.assert_allclose(packed, by_hand(params["kernel"], -3.0), rtol=1e-6)


def test_gradients_equal_finite_differences_of_loss_plus_decay():
    """The gradient of ``s`` is that of the loss and of ``decay / 2 * s**2``, to float64."""
    decay, eps = 0.3, 1e-6
    with jax.enable_x64():
        weight = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4)))
        target = jnp.asarray(np.random.default_rng(1).normal(size=(5, 4)))
        method, params = soft_threshold(decay), {"kernel": weight}
        state = method.init(params)

        def loss(weight, s):
            state_ = state._replace(learned={"kernel": s})
            return jnp.sum(jnp.sin(method.apply({"kernel": weight}, state_)["kernel"] * target))

        s = jnp.asarray(-0.7, jnp.float64)
        got_weight, got_s = jax.grad(loss, argnums=(0, 1))(weight, s)
        whole = lambda weight, s: (
            np.sum(np.sin(by_hand(weight, s) * np.asarray(target))) + (0.5 * decay * float(s) ** 2)
        )
        slope = (whole(weight, s + eps) - whole(weight, s - eps)) / (2 * eps)
        np.testing.assert_allclose(got_s, slope, rtol=1e-7)
        for index in np.ndindex(5, 4):
            step = np.zeros((5, 4))
            step[index] = eps
            slope = (whole(weight + step, s) - whole(weight - step, s)) / (2 * eps)
            np.testing.assert_allclose(got_weight[index], slope, rtol=1e-6, atol=1e-8)
        assert np.sum(np.asarray(got_weight) == 0) == np.sum(by_hand(weight, s) == 0) > 0


def test_a_weight_below_the_threshold_waits_and_comes_back():
    method, params = soft_threshold(0.0, initial=0.0), {"kernel": jnp.array([[0.4, 2.0]])}
    state = method.init(params)
    loss = lambda p, s: jnp.sum(method.apply(p, state._replace(learned={"kernel": s}))["kernel"])
    np.testing.assert_array_equal(
        jax.grad(loss)(params, jnp.float32(0.0))["kernel"], jnp.array([[0.0, 1.0]])
    )
    np.testing.assert_array_equal(
        jax.grad(loss)(params, jnp.float32(-1.0))["kernel"], jnp.array([[1.0, 1.0]])
    )


def test_decay_decides_how_sparse_it_becomes():
    x, y = methods.batch()
    sparsities = []
    for decay in (0.0, 0.03, 0.3):
        tx = jaxcomp.wrap_optimizer(optax.sgd(0.3), soft_threshold(decay, initial=-6.0))

        @jax.jit
        def train(params, opt_state, tx=tx):
            def body(carry, _):
                params, opt_state = carry
                loss = lambda p: methods.loss(jaxcomp.compressed(p, opt_state), x, y)
                updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
                return (optax.apply_updates(params, updates), opt_state), None

            return jax.lax.scan(body, (params, opt_state), None, length=300)[0]

        params, opt_state = train(methods.params(), tx.init(methods.params()))
        seen = jaxcomp.compressed(params, opt_state)
        kernels = [seen[layer]["kernel"] for layer in seen]
        sparsities.append(sum(float(jnp.sum(k == 0)) for k in kernels) / 80)
    assert sparsities[0] < sparsities[1] < sparsities[2], sparsities
    assert sparsities[2] > 0.5, sparsities


def test_second_derivatives_pass_through_compressed():
    """The user's Hessian-vector product is that at the effective weights."""
    method, params = soft_threshold(0.1, initial=-2.0), methods.params()
    opt_state = jaxcomp.wrap_optimizer(optax.sgd(0.1), method).init(params)
    x, y = methods.batch()
    seen = method.apply(params, opt_state.compression)
    along = jax.tree.map(jnp.ones_like, params)
    through = jax.grad(lambda p: methods.loss(jaxcomp.compressed(p, opt_state), x, y))
    plain = jax.grad(lambda p: methods.loss(p, x, y))
    got = jax.jvp(through, (params,), (along,))[1]
    expected = jax.jvp(plain, (seen,), (along,))[1]
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((-1.0,), "decay"), ((float("nan"),), "decay"), ((0.1, float("-inf")), "initial")],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        soft_threshold(*arguments)
