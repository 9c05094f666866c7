"""Masks, counts and orders beside `torch.nn.utils.prune` and torch-pruning, on the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp import tree as tree_lib
from jaxcomp.prune import scores
from jaxcomp.prune.allocation import global_threshold
from jaxcomp.prune.masks import masks
from jaxcomp.prune.post_training import evidence
from jaxcomp.prune.structures import Channel, pool

torch = pytest.importorskip("torch")
tp = pytest.importorskip("torch_pruning")
prune = pytest.importorskip("torch.nn.utils.prune")
pytestmark = pytest.mark.slow

NAMES = ("first.weight", "second.weight", "head.weight")
SPARSITIES = (0.0, 0.1, 0.33, 0.5, 0.77, 0.9)


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Conv2d(2, 6, 3)
        self.second = torch.nn.Conv2d(6, 4, 3)
        self.head = torch.nn.Linear(4, 3)

    def forward(self, x):
        x = torch.relu(self.first(x))
        x = torch.relu(self.second(x))
        return self.head(x.mean((2, 3)))


def network():
    torch.manual_seed(0)
    return Network()


def leaves(module):
    return {name: jnp.asarray(p.detach().numpy()) for name, p in module.named_parameters()}


def apply(params, x):
    """The same network, on weights in PyTorch's own layout."""
    for name in ("first", "second"):
        bias = params[f"{name}.bias"][:, None, None]
        kernel = params[f"{name}.weight"]
        x = jax.nn.relu(jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID") + bias)
    return jnp.mean(x, (2, 3)) @ params["head.weight"].T + params["head.bias"]


def loss(params, x, y):
    return jnp.mean((apply(params, x) - y) ** 2)


def data(rows=6):
    generator = np.random.default_rng(0)
    x = generator.normal(size=(rows, 2, 7, 7)).astype(np.float32)
    return x, generator.normal(size=(rows, 3)).astype(np.float32)


def torch_gradients(module, x, y):
    module.zero_grad()
    torch.nn.functional.mse_loss(module(torch.tensor(x)), torch.tensor(y)).backward()
    return {name: p.grad.numpy().copy() for name, p in module.named_parameters()}


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_unstructured_masks_are_theirs(sparsity):
    module = network()
    ours = masks(
        {n: scores.magnitude(w) for n, w in leaves(module).items() if n in NAMES}, sparsity
    )
    for name in NAMES:
        layer = getattr(module, name.split(".")[0])
        prune.l1_unstructured(layer, "weight", amount=sparsity)
        np.testing.assert_array_equal(ours[name], layer.weight_mask.numpy().astype(bool))


@pytest.mark.parametrize("sparsity", [0.0, 0.33, 0.6])
def test_global_masks_are_theirs(sparsity):
    module = network()
    chosen = {n: scores.magnitude(w) for n, w in leaves(module).items() if n in NAMES}
    ours = masks(chosen, sparsity, allocation=global_threshold)
    layers = [(getattr(module, name.split(".")[0]), "weight") for name in NAMES]
    prune.global_unstructured(layers, prune.L1Unstructured, amount=sparsity)
    for name, (layer, _) in zip(NAMES, layers, strict=True):
        np.testing.assert_array_equal(ours[name], layer.weight_mask.numpy().astype(bool))


def test_a_layer_that_they_empty_is_refused():
    module = network()
    chosen = {n: scores.magnitude(w) for n, w in leaves(module).items() if n in NAMES}
    with pytest.raises(ValueError, match=r"second\.weight: all 216 weights would be removed"):
        masks(chosen, 0.9, allocation=global_threshold)
    layers = [(getattr(module, name.split(".")[0]), "weight") for name in NAMES]
    prune.global_unstructured(layers, prune.L1Unstructured, amount=0.9)
    assert module.second.weight_mask.sum() == 0


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("norm", "score"), [(1, scores.magnitude), (2, scores.l2)])
def test_channel_masks_are_theirs(norm, score, axis):
    module = network()
    weight = leaves(module)["second.weight"]
    for sparsity in (0.0, 0.3, 0.5):
        ours = masks({"w": score(weight)}, sparsity, Channel(axis))["w"]
        layer = network().second
        prune.ln_structured(layer, "weight", amount=sparsity, n=norm, dim=axis)
        np.testing.assert_array_equal(ours, layer.weight_mask.numpy().astype(bool))


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_random_masks_remove_as_many(sparsity):
    module = network()
    weights = {n: w for n, w in leaves(module).items() if n in NAMES}
    score = scores.random(jax.random.key(0))
    chosen = {n: score.score(w, score.init(n, w)) for n, w in weights.items()}
    ours = masks(chosen, sparsity)
    for name in NAMES:
        layer = getattr(module, name.split(".")[0])
        prune.random_unstructured(layer, "weight", amount=sparsity)
        assert int(jnp.sum(ours[name])) == int(layer.weight_mask.sum())


def group_of(module, x):
    graph = tp.DependencyGraph().build_dependency(module, example_inputs=torch.tensor(x))
    everything = list(range(module.second.out_channels))
    return graph.get_pruning_group(module.second, tp.prune_conv_out_channels, idxs=everything)


def check_order(ours, importance, group):
    theirs = importance(group).detach().numpy()
    np.testing.assert_allclose(ours / np.sum(ours), theirs / np.sum(theirs), rtol=1e-5)
    np.testing.assert_array_equal(np.argsort(ours), np.argsort(theirs))


@pytest.mark.parametrize(("norm", "score"), [(1, scores.magnitude), (2, scores.l2)])
def test_magnitude_importance(norm, score):
    module, (x, _) = network(), data()
    ours = pool(Channel(0), score(leaves(module)["second.weight"]))
    options = {"p": norm, "group_reduction": "first", "normalizer": None}
    check_order(ours, tp.importance.MagnitudeImportance(**options), group_of(module, x))


def test_gradients_and_taylor_importance():
    module, (x, y) = network(), data()
    params = leaves(module)
    group = group_of(module, x)
    theirs = torch_gradients(module, x, y)
    # Two halves of one batch have its gradient as their mean.
    found = evidence.gradients(loss, params, [(x[:3], y[:3]), (x[3:], y[3:])])
    for name, gradient in theirs.items():
        np.testing.assert_allclose(found[name], gradient, rtol=1e-4, atol=1e-6)
    ours = pool(Channel(0), scores.taylor(params["second.weight"], found["second.weight"]))
    options = {"group_reduction": "first", "normalizer": None}
    check_order(ours, tp.importance.TaylorImportance(**options), group)


def test_fisher_and_hessian_importance():
    module, (x, y) = network(), data()
    params = leaves(module)
    group = group_of(module, x)
    each = [torch_gradients(module, x[i : i + 1], y[i : i + 1]) for i in range(len(x))]
    # Of the squares that torch-pruning 1.6.1 accumulates only the last are left: they are given.
    for name, parameter in module.named_parameters():
        parameter.grad = torch.tensor(np.mean([one[name] ** 2 for one in each], axis=0))
    batches = [(x[i : i + 1], y[i : i + 1]) for i in range(len(x))]
    found = evidence.squared_gradients(loss, params, batches)
    chosen = tree_lib.Leaves(weight=params["second.weight"])
    squares = tree_lib.Leaves(weight=found["second.weight"])
    scored = jax.tree.map(scores.fisher_weighted, chosen, squares)["weight"]
    options = {"group_reduction": "first", "normalizer": None}
    importance = tp.importance.GroupHessianImportance(**options)
    check_order(pool(Channel(0), scored), importance, group)
