"""Branches that are left out add nothing, or are refused with what is left of them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.search.supernets import supernet
from tests.model.cutting import difference

X = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)


def weights(*names):
    rng = np.random.default_rng(0)
    return {n: rng.normal(size=4 if n.startswith("b") else (4, 4)).astype(np.float32)
            for n in names}  # fmt: skip


def block(p, x):
    return x + jnp.tanh(x @ p["up"]) @ p["down"] + p["bias"]


@pytest.mark.parametrize(
    ("model", "names", "gone", "words"),
    [
        # The bias joins outside of the branch: zeros in it would be the branch's own business.
        (lambda p, x: x + (jnp.tanh(x @ p["up"]) @ p["down"] + p["bias"]), ("up", "down", "bias"),
         "down", "branch still hands on bias: name it too"),
        (lambda p, x: x + jnp.exp(x @ p["up"]), ("up",), "up", "exp still makes something of"),
        (lambda p, x: x * (1 + x @ p["up"]), ("up",), "up", "hands on a constant of add"),
        (lambda p, x: jax.nn.sigmoid(x @ p["up"]) @ p["down"], ("up", "down"), "up", "logistic"),
        (lambda p, x: x @ p["up"], ("up", "down"), "down", "the outputs do not depend on down"),
        (lambda p, x: x @ p["up"], ("up",), "up", "every output is"),
        (lambda p, x: (x @ p["up"], x @ p["down"]), ("up", "down"), "up", "nothing goes around"),
    ],
    ids=["bias", "exp", "scale", "sigmoid", "unused", "all", "no way around"],
)  # fmt: skip
def test_branches_that_would_not_vanish_are_refused(model, names, gone, words):
    with pytest.raises(ValueError, match=f"connections: branch: .*{words}"):
        supernet(model, weights(*names), X, connections={"branch": gone})


def test_depth_keeps_the_first_branches():
    def model(p, x):
        for i in range(3):
            x = block({n: p[f"{n}{i}"] for n in ("up", "down", "bias")}, x)
        return x @ p["head"]

    params = weights("head", *(f"{n}{i}" for n in ("up", "down", "bias") for i in range(3)))
    stage = [[f"down{i}", f"bias{i}"] for i in range(3)]
    net = supernet(model, params, X, depth={"stage": stage})
    assert net.space["depth"]["stage"].options == (0, 1, 2, 3)
    run = jax.jit(lambda c: model(net.masked(params, c), X))
    x = X
    for depth in range(4):
        np.testing.assert_allclose(run({"depth": {"stage": depth}}), x @ params["head"], rtol=2e-4)
        small = net.extract(params, {"depth": {"stage": depth}})
        left = {k for k, leaf in small.params.items() if leaf is not None}
        assert left == {"head"} | {f"{n}{i}" for n in ("up", "down", "bias") for i in range(depth)}
        if depth < 3:
            x = np.asarray(block({n: params[f"{n}{depth}"] for n in ("up", "down", "bias")}, x))


def test_what_two_branches_share_goes_with_both():
    def model(p, x):
        shared = jnp.tanh(x @ p["shared"])
        return (x + shared @ p["first"] + shared @ p["second"]) @ p["head"]

    params = weights("shared", "first", "second", "head")
    net = supernet(model, params, X, connections={"1": "first", "2": "second"})
    for first in (False, True):
        for second in (False, True):
            candidate = {"connections": {"1": first, "2": second}}
            small = net.extract(params, candidate)
            assert (small.params["shared"] is None) == (not first and not second)
            sure = {"connections": {n: np.array([not on, on], np.float32)
                                    for n, on in candidate["connections"].items()}}  # fmt: skip
            np.testing.assert_allclose(np.array(net.expected_cost(sure)), np.array(small.after))


class Net(nn.Module):
    """With rematerialized blocks, whose batch norms keep statistics."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(6, name="stem")(x)
        for i in range(2):
            x = nn.remat(Block, static_argnums=(2,))(name=f"block{i}")(x, train)
        return nn.Dense(2, name="head")(x)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        norm = lambda name: nn.BatchNorm(use_running_average=not train, momentum=0.9, name=name)
        y = nn.relu(norm("in")(nn.Dense(5, name="up")(x)))
        return x + norm("out")(nn.Dense(6, use_bias=False, name="down")(y))


def test_the_training_function_runs_without_the_branch_too():
    model = Net()
    variables = jax.jit(model.init)(jax.random.key(0), X)
    forward = lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"])
    stage = [f"params/block{i}/out/*" for i in range(2)]
    net = supernet(model.apply, variables, X, depth={"blocks": stage},
                   width={"*up*": (2, 5)}, also=[(forward, (X,))])  # fmt: skip
    candidate = {"depth": {"blocks": 1}, "width": dict.fromkeys(net.space["width"], 2)}
    small = net.extract(variables, candidate)
    assert all(f"params/block1/{n}/kernel" in small.removal.gone for n in ("up", "down"))
    masked = jax.jit(lambda v: forward(net.masked(v, candidate), X))(variables)
    logits, moved = jax.jit(small.rewrite(forward))(small.params, X)
    assert difference(masked[0], logits) < 1e-5
    stats = moved["batch_stats"]
    assert jax.tree.leaves(stats["block1"]) == []
    assert stats["block0"]["in"]["mean"].shape == (2,)
    assert difference(masked[1]["batch_stats"]["block0"]["out"], stats["block0"]["out"]) < 1e-5
    # Such statistics take the place of the old ones.
    after = {**small.params, **moved}
    assert jax.tree.structure(after) == jax.tree.structure(small.params)
    # Training goes on, at another batch size.
    loss = lambda v: jnp.sum(small.rewrite(forward)(v, X[:2])[0] ** 2)
    assert jax.tree.structure(jax.eval_shape(jax.grad(loss), after)) == jax.tree.structure(after)
