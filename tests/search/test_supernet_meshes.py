"""Supernets and proxies of parameters that are spread over a mesh, with both types of its axes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcomp.search import proxies
from jaxcomp.search.differentiable import darts, logits, probabilities
from jaxcomp.search.supernets import sandwich, supernet
from tests.model.cutting import difference

RNG = np.random.default_rng(0)
SHAPES = {"stem": (4, 16), "bias": (16,), "up": (16, 24), "down": (24, 16), "head": (16, 3)}
SPECS = {"stem": P(None, "m"), "bias": P("m"), "up": P(None, "m"), "down": P("m"), "head": P()}
PARAMS = {name: RNG.normal(size=size).astype(np.float32) for name, size in SHAPES.items()}
X = RNG.normal(size=(8, 4)).astype(np.float32)
WIDE = {"width": {"stem": (4, 6, 16), "up": (8, 24)}, "connections": {"block": "down"}}


def on_mesh(kind):
    """A model, its parameters and inputs on a mesh of eight devices."""
    mesh = jax.make_mesh((2, 4), ("d", "m"), axis_types=(kind, kind))

    def dot(x, w, rows="d", columns="m"):
        # Explicit axes want to know where a product of sharded axes goes.
        place = NamedSharding(mesh, P(rows, columns)) if kind == AxisType.Explicit else None
        return jnp.dot(x, w, out_sharding=place)

    def model(p, x, rows="d"):
        x = jax.nn.relu(dot(x, p["stem"], rows) + p["bias"])
        x = x + dot(jax.nn.relu(dot(x, p["up"], rows)), p["down"], rows)
        return dot(x, p["head"], rows, None)

    place = lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec))
    params = {name: place(leaf, SPECS[name]) for name, leaf in PARAMS.items()}
    return model, params, place(X, P("d", None))


def plain(p, x):
    x = jax.nn.relu(x @ p["stem"] + p["bias"])
    return (x + jax.nn.relu(x @ p["up"]) @ p["down"]) @ p["head"]


def specs(params):
    return {name: tuple(leaf.sharding.spec) for name, leaf in params.items() if leaf is not None}


def loss(outputs, batch=None):
    return jnp.mean(outputs**2)


KINDS = pytest.mark.parametrize(
    "kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"]
)


@KINDS
@pytest.mark.parametrize("width", [4, 6])
def test_masked_and_extracted_are_equal_on_a_mesh(kind, width):
    model, params, x = on_mesh(kind)
    net = supernet(model, params, x, **WIDE)
    for block in (True, False):
        candidate = {"width": {"down[1]": width, "up[1]": 8}, "connections": {"block": block}}
        wanted = plain(net.masked(PARAMS, candidate), X)
        run = jax.jit(lambda p, c, x: model(net.masked(p, c), x))
        masked = run(params, candidate, x)
        small = net.extract(params, candidate)
        found = jax.jit(small.apply)(small.params, x)
        assert len(found.sharding.device_set) == 8
        assert difference(wanted, masked) < 1e-5
        assert difference(wanted, found) < 1e-5
        for leaf in jax.tree.leaves(small.params):
            assert len(leaf.sharding.device_set) == 8
        # Four devices share four channels, and each has all of six.
        assert small.params["stem"].addressable_shards[0].data.shape == (4, 1 if width == 4 else 6)
        momentum = small.shrink({"mu": params})["mu"]
        assert specs(momentum) == specs(small.params)


def trained(model, params, x):
    """A step of the sandwich rule, and one of DARTS."""
    net, key = supernet(model, params, x, **WIDE), jax.random.key(0)
    rule = sandwich(net, model, loss, randoms=1)
    search = darts(net.space, lambda p, w, x: loss(model(net.mixed(p, w), x)),
                   optax.sgd(0.1), optax.sgd(0.1), inner_rate=0.01)  # fmt: skip
    state = search.init(params, key)
    slopes, told = jax.jit(jax.grad(rule, has_aux=True))(params, key, x)
    return slopes, told, jax.jit(search.step)(state, x, x)[0].logits


def measured(model, single, params, x):
    """Every proxy; ``single`` is the model of one example."""
    measures = lambda p, x: {
        "synflow": proxies.synflow(model, p, x),
        "naswot": proxies.naswot(single, p, x),
        "jacobian": proxies.jacobian_covariance(single, p, x),
        "gradient": proxies.gradient_norm(lambda p, x: loss(model(p, x)), p, x),
    }
    return jax.jit(measures)(params, x)


@functools.cache
def wanted():
    return trained(plain, PARAMS, X), measured(plain, plain, PARAMS, X)


@KINDS
def test_training_and_proxies_on_a_mesh_are_those_without_one(kind):
    model, params, x = on_mesh(kind)
    single = lambda p, x: model(p, x, rows=None)
    assert difference(wanted()[0], trained(model, params, x)) < 1e-4
    found = measured(model, single, params, x)
    for name, value in wanted()[1].items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, err_msg=name)


@KINDS
def test_masked_and_mixed_leaves_lie_where_their_parameters_lie(kind):
    model, params, x = on_mesh(kind)
    net = supernet(model, params, x, **WIDE)
    trees = jax.jit(lambda p: (net.masked(p, net.smallest), net.mixed(p, odds(net))))(params)
    for tree in trees:
        for name, leaf in tree.items():
            assert leaf.sharding.is_equivalent_to(params[name].sharding, leaf.ndim)


def odds(net):
    return probabilities(logits(net.space))
