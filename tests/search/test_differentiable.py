"""Relaxed choices, and searches by their gradients."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcomp.search import differentiable
from jaxcomp.search.differentiable import darts, decide, gumbel_softmax, logits, probabilities
from jaxcomp.search.spaces import Choice, Integer
from jaxcomp.search.supernets import supernet

SPACE = {"act": Choice(("relu", "gelu", "silu")), "layers": [Choice((8, 16)), 3]}


def test_hard_draws_are_one_hot_with_the_odds_of_the_softmax():
    own = np.array([0.5, -0.3, 1.2], np.float32)
    tiled = jnp.tile(own, (20_000, 1))
    hard = np.asarray(jax.jit(lambda t: gumbel_softmax(tiled, jax.random.key(0), t, True))(0.7))
    assert set(np.unique(hard)) == {0.0, 1.0}
    assert (hard.sum(1) == 1).all()
    odds = np.exp(own) / np.exp(own).sum()
    assert abs(hard.mean(0) - odds).max() < 4 * 0.5 / 20_000**0.5
    soft = np.asarray(gumbel_softmax(tiled, jax.random.key(0), 0.7))
    np.testing.assert_allclose(soft.sum(1), 1, rtol=1e-5)
    np.testing.assert_array_equal(soft.argmax(1), hard.argmax(1))


def test_gradients_are_those_of_finite_differences_and_pass_straight_through():
    with jax.enable_x64(True):
        own, slopes = np.array([0.5, -0.3, 1.2]), np.array([1.0, 2.0, -3.0])
        made = lambda x, hard: jnp.vdot(slopes, gumbel_softmax(x, jax.random.key(1), 0.6, hard))
        exact = jax.grad(made)(own, False)
        steps = 1e-6 * np.eye(3)
        near = [(float(made(own + s, False)) - float(made(own - s, False))) / 2e-6 for s in steps]
        np.testing.assert_allclose(exact, near, rtol=1e-7)
        np.testing.assert_allclose(jax.grad(made)(own, True), exact, rtol=1e-12)


def test_without_noise_and_warm_it_is_the_softmax_cold_it_is_a_decision():
    own = {"a": jnp.array([1.0, 2.0])}
    warm = gumbel_softmax(own, None, 1.0)
    np.testing.assert_allclose(warm["a"], probabilities(own)["a"], rtol=1e-6)
    np.testing.assert_allclose(gumbel_softmax(own, None, 0.01)["a"], [0, 1], atol=1e-6)
    assert float(differentiable.entropy({"a": jnp.array([0.0, 90.0])})) < 1e-6
    ruled_out = {"a": jnp.array([0.0, 0.0, -jnp.inf])}
    np.testing.assert_allclose(differentiable.entropy(ruled_out), np.log(2) / np.log(3), rtol=1e-6)


def test_candidates_are_decided_in_the_structure_of_the_space():
    own = logits(SPACE)
    assert [leaf.shape for leaf in jax.tree.leaves(own)] == [(3,), (2,)]
    own["act"], own["layers"][0] = np.array([0.0, 2.0, 1.0]), np.array([1.0, 0.0])
    assert decide(SPACE, own) == {"act": "gelu", "layers": [8, 3]}
    named = {"act": Choice({"relu": None, "gelu": None})}
    assert decide(named, {"act": np.array([0.0, 1.0])}) == {"act": "gelu"}


@pytest.mark.parametrize(
    ("space", "error", "words"),
    [
        ({"n": Integer(1, 3)}, TypeError, "n: Integer has no logits"),
        ({"a": {"b": Choice(({"c": 1}, 2))}}, TypeError, "a/b: an option is a space"),
        ({"a": Choice({"sgd": {"rate": Choice((1, 2))}})}, TypeError, "a: an option is a space"),
    ],
)
def test_spaces_that_have_no_logits_are_refused(space, error, words):
    with pytest.raises(error, match=words):
        logits(space)


def test_hostile_arguments_are_refused():
    with pytest.raises(ValueError, match=r"act: logits of shape \(2,\), but there are 3 options"):
        decide(SPACE, {"act": np.zeros(2), "layers": [np.zeros(2), None]})
    with pytest.raises(ValueError, match="act: logits are not finite"):
        decide(SPACE, {"act": np.array([0, np.nan, 1]), "layers": [np.zeros(2), None]})
    given = (SPACE, lambda p, w, b: 0.0, optax.sgd(1.0), optax.sgd(1.0))
    with pytest.raises(ValueError, match="layers: there are no logits of it"):
        decide(SPACE, {"act": np.zeros(3)})
    with pytest.raises(ValueError, match="temperature must be above 0"):
        gumbel_softmax(jnp.zeros(3), None, 0.0)
    with pytest.raises(TypeError, match="key must be one PRNG key"):
        gumbel_softmax(jnp.zeros(3), 0, 1.0)
    with pytest.raises(ValueError, match="space: there is nothing to choose"):
        darts({"layers": 3}, *given[1:])
    with pytest.raises(TypeError, match="logit_optimizer must be an optimizer of optax"):
        darts(*given[:3], "adam")
    vector = darts(SPACE, lambda p, w, b: 0.0 * p, *given[2:], penalty=lambda p: p["act"])
    with pytest.raises(TypeError, match=r"penalty must return one number, not an array of \(3,\)"):
        vector.step(vector.init(jnp.ones(()), jax.random.key(0)), 0, 0)
    for wrong in ({"temperature": "hot"}, {"inner_rate": float("nan")}, {"warm_up": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            darts(*given, **wrong)
    with pytest.raises(TypeError, match="loss must be a function"):
        darts(SPACE, None, *given[2:])
    state = darts(*given).init(jnp.ones(()), jax.random.key(0))
    with pytest.raises(TypeError, match="loss must return one floating number"):
        darts(*given).step(state, 0, 0)


def cubic(params, weights, batch):
    """A loss in which the weights' gradient depends on the architecture, and on the weights."""
    x, y = batch
    mixture = weights["f"] @ jnp.stack([params["w"] * x, params["w"] ** 2 * x**2, x**3])
    return jnp.mean((mixture - y) ** 2)


