"""Zero-cost proxies against the papers' formulas in float64 NumPy, and on networks without hope."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.search import proxies

RNG = np.random.default_rng(0)
SIZES = ((5, 7), (7, 6), (6, 3))
X = RNG.normal(size=(4, 5)).astype(np.float32)


def drawn(seed, sizes=SIZES, scale=0.5):
    rng = np.random.default_rng(seed)
    return [
        {
            "w": (scale * rng.normal(size=size)).astype(np.float32),
            "b": (0.1 * rng.normal(size=size[1])).astype(np.float32),
        }
        for size in sizes
    ]


def mlp(params, x, act=jax.nn.relu):
    for layer in params[:-1]:
        x = act(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def exact(params):
    return [{name: leaf.astype(np.float64) for name, leaf in layer.items()} for layer in params]


def passes(params, x, outward):
    """Inputs, pre-activations and gradients of the pre-activations, layer by layer, in NumPy."""
    ins, pres = [], []
    for i, layer in enumerate(params):
        ins.append(x)
        pres.append(x @ layer["w"] + layer["b"])
        x = np.maximum(pres[-1], 0) if i < len(params) - 1 else pres[-1]
    grads = [outward]
    for layer, pre in zip(params[:0:-1], pres[-2::-1], strict=True):
        grads.append((grads[-1] @ layer["w"].T) * (pre > 0))
    return ins, pres, grads[::-1]


def synflow_by_hand(params):
    params = [{name: np.abs(leaf) for name, leaf in layer.items()} for layer in exact(params)]
    ins, _, grads = passes(params, np.ones((1, len(params[0]["w"]))), np.ones((1, 3)))
    each = zip(params, ins, grads, strict=True)
    return np.log(sum(np.abs(layer["w"] * (x.T @ g)).sum() for layer, x, g in each))


def naswot_by_hand(params, x):
    _, pres, _ = passes(exact(params), x, np.ones((len(x), 3)))
    codes = np.concatenate([pre > 0 for pre in pres[:-1]], axis=1)
    distance = (codes[:, None] != codes[None]).sum(-1)
    return np.linalg.slogdet(codes.shape[1] - distance).logabsdet


def jacobian_covariance_by_hand(params, x):
    params = exact(params)
    _, _, grads = passes(params, x, np.ones((len(x), 3)))
    values = np.linalg.eigvalsh(np.corrcoef(grads[0] @ params[0]["w"].T)) + 1e-5
    return -np.sum(np.log(values) + 1 / values)


def gradient_norm_by_hand(params, x):
    params = exact(params)
    ins, pres, _ = passes(params, x, np.zeros((len(x), 3)))
    ins, _, grads = passes(params, x, 2 * pres[-1])  # of the sum of squares
    return sum(np.linalg.norm(a.T @ g) for a, g in zip(ins, grads, strict=True))


MEASURES = {
    "synflow": (lambda p, x: proxies.synflow(mlp, p, x[:1]), lambda p, x: synflow_by_hand(p)),
    "naswot": (lambda p, x: proxies.naswot(mlp, p, x), naswot_by_hand),
    "jacobian": (lambda p, x: proxies.jacobian_covariance(mlp, p, x), jacobian_covariance_by_hand),
    "gradient": (
        lambda p, x: proxies.gradient_norm(lambda p, x: (mlp(p, x) ** 2).sum(), p, x),
        gradient_norm_by_hand,
    ),
}


COMPILED = {
    name: jax.jit(jax.vmap(measure, in_axes=(0, None))) for name, (measure, _) in MEASURES.items()
}
MANY = [drawn(seed) for seed in range(4)]
STACKED = jax.tree.map(lambda *leaves: np.stack(leaves), *MANY)


@pytest.mark.parametrize("name", MEASURES)
def test_a_proxy_is_its_papers_formula_side_by_side_and_compiled(name):
    found = COMPILED[name](STACKED, X)
    by_hand = MEASURES[name][1]
    np.testing.assert_allclose(found, [by_hand(params, X) for params in MANY], rtol=2e-4)


def test_synflow_of_depths_beyond_floats():
    params = drawn(0, [(5, 16), *[(16, 16)] * 5, (16, 3)], scale=1e7)
    positive = jax.tree.map(np.abs, params)
    assert not np.isfinite(jax.jit(mlp)(positive, np.ones((1, 5), np.float32))).any()
    measure = jax.jit(lambda p, x: proxies.synflow(mlp, p, x))
    np.testing.assert_allclose(measure(params, X[:1]), synflow_by_hand(params), rtol=1e-5)
    halves = jax.tree.map(lambda leaf: leaf.astype(np.float16), drawn(0, scale=1e4))
    found = measure(halves, X[:1].astype(np.float16))
    np.testing.assert_allclose(found, synflow_by_hand(halves), rtol=1e-3)


class Net(nn.Module):
    """Convolutions, batch norm, pools, a residual: what SynFlow meets in practice."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(4, (3, 3))(x)))
        x = x + 2.0 * nn.relu(nn.Conv(4, (3, 3), feature_group_count=2)(x)) / 3.0
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = jnp.concatenate([x, nn.relu6(x)], axis=-1)
        x = nn.avg_pool(x, (2, 2), (2, 2)).mean(axis=(1, 2))
        return nn.Dense(3)(jnp.where(x > 0, x, 0.1 * x)) - 0.5


