"""Proximal steps against their definition, scikit-learn's lasso and optimality conditions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from sklearn.linear_model import Lasso

import jaxcomp
from jaxcomp import prune
from jaxcomp.prune import penalties, proximal
from jaxcomp.prune.structures import NM, Block, Channel
from jaxcomp.prune.training.movement import movement

floats = st.floats(-4, 4, width=32)


def land(tx, params, updates=None):
    """Where one step of a transformation takes the weights."""
    updates = jax.tree.map(jnp.zeros_like, params) if updates is None else updates
    updates, _ = tx.update(updates, tx.init(params), params)
    return optax.apply_updates(params, updates)


@given(
    st.lists(floats, min_size=4, max_size=4),
    st.lists(floats, min_size=4, max_size=4),
    st.lists(floats, min_size=4, max_size=4),
    st.sampled_from([0.0, 0.1, 1.0, 2.5]),
    st.sampled_from(["l1", "l2", "group_lasso"]),
)
def test_no_other_point_is_better_by_the_definition(weight, move, other, step, kind):
    """A proximal operator minimizes half the squared distance plus the penalty."""
    weight, move, other = (np.reshape(np.float32(x), (2, 2)) for x in (weight, move, other))
    extra = (Channel(-1),) if kind == "group_lasso" else ()
    tx = getattr(proximal, kind)(step, 1.0, *extra)
    got = land(tx, {"kernel": jnp.asarray(weight)}, {"kernel": jnp.asarray(move)})["kernel"]
    reached = weight.astype(np.float64) + move

    def objective(x):
        x = np.asarray(x, np.float64)
        penalty = {
            "l1": np.abs(x).sum(),
            "l2": np.square(x).sum(),
            "group_lasso": np.sqrt(2) * np.linalg.norm(x, axis=0).sum(),
        }[kind]
        return 0.5 * np.square(x - reached).sum() + step * penalty

    for candidate in (other, reached, np.zeros((2, 2)), got + 1e-2 * other):
        assert objective(got) <= objective(candidate) + 1e-5


@pytest.mark.parametrize(
    ("weight_dtype", "move_dtype", "jit"),
    [
        (jnp.float32, jnp.float32, True),
        (jnp.float32, jnp.bfloat16, True),
        (jnp.bfloat16, jnp.bfloat16, False),
        (jnp.bfloat16, jnp.bfloat16, True),
        (jnp.bfloat16, jnp.float32, True),
        (jnp.float16, jnp.float32, True),
    ],
)
def test_zeros_are_exact_in_every_precision(weight_dtype, move_dtype, jit):
    keys = jax.random.split(jax.random.key(0), 2)
    params = {"kernel": jax.random.normal(keys[0], (40, 30)).astype(weight_dtype)}
    moves = {"kernel": jax.random.normal(keys[1], (40, 30)).astype(move_dtype)}
    reached = np.asarray(params["kernel"], np.float64) + np.asarray(moves["kernel"], np.float64)
    single, unit = proximal.l1(2.0, 0.4), proximal.group_lasso(1.0, 1.4, Channel(-1))
    step = lambda params, moves: [land(tx, params, moves)["kernel"] for tx in (single, unit)]
    singles, grouped = (jax.jit(step) if jit else step)(params, moves)
    assert singles.dtype == grouped.dtype == weight_dtype
    rms = np.broadcast_to(np.sqrt(np.square(reached).mean(axis=0)), reached.shape)
    # Rounded once: from the float64 form to the weight's own precision.
    eps = float(jnp.finfo(weight_dtype).eps)
    for got, exact in (
        (singles, np.sign(reached) * np.maximum(np.abs(reached) - 0.8, 0)),
        (grouped, reached * np.maximum(1 - 1.4 / rms, 0)),
    ):
        np.testing.assert_array_equal(np.asarray(got) == 0, exact == 0)
        np.testing.assert_allclose(np.asarray(got, np.float64), exact, rtol=eps, atol=1e-6)
        assert 0 < np.sum(exact == 0) < exact.size


def regression(seed=0, samples=60, features=12, noise=0.1):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(samples, features)).astype(np.float32)
    truth = np.where(np.arange(features) % 3 == 0, rng.normal(size=features) * 2, 0)
    y = (x @ truth + noise * rng.normal(size=samples)).astype(np.float32)
    return x, y


def descend(loss, params, tx, steps):
    """Proximal gradient descent."""

    @jax.jit
    def run(params, state):
        def body(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(body, (params, state), None, length=steps)[0]

    return run(params, tx.init(params))


def test_ista_finds_the_lasso_solution_of_scikit_learn():
    x, y = regression()
    strength = 0.2
    # scikit-learn's objective: half the mean squared error plus alpha times the l1 norm.
    loss = lambda p: 0.5 * jnp.mean((x @ p["kernel"][:, 0] - y) ** 2)
    rate = float(1 / np.linalg.eigvalsh(x.T @ x / len(x))[-1])
    tx = optax.chain(optax.sgd(rate), proximal.l1(strength, rate))
    params, _ = descend(loss, {"kernel": jnp.zeros((12, 1))}, tx, 400)
    expected = Lasso(alpha=strength, fit_intercept=False, tol=1e-12, max_iter=100_000)
    expected = expected.fit(x.astype(np.float64), y.astype(np.float64)).coef_
    np.testing.assert_allclose(params["kernel"][:, 0], expected, atol=2e-5)
    np.testing.assert_array_equal(params["kernel"][:, 0] == 0, expected == 0)
    assert 4 <= np.sum(expected == 0) < 12


def test_group_lasso_meets_its_optimality_conditions():
    x, y = regression(1, features=12)
    targets = np.stack([y, -2 * y, 0.1 * y], axis=1)
    strength = 0.6
    loss = lambda p: 0.5 * jnp.sum((x @ p["kernel"] - targets) ** 2) / len(x)
    rate = float(1 / np.linalg.eigvalsh(x.T @ x / len(x))[-1])
    tx = optax.chain(optax.sgd(rate), proximal.group_lasso(strength, rate, Channel(0)))
    params, _ = descend(loss, {"kernel": jnp.ones((12, 3))}, tx, 600)
    weight = np.asarray(params["kernel"], np.float64)
    gradient = x.T.astype(np.float64) @ (x @ weight - targets) / len(x)
    gone = 0
    for row, slope in zip(weight, gradient, strict=True):
        limit = strength * np.sqrt(3)
        if np.any(row):
            np.testing.assert_allclose(slope, -limit * row / np.linalg.norm(row), atol=5e-5)
        else:
            assert np.linalg.norm(slope) <= limit
            gone += 1
    assert 4 <= gone < 12


def test_l2_finds_the_ridge_solution():
    x, y = regression(2)
    strength = 0.3
    loss = lambda p: 0.5 * jnp.mean((x @ p["kernel"][:, 0] - y) ** 2)
    rate = float(1 / np.linalg.eigvalsh(x.T @ x / len(x))[-1])
    tx = optax.chain(optax.sgd(rate), proximal.l2(strength, rate))
    params, _ = descend(loss, {"kernel": jnp.zeros((12, 1))}, tx, 200)
    x, y = x.astype(np.float64), y.astype(np.float64)
    gram = x.T @ x / len(x) + 2 * strength * np.eye(12)
    np.testing.assert_allclose(
        params["kernel"][:, 0], np.linalg.solve(gram, x.T @ y / len(x)), atol=1e-5
    )
    # The same minimum as of the loss with the penalty of the same name and strength in it.
    whole = lambda p: loss(p) + strength * penalties.l2(p)
    np.testing.assert_allclose(jax.grad(whole)(params)["kernel"], 0, atol=2e-5)


def test_a_schedule_is_followed_with_a_count_of_its_own():
    rates = optax.linear_schedule(0.4, 0.0, 4)
    tx = proximal.l1(1.0, rates)
    params, state = descend(lambda p: 0.0 * jnp.sum(p["k"]), {"k": jnp.full((1, 1), 5.0)}, tx, 6)
    np.testing.assert_allclose(params["k"], 5.0 - (0.4 + 0.3 + 0.2 + 0.1), rtol=1e-6)
    assert state.step == 6


def test_only_weights_are_touched():
    params = {"kernel": jnp.full((2, 2), 0.1), "bias": jnp.full(2, 0.1)}
    assert jnp.all(land(proximal.l1(1.0, 1.0), params)["kernel"] == 0)
    assert jnp.all(land(proximal.l1(1.0, 1.0), params)["bias"] == params["bias"])
    only_bias = proximal.l1(1.0, 1.0, where=lambda path, leaf: path == "bias")
    assert jnp.all(land(only_bias, params)["bias"] == 0)
    assert jnp.all(land(only_bias, params)["kernel"] == params["kernel"])


def test_inside_a_wrapped_optimizer_only_the_weight_shrinks_not_what_is_learned():
    method = movement(prune.cubic(0.5, 0, 0))
    shrink = proximal.group_lasso(0.1, 1.0, {"a/kernel": Channel(-1)})
    tx = jaxcomp.wrap_optimizer(optax.chain(optax.sgd(0.0), shrink), method)
    params = {"a": {"kernel": jnp.full((3, 2), 0.05)}, "b": {"kernel": jnp.full((3, 2), 0.5)}}
    opt_state = tx.init(params)
    scores = {path: jnp.full((3, 2), 0.05) for path in ("a/kernel", "b/kernel")}
    opt_state = opt_state.replace(compression=opt_state.compression._replace(learned=scores))
    updates, opt_state = tx.update(jax.tree.map(jnp.zeros_like, params), opt_state, params)
    params = optax.apply_updates(params, updates)
    assert jnp.all(params["a"]["kernel"] == 0)
    np.testing.assert_allclose(params["b"]["kernel"], 0.4, rtol=1e-6)
    for path, leaf in opt_state.compression.learned.items():
        np.testing.assert_array_equal(leaf, scores[path])


@pytest.mark.parametrize("structure", [Channel(-1), Channel(0), Block((2, 2))], ids=str)
def test_weights_on_explicit_mesh_axes_stay_where_they_are(structure):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    params = {"kernel": jax.random.normal(jax.random.key(0), (6, 8))}
    tx = optax.chain(proximal.l1(0.1, 1.0), proximal.group_lasso(0.8, 1.0, structure))
    step = jax.jit(lambda p: (land(tx, p), penalties.group_lasso(p, structure)))
    alone, cost = step(params)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, NamedSharding(mesh, PartitionSpec(None, "model")))
        got, placed_cost = step(placed)
    assert got["kernel"].sharding.is_equivalent_to(placed["kernel"].sharding, 2)
    np.testing.assert_allclose(got["kernel"], alone["kernel"], rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(got["kernel"] == 0, alone["kernel"] == 0)
    np.testing.assert_allclose(placed_cost, cost, rtol=1e-6)


def test_bad_arguments_and_trees_are_refused():
    params = {"a": {"kernel": jnp.ones((4, 4))}}
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="strength"):
            proximal.l1(bad, 0.1)
        with pytest.raises(ValueError, match="learning_rate"):
            proximal.l1(0.1, bad)
    with pytest.raises(ValueError, match="needs the weights"):
        proximal.l1(0.1, 0.1).update(params, proximal.l1(0.1, 0.1).init(params))
    with pytest.raises(ValueError, match="a/kernel: NM"):
        proximal.group_lasso(0.1, 0.1, NM(2, 4)).init(params)
    with pytest.raises(ValueError, match=r"a/kernel.*does not tile"):
        proximal.group_lasso(0.1, 0.1, Block((3, 3))).init(params)
    with pytest.raises(ValueError, match="no weight"):
        proximal.l1(0.1, 0.1).init({"bias": jnp.ones(3)})


def test_strength_and_rate_can_be_injected_and_changed_inside_jit():
    tx = optax.inject_hyperparams(proximal.l1, static_args="where")(
        strength=0.5, learning_rate=optax.linear_schedule(1.0, 0.0, 2)
    )
    params, state = {"kernel": jnp.array([[2.0, -2.0]])}, None
    state, update, reached = tx.init(params), jax.jit(tx.update), []
    for strength in (0.5, 1.0):
        state.hyperparams["strength"] = jnp.float32(strength)
        updates, state = update(jax.tree.map(jnp.zeros_like, params), state, params)
        params = optax.apply_updates(params, updates)
        reached.append(params["kernel"].tolist())
    assert reached == [[[1.5, -1.5]], [[1.0, -1.0]]]