@pytest.mark.parametrize("inner_rate", [None, 0.05], ids=["first order", "second order"])
def test_steps_follow_the_held_out_loss_of_the_weights_now_or_ahead(inner_rate):
    space, rng = {"f": Choice(("linear", "square", "cube"))}, np.random.default_rng(0)
    with jax.enable_x64(True):
        train, held_out = ((rng.normal(size=9), rng.normal(size=9)) for _ in range(2))
        own, w, rate = np.array([0.2, -0.4, 0.1]), 0.7, 0.3
        search = darts(space, cubic, optax.sgd(0.01), optax.sgd(rate), noise=False,
                       inner_rate=inner_rate, temperature=0.8)  # fmt: skip
        state = search.init({"w": jnp.asarray(w)}, jax.random.key(0))
        after, told = jax.jit(search.step)(state._replace(logits={"f": own}), train, held_out)

        def softmax(v):
            return np.exp(v / 0.8) / np.exp(v / 0.8).sum()

        def value(w, mix, batch):
            x, y = batch
            return np.mean((mix @ np.stack([w * x, w**2 * x**2, x**3]) - y) ** 2)

        def slope(w, mix, batch):
            x, y = batch
            error = mix @ np.stack([w * x, w**2 * x**2, x**3]) - y
            return np.mean(2 * error * (mix[0] * x + mix[1] * 2 * w * x**2))

        def upper(v):
            mix = softmax(v)
            ahead = w - (inner_rate or 0.0) * slope(w, mix, train)
            return value(ahead, mix, held_out)

        steps = 1e-6 * np.eye(3)
        near = np.array([(upper(own + s) - upper(own - s)) / 2e-6 for s in steps])
        np.testing.assert_allclose(after.logits["f"], own - rate * near, rtol=1e-8)
        np.testing.assert_allclose(told.held_out, upper(own), rtol=1e-12)
        mix = softmax(np.asarray(after.logits["f"]))
        moved = w - 0.01 * slope(w, mix, train)
        np.testing.assert_allclose(after.params["w"], moved, rtol=1e-10)
        assert int(after.step) == 1