def test_synflow_of_a_convolutional_network_is_that_of_plain_floats():
    model = Net()
    image = jnp.zeros((1, 8, 8, 2))
    variables = jax.jit(model.init)(jax.random.key(0), image)
    found = jax.jit(lambda v: proxies.synflow(model.apply, v, image))(variables)

    @jax.jit
    def plain(variables):
        positive = jax.tree.map(jnp.abs, variables)
        slopes = jax.grad(lambda v: model.apply(v, jnp.ones_like(image)).sum())(positive)
        kernels = lambda tree: [leaf for leaf in jax.tree.leaves(tree["params"]) if leaf.ndim > 1]
        pairs = zip(kernels(positive), kernels(slopes), strict=True)
        return jnp.log(sum(jnp.abs(weight * slope).sum() for weight, slope in pairs))

    np.testing.assert_allclose(found, plain(variables), rtol=1e-5)


@pytest.mark.parametrize(
    "act",
    [
        jax.nn.relu,
        jax.nn.leaky_relu,
        jax.nn.elu,
        jax.nn.relu6,
        jax.nn.silu,
        jax.nn.sigmoid,
        jnp.tanh,
        lambda x: jax.nn.gelu(x, approximate=True),
        lambda x: jax.nn.gelu(x, approximate=False),
        lambda x: jnp.maximum(x, jnp.zeros_like(x)),
    ],
)
def test_codes_are_signs_of_what_activations_read(act):
    params = drawn(1, SIZES[:2])
    found = jax.jit(lambda p: proxies.activation_codes(lambda p, x: mlp(p, x, act), p, X))(params)
    wanted = X @ params[0]["w"] + params[0]["b"] > 0
    codes = np.asarray(found)
    # GELU by erfc reads the negative: the same units differ between examples.
    codes = codes ^ codes[:1] ^ wanted[:1]
    np.testing.assert_array_equal(codes, wanted)


def test_codes_inside_scanned_layers_are_found_turn_by_turn():
    weights = RNG.normal(size=(3, 5, 5)).astype(np.float32)

    def scanned(w, x):
        return jax.lax.scan(lambda h, w: (jax.nn.relu(h @ w), None), x, w)[0]

    x, wanted = X, []
    for w in weights:
        wanted.append(x @ w > 0)
        x = np.maximum(x @ w, 0)
    found = jax.jit(lambda w: proxies.activation_codes(scanned, w, X))(weights)
    np.testing.assert_array_equal(found, np.concatenate(wanted, axis=1))


def test_networks_without_hope_are_worst_and_not_nan():
    zeros = jax.tree.map(np.zeros_like, STACKED)
    worst = {"synflow": -np.inf, "naswot": -np.inf, "jacobian": -np.inf, "gradient": 0.0}
    for name, value in worst.items():
        assert (np.asarray(COMPILED[name](zeros, X)) == value).all(), name
    twice = np.concatenate([X[:2], X[:2]])
    assert not (np.asarray(COMPILED["naswot"](STACKED, twice)) > -10).any()


def test_counters_beside_the_weights_have_no_part_in_it():
    params = {"layers": drawn(0), "steps": np.int32(3)}
    loss = lambda p, x: (mlp(p["layers"], x) ** 2).sum() * p["steps"] / 3
    found = jax.jit(lambda p: proxies.gradient_norm(loss, p, X))(params)
    np.testing.assert_allclose(found, gradient_norm_by_hand(params["layers"], X), rtol=1e-5)


def test_what_has_no_score_is_refused():
    params = drawn(0)
    with pytest.raises(ValueError, match="no activations"):
        proxies.naswot(lambda p, x: x @ p[0]["w"], params, X)
    with pytest.raises(ValueError, match="is inside cond"):
        proxies.naswot(
            lambda p, x: jax.lax.cond(x.sum() > 3, jax.nn.relu, lambda x: x, x @ p[0]["w"]),
            params, X,
        )  # fmt: skip
    with pytest.raises(ValueError, match="same number of examples"):
        proxies.naswot(mlp, params, X[:0])
    with pytest.raises(TypeError, match="no derivatives by it"):
        proxies.jacobian_covariance(mlp, params, X.astype(int))
    with pytest.raises(ValueError, match="returns nothing floating"):
        proxies.jacobian_covariance(lambda p, x: x > 0, params, X)
    with pytest.raises(ValueError, match="returns nothing floating"):
        proxies.synflow(lambda p, x: (x @ p[0]["w"]).argmax(), params, X)
    with pytest.raises(TypeError, match="apply_fn must be"):
        proxies.synflow(None, params, X)
    with pytest.raises(TypeError, match="loss must return one floating number"):
        proxies.gradient_norm(lambda p, x: x @ p[0]["w"], params, X)
