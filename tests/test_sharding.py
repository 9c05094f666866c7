"""Every method on eight devices, with automatic and with explicit mesh axes."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcomp
from jaxcomp import chain, prune, quantize, share
from jaxcomp.quantize import Format
from tests import methods
from tests.methods import CASES, Case

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
SPECS = {
    "first": {"kernel": P(None, "model"), "bias": P("model")},
    "second": {"kernel": P("model", None), "bias": P()},
}


def mesh_of(kind):
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)


def place(mesh, params):
    return jax.tree.map(lambda w, s: jax.device_put(w, NamedSharding(mesh, s)), params, SPECS)


def forward(weights, x):
    """The perceptron, written so that sharding-in-types can follow its contraction."""
    hidden = jnp.tanh(x @ weights["first"]["kernel"] + weights["first"]["bias"])
    explicit = jax.typeof(hidden).sharding.mesh._any_axis_explicit
    spec = {"out_sharding": P("data", None)} if explicit else {}
    return (
        jnp.einsum("bh,ho->bo", hidden, weights["second"]["kernel"], **spec)
        + (weights["second"]["bias"])
    )


def make_step(tx):
    traces = []

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, x, y):
        traces.append(1)
        loss = lambda p: jnp.mean((forward(jaxcomp.compressed(p, opt_state), x) - y) ** 2)
        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return step, traces


def run(method, mesh=None, steps=6):
    tx = jaxcomp.wrap_optimizer(optax.adam(0.05), method)
    step, traces = make_step(tx)
    params, (x, y) = methods.params(), methods.batch()
    if mesh is not None:
        params = place(mesh, params)
        x, y = (jax.device_put(v, NamedSharding(mesh, P("data", None))) for v in (x, y))
    opt_state = tx.init(params)
    for _ in range(steps):
        params, opt_state = step(params, opt_state, x, y)
    return params, opt_state, traces


@functools.cache
def run_alone(case: Case):
    return run(case.make())


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("case", CASES, ids=str, scope="module")
def test_sharded_training_equals_that_on_one_device(case: Case, kind):
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        params, opt_state, traces = run(case.make(), mesh)
        seen = jax.jit(jaxcomp.compressed)(params, opt_state)
    alone, alone_state, _ = run_alone(case)
    expected = jax.jit(jaxcomp.compressed)(alone, alone_state)
    for got, want in zip(jax.tree.leaves(seen), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=2e-5, atol=2e-5)
    assert params["first"]["kernel"].sharding.spec == P(None, "model")
    # The first call may see other placements of fresh state than the steps after it.
    assert len(traces) <= 2
    packed = jaxcomp.pack(params, opt_state)
    for got, want in zip(
        jax.tree.leaves(jaxcomp.decode(packed)), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_masks_and_indices_lie_where_their_weights_lie(kind):
    mesh = mesh_of(kind)
    method = chain(methods.pruner(), share.train(4, begin=2))
    with jax.set_mesh(mesh):
        _, opt_state, _ = run(method, mesh)
    pruned, shared = opt_state.compression.buffers
    for path, spec in (("first/kernel", P(None, "model")), ("second/kernel", P("model", None))):
        for leaf in (pruned.masks[path], shared.indices[path]):
            assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, spec), 2), (
                path,
                leaf.sharding,
            )


def gradual(allocation, structure):
    return prune.gradual(
        prune.scores.magnitude, prune.cubic(0.5, 0, 4), allocation, structure, every=1
    )


@pytest.mark.parametrize(
    ("method", "most"),
    [
        (gradual(prune.allocation.uniform, prune.Element()), 64),
        (gradual(prune.allocation.global_threshold, prune.Block((8, 8))), 64),
        (gradual(prune.allocation.erdos_renyi_kernel, prune.Element()), 64),
        (gradual(prune.allocation.uniform, prune.NM(2, 4)), 0),
        # One number a column crosses the mesh.
        (gradual(prune.allocation.uniform, prune.Channel(-1)), 512),
        (gradual(prune.allocation.uniform, prune.Element(within=-1)), 512),
        (prune.rigl(0.5, end=100, every=2, key=jax.random.key(0)), 64),
    ],
    ids=["layer", "global blocks", "ERK", "2:4", "columns", "within columns", "RigL"],
)
def test_pruning_gathers_no_weights(method, most):
    mesh = mesh_of(AxisType.Auto)
    with jax.set_mesh(mesh):
        weights = {
            name: jax.device_put(
                jax.random.normal(jax.random.key(i), (256, 512)),
                NamedSharding(mesh, P("data", "model")),
            )
            for i, name in enumerate(("one", "two"))
        }
        state = method.init(weights)
        sharding = jax.tree.map(lambda leaf: leaf.sharding, state)
        update = jax.jit(method.update, out_shardings=sharding)
        text = update.lower(weights, state, weights).compile().as_text()
    sizes = [
        int(np.prod([int(n) for n in shape.split(",") if n]))
        for line in text.splitlines()
        if any(f" {name}(" in line for name in COLLECTIVES)
        for shape in re.findall(r"[a-z]+\d*\[([\d,]*)\]", line.split("metadata")[0])
    ]
    # Counts cross the mesh, weights do not: a weight's shard has 128 × 128 entries.
    assert bool(sizes) == bool(most), "a threshold over shards needs some collective"
    assert max(sizes, default=0) <= most


def test_one_shot_masks_of_sharded_scores():
    mesh = mesh_of(AxisType.Explicit)
    params = methods.params()
    together = prune.allocation.global_threshold
    expected = prune.masks(jax.tree.map(prune.scores.magnitude, params), 0.7, allocation=together)
    with jax.set_mesh(mesh):
        scores = jax.tree.map(prune.scores.magnitude, place(mesh, params))
        got = jax.jit(lambda s: prune.masks(s, 0.7, allocation=together))(scores)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_fake_quantization_keeps_explicit_shardings():
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        x = jax.device_put(
            methods.params()["first"]["kernel"], NamedSharding(mesh, P(None, "model"))
        )
        y = jax.jit(lambda x: quantize.fake_quant(x, Format(4)))(x)
        assert jax.typeof(y).sharding.spec == P(None, "model")


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_random_scores_lie_where_their_weights_lie(kind):
    mesh = mesh_of(kind)
    score = prune.scores.random(jax.random.key(0))
    method = prune.gradual(score, prune.cubic(0.5, 0, 4), every=1)
    alone = method.update(methods.params(), method.init(methods.params()), None)
    with jax.set_mesh(mesh):
        params = place(mesh, methods.params())
        state = jax.jit(method.update)(params, method.init(params), None)
    for path, mask in alone.buffers.masks.items():
        np.testing.assert_array_equal(np.asarray(state.buffers.masks[path]), np.asarray(mask))