def test_searches_find_what_fits_and_weigh_what_it_costs():
    space = {"f": Choice(("linear", "square", "cube"))}
    x = np.linspace(-1, 1, 16, dtype=np.float32)
    batch = (x, 0.1 * x + x**3)
    runs = {}
    for name, penalty in (("free", None), ("dear", lambda p: 2.0 * p["f"][2])):
        search = darts(space, cubic, optax.sgd(0.1), optax.adam(0.1), hard=True, penalty=penalty,
                       temperature=optax.exponential_decay(2.0, 20, 0.7), warm_up=5)  # fmt: skip
        state = search.init({"w": jnp.ones(())}, jax.random.key(1))
        step = lambda s, _, search=search: search.step(s, batch, batch)
        end, told = jax.jit(lambda s, step=step: jax.lax.scan(step, s, length=80))(state)
        runs[name] = decide(space, end.logits)["f"], told
        assert (np.diff(np.asarray(told.entropy)[:5]) == 0).all()
        assert float(told.entropy[-1]) < 0.9
    assert runs["free"][0] == "cube"
    assert runs["dear"][0] != "cube"
    assert float(runs["dear"][1].penalty[0]) == pytest.approx(2 / 3, rel=1e-5)


def test_supernets_are_searched_under_a_penalty_of_flops():
    def mlp(p, x):
        return x + jax.nn.relu(x @ p["up"]) @ p["down"]

    rng = np.random.default_rng(0)
    params = {"up": rng.normal(size=(4, 8)).astype(np.float32),
              "down": 0.1 * rng.normal(size=(8, 4)).astype(np.float32)}  # fmt: skip
    x = rng.normal(size=(16, 4)).astype(np.float32)
    net = supernet(mlp, params, x, width={"up": (2, 4, 8)}, connections={"block": "down"})
    for choice in itertools.product(range(3), range(2)):
        candidate = {"width": {"up[1]": (2, 4, 8)[choice[0]]},
                     "connections": {"block": bool(choice[1])}}  # fmt: skip
        sure = {"width": {"up[1]": np.eye(3, dtype=np.float32)[choice[0]]},
                "connections": {"block": np.eye(2, dtype=np.float32)[choice[1]]}}  # fmt: skip
        for a, b in zip(jax.tree.leaves(net.mixed(params, sure)),
                        jax.tree.leaves(net.masked(params, candidate)), strict=True):  # fmt: skip
            np.testing.assert_array_equal(a, b)

    def loss(params, weights, batch):
        return jnp.mean((mlp(net.mixed(params, weights), batch[0]) - batch[1]) ** 2)

    flops = lambda p: net.expected_cost(p).flops / net.cost(net.largest).flops
    found = {}
    for name, target in (("needed", mlp(params, x)), ("idle", x)):
        search = darts(net.space, loss, optax.sgd(0.01), optax.adam(0.2), temperature=1.0,
                       penalty=lambda p: 0.05 * flops(p))  # fmt: skip
        state = search.init(params, jax.random.key(0))
        step = lambda s, _, y=target, search=search: search.step(s, (x, y), (x, y))
        end = jax.jit(lambda s, step=step: jax.lax.scan(step, s, length=40)[0])(state)
        found[name] = decide(net.space, end.logits)
    assert found["needed"]["connections"]["block"] is True
    assert found["idle"]["connections"]["block"] is False


def test_expected_cost_has_the_gradient_of_finite_differences():
    def mlp(p, x):
        return jax.nn.relu(x @ p["a"]) @ p["b"] @ p["c"]

    params = {"a": np.ones((3, 4)), "b": np.ones((4, 6)), "c": np.ones((6, 2))}
    net = supernet(mlp, params, np.ones((5, 3)), width={"a": (1, 4), "b": (2, 3, 6)})
    with jax.enable_x64(True):
        own = {"width": {"a[1]": np.array([0.3, -0.1]), "b[1]": np.array([0.2, 0.5, -0.7])}}
        cost = lambda v: net.expected_cost(probabilities(v)).flops
        slopes = jax.grad(cost)(own)
        for name, v in own["width"].items():
            for i in range(len(v)):
                at = lambda e, name=name, i=i: cost({"width": {
                    n: u + e * (np.arange(len(u)) == i) * (n == name)
                    for n, u in own["width"].items()}})  # fmt: skip
                near = (float(at(1e-5)) - float(at(-1e-5))) / 2e-5
                np.testing.assert_allclose(slopes["width"][name][i], near, rtol=1e-7)
