"""Ready networks against Flax layers, and compression settings against the methods they are for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jaxcomp
from jaxcomp import prune, quantize, tree
from jaxcomp.search import ready, spaces
from jaxcomp.search.spaces import Choice, Continuous, Integer

SHAPES = jax.eval_shape(
    lambda: {
        "Conv_0": {"kernel": jnp.ones((3, 3, 1, 8)), "bias": jnp.ones(8)},
        "Dense_0": {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)},
    }
)
PARAMS = jax.tree.map(
    lambda leaf: jnp.asarray(np.random.default_rng(0).normal(size=leaf.shape), jnp.float32), SHAPES
)


def as_flax(layers, x, dense):
    """The same network out of Linen's layers, named as ours."""
    for i, layer in enumerate(layers):
        if dense:
            make = lambda name, w=layer["width"]: nn.Dense(w, name=name)
            skip = lambda name, w=layer["width"]: nn.Dense(w, name=name)
        else:
            c, k, s = layer["channels"], layer["size"], layer["stride"]
            make = lambda name, c=c, k=k, s=s: nn.Conv(c, (k, k), (s, s), name=name)
            skip = lambda name, c=c, s=s: nn.Conv(c, (1, 1), (s, s), name=name)
        y = nn.relu(make(f"layer_{i}")(x))
        if layer["skip"]:
            y = y + (x if x.shape == y.shape else skip(f"skip_{i}")(x))
        x = y
    return nn.Dense(3, name="head")(x if dense else x.mean((1, 2)))


CONVOLUTIONS = [
    {"channels": 4, "size": 3, "stride": 2, "skip": True},
    {"channels": 4, "size": 5, "stride": 1, "skip": True},
    {"channels": 2, "size": 1, "stride": 1, "skip": False},
]
LAYERS = [
    {"width": 8, "skip": True},
    {"width": 8, "skip": True},
    {"width": 4, "skip": False},
]


@pytest.mark.parametrize("dense", [True, False])
def test_networks_are_those_of_flax(dense):
    layers = LAYERS if dense else CONVOLUTIONS
    make, x = (ready.mlp, jnp.ones((2, 5))) if dense else (ready.cnn, jnp.ones((2, 7, 7, 1)))
    x = x * jnp.arange(2.0).reshape(-1, *[1] * (x.ndim - 1)) - 0.3
    network = make({"layers": layers, "activation": "relu"}, x.shape[-1], 3)

    class Module(nn.Module):
        @nn.compact
        def __call__(self, x):
            return as_flax(layers, x, dense)

    @jax.jit
    def both(key):
        params = network.init(key)
        return params, network.apply(params, x), Module().apply({"params": params}, x)

    params, ours, theirs = both(jax.random.key(0))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    shapes = jax.eval_shape(Module().init, jax.random.key(0), x)["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda leaf: leaf.shape, shapes)
    kernel = np.asarray(params["layer_1"]["kernel"])
    fan_in = kernel.size / kernel.shape[-1]
    assert 0.6 < kernel.std() / np.sqrt(2 / fan_in) < 1.4


def test_every_candidate_makes_a_network():
    rng = np.random.default_rng(0)
    perceptrons = ready.mlps(activation=ready.activations())
    convolutions = ready.cnns(depth=Integer(0, 3))
    for _ in range(10):
        mlp = ready.mlp(spaces.decode(perceptrons, spaces.sample(perceptrons, rng)), 5, 3)
        cnn = ready.cnn(spaces.decode(convolutions, spaces.sample(convolutions, rng)), 1, 3)
        for network, shape in ((mlp, (2, 5)), (cnn, (2, 8, 8, 1))):
            x = jax.ShapeDtypeStruct(shape, jnp.float32)
            out = jax.eval_shape(
                lambda key, x, net=network: net.apply(net.init(key), x), jax.random.key(0), x
            )
            assert out.shape == (2, 3)


def test_settings_are_what_the_methods_take():
    space = ready.compressions(PARAMS, sparsities=(0.0, 0.5), bits=(4, None))
    assert spaces.count(space) == 16
    point = dict.fromkeys(spaces.every_part(space), 1) | {"Dense_0/kernel/bits": 0}
    candidate = spaces.decode(space, point)
    assert spaces.encode(space, candidate) == point
    sparsities = ready.setting(candidate, "sparsity")
    masks = prune.masks(tree.select(PARAMS), allocation=prune.allocation.fixed(sparsities))
    assert [int(np.sum(mask)) for mask in masks.values()] == [36, 16]
    rules = {
        path: None if bits is None else quantize.train(quantize.Format(bits=bits))
        for path, bits in ready.setting(candidate, "bits").items()
    }
    method = jaxcomp.partition(rules)
    packed = method.pack(PARAMS, method.init(PARAMS))
    assert packed["Conv_0"]["kernel"] is PARAMS["Conv_0"]["kernel"]
    assert packed["Dense_0"]["kernel"].nbytes < PARAMS["Dense_0"]["kernel"].nbytes


def test_settings_may_be_shared_free_or_left_out():
    shared = ready.compressions(SHAPES, patterns=["Conv_*", "*"], sparsities=None)
    assert list(spaces.every_part(shared)) == ["Conv_*/bits", "*/bits"]
    free = ready.compressions(SHAPES, sparsities=Continuous(0.0, 0.9), bits=None)
    assert list(spaces.every_part(free)) == ["Conv_0/kernel/sparsity", "Dense_0/kernel/sparsity"]
    one = ready.compressions(SHAPES, where=lambda path, leaf: path == "Dense_0/kernel")
    assert list(one) == ["Dense_0/kernel"]


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: ready.compressions({"b": 1.0}), ValueError, "no weight to compress"),
        (lambda: ready.compressions(SHAPES, sparsities=None, bits=None), ValueError, "both None"),
        (lambda: ready.compressions(SHAPES, bits=()), ValueError, "^compressions/bits: Choice"),
        (lambda: ready.compressions(SHAPES, bits=8), TypeError, "^compressions/bits: Choice"),
        (lambda: ready.compressions(SHAPES, patterns=["x*"]), ValueError, "matches no leaf"),
        (lambda: ready.compressions(SHAPES, patterns="x*"), ValueError, "'x[*]' matches no leaf"),
        (lambda: ready.compressions(SHAPES, patterns=[]), ValueError, "paths is empty"),
        (lambda: ready.compressions(SHAPES, sparsities=(0.5, 50)), ValueError, "sparsity is 50"),
        (lambda: ready.compressions(SHAPES, bits=(0, 8)), ValueError, "^compressions/bits is 0"),
        (lambda: ready.compressions(SHAPES, bits=("a",)), TypeError, "^compressions/bits must be"),
        (lambda: ready.mlp({"layers": [8], "activation": "relu"}, 1, 1), TypeError, "^layers/0: m"),
        (
            lambda: ready.mlp({"layers": [{"width": 1, "skip": "no"}], "activation": "relu"}, 1, 1),
            TypeError,
            "^layers/0/skip: must be True or False, not 'no'",
        ),
        (lambda: ready.mlp({"layers": [], "activation": "relu"}, 0, 1), ValueError, "^inputs is 0"),
        (lambda: ready.cnn({"layers": [], "activation": "relu"}, 1, "2"), TypeError, "^outputs"),
        (lambda: ready.compressions(SHAPES, patterns=["*", "Conv_*"]), ValueError, "put it first"),
        (lambda: ready.setting({"a": {"bits": 2}}, "sparsity"), ValueError, "^a: the rule has no"),
        (
            lambda: ready.setting({"a": {"bits": 2}}, "bits", "sparsity"),
            ValueError,
            "^a: the rule has no 'sparsity', only bits",
        ),
        (lambda: ready.mlps(depth=Choice((1, 2))), TypeError, "give an int, or an Integer"),
        (lambda: ready.mlp([], 1, 1), TypeError, "^network: must be a dict of layers"),
        (lambda: ready.mlp({"layers": []}, 1, 1), ValueError, "no activation"),
        (
            lambda: ready.mlp({"layers": [{"width": 0, "skip": 0}], "activation": "relu"}, 1, 1),
            ValueError,
            "^layers/0/width is 0",
        ),
        (
            lambda: ready.cnn({"layers": [{"channels": 1}], "activation": "relu"}, 1, 1),
            ValueError,
            "^layers/0: it has no size",
        ),
    ],
)
def test_networks_and_settings_that_will_not_do_are_named(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
