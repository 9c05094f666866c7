"""The wrapped optimizer inside other people's loops."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, traverse_util
from flax.training.train_state import TrainState

import jaxcomp
from jaxcomp import chain, identity, prune, quantize, share
from jaxcomp.optimizer import Trained
from jaxcomp.quantize import Format
from tests import methods


def pruner(sparsity=0.5):
    return prune.gradual(prune.scores.magnitude, prune.cubic(sparsity, begin=0, end=2), every=1)


def run(tx, steps=5, params=None):
    params = methods.params() if params is None else params
    opt_state = tx.init(params)
    x, y = methods.batch()

    @jax.jit
    def step(params, opt_state):
        loss = lambda p: methods.loss(jaxcomp.compressed(p, opt_state), x, y)
        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for _ in range(steps):
        params, opt_state = step(params, opt_state)
    return params, opt_state


def test_without_a_method_it_is_the_optimizer_itself():
    plain, opt_state = methods.params(), optax.adamw(0.01).init(methods.params())
    x, y = methods.batch()
    update = jax.jit(optax.adamw(0.01).update)
    for _ in range(5):
        grads = jax.jit(jax.grad(methods.loss))(plain, x, y)
        updates, opt_state = update(grads, opt_state, plain)
        plain = optax.apply_updates(plain, updates)
    wrapped, _ = run(jaxcomp.wrap_optimizer(optax.adamw(0.01), identity()))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(wrapped), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_pruning_costs_the_forward_pass_nothing():
    params = methods.params()
    opt_state = jaxcomp.wrap_optimizer(optax.adam(0.1), pruner()).init(params)
    jaxpr = jax.make_jaxpr(lambda p: jaxcomp.compressed(p, opt_state))(params)
    assert not jaxpr.eqns
    both = jaxcomp.wrap_optimizer(optax.adam(0.1), chain(pruner(), quantize.train(Format(4))))
    alone = jaxcomp.wrap_optimizer(optax.adam(0.1), quantize.train(Format(4)))
    count = lambda tx: len(jax.make_jaxpr(jaxcomp.compressed)(params, tx.init(params)).eqns)
    assert count(both) == count(alone)


def test_weights_from_elsewhere_are_projected_on_request():
    params, opt_state = run(jaxcomp.wrap_optimizer(optax.adam(0.1), pruner()))
    average = jax.tree.map(lambda w: w + 0.01, params)
    seen = jaxcomp.compressed(average, opt_state, projected=False)
    packed = jaxcomp.decode(jaxcomp.pack(average, opt_state))
    np.testing.assert_array_equal(seen["first"]["kernel"], packed["first"]["kernel"])
    assert float(jnp.mean(seen["first"]["kernel"] == 0)) == 0.5


@pytest.mark.parametrize("method", [pruner(), share.train(4), chain(pruner(), share.train(4, 3))])
def test_static_masks_and_labels_of_the_user_still_fit(method):
    params = methods.params()
    decay = jax.tree.map(lambda leaf: leaf.ndim > 1, params)
    labels = traverse_util.path_aware_map(
        lambda path, leaf: "slow" if path[0] == "first" else "fast", params
    )
    for tx in (
        optax.adamw(0.05, weight_decay=0.1, mask=decay),
        optax.adamw(
            0.05, mask=lambda p: traverse_util.path_aware_map(lambda k, _: k[-1] == "kernel", p)
        ),
        optax.multi_transform({"slow": optax.sgd(0.01), "fast": optax.adam(0.1)}, labels),
        optax.chain(optax.clip_by_global_norm(0.1), optax.lamb(0.01)),
    ):
        new, _ = run(jaxcomp.wrap_optimizer(tx, method))
        assert not np.allclose(new["second"]["bias"], params["second"]["bias"])


def test_frozen_leaves_stay_frozen_with_what_is_learned_about_them():
    params = methods.params()
    labels = {"first": "frozen", "second": "train"}
    tx = optax.multi_transform({"frozen": optax.set_to_zero(), "train": optax.adam(0.1)}, labels)
    _, state = run(jaxcomp.wrap_optimizer(tx, share.train(4)))
    start = share.train(4).init(params)
    np.testing.assert_array_equal(
        state.compression.learned["first/kernel"], start.learned["first/kernel"]
    )
    assert not np.allclose(
        state.compression.learned["second/kernel"], start.learned["second/kernel"]
    )


def test_global_norm_counts_what_is_learned():
    norms = []

    def record(updates, state, params=None):
        norms.append(optax.tree.norm(updates))
        return updates, state

    spy = optax.GradientTransformation(lambda params: optax.EmptyState(), record)
    tx = jaxcomp.wrap_optimizer(optax.chain(spy, optax.sgd(0.1)), share.train(4))
    params = methods.params()
    opt_state = tx.init(params)
    grads = jax.tree.map(jnp.ones_like, params)
    tx.update(grads, opt_state, params)
    # Indices are fixed, so all of a kernel's gradient goes to its centroids.
    indices = opt_state.compression.buffers.indices
    members = [np.bincount(np.asarray(i).ravel(), minlength=4) for i in indices.values()]
    expected = np.sqrt(sum(float(np.sum(m.astype(float) ** 2)) for m in members) + 8 + 4)
    np.testing.assert_allclose(norms[0], expected, rtol=1e-6)


def test_centroids_get_the_summed_gradient_of_their_members():
    params = methods.params()
    tx = jaxcomp.wrap_optimizer(optax.sgd(1.0), share.train(4))
    opt_state = tx.init(params)
    grads = jax.tree.map(lambda w: jnp.cos(5 * w), params)
    _, new = tx.update(grads, opt_state, params)
    for path in ("first", "second"):
        index = np.asarray(opt_state.compression.buffers.indices[f"{path}/kernel"])
        gradient = np.asarray(grads[path]["kernel"], np.float64)
        expected = [gradient[index == k].sum() for k in range(4)]
        moved = (
            opt_state.compression.learned[f"{path}/kernel"]
            - new.compression.learned[f"{path}/kernel"]
        )
        np.testing.assert_allclose(moved, expected, rtol=1e-5, atol=1e-5)


def test_inside_accumulation_and_other_wrappers():
    method = chain(pruner(), quantize.train(Format(4), begin=1))
    for tx in (
        optax.MultiSteps(jaxcomp.wrap_optimizer(optax.adam(0.05), method), every_k_schedule=2),
        jaxcomp.wrap_optimizer(optax.MultiSteps(optax.adam(0.05), 2), method),
        optax.chain(optax.clip(1.0), jaxcomp.wrap_optimizer(optax.adam(0.05), method)),
        optax.apply_if_finite(jaxcomp.wrap_optimizer(optax.adam(0.05), method), 3),
        jaxcomp.wrap_optimizer(optax.inject_hyperparams(optax.adam)(0.05), method),
    ):
        params, opt_state = run(tx, steps=8)
        assert float(jnp.mean(params["first"]["kernel"] == 0)) == 0.5
        packed = jaxcomp.pack(params, opt_state)
        assert isinstance(packed["first"]["kernel"], jaxcomp.QuantizedArray)


def test_extra_arguments_reach_the_inner_optimizer():
    seen = []

    def update(updates, state, params=None, *, value, **extra):
        seen.append((value, extra))
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update)
    tx = jaxcomp.wrap_optimizer(inner, pruner())
    params = methods.params()
    tx.update(params, tx.init(params), params, value=3.0, other=1)
    assert seen == [(3.0, {"other": 1})]


def test_gradients_in_another_precision():
    tx = jaxcomp.wrap_optimizer(optax.adam(0.05), chain(pruner(), share.train(4)))
    params = methods.params()
    opt_state = tx.init(params)
    grads = jax.tree.map(lambda w: jnp.ones_like(w, jnp.bfloat16), params)
    updates, _ = tx.update(grads, opt_state, params)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(updates))


def test_forward_mode_and_second_derivatives_pass_through():
    params = methods.params()
    tx = jaxcomp.wrap_optimizer(optax.sgd(0.1), quantize.train(Format(4)))
    opt_state = tx.init(params)
    x, y = methods.batch()
    loss = lambda p: methods.loss(jaxcomp.compressed(p, opt_state), x, y)
    grads = jax.grad(loss)(params)
    _, slope = jax.jvp(loss, (params,), (grads,))
    square = sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(grads))
    np.testing.assert_allclose(slope, square, rtol=1e-5)
    product = jax.jvp(jax.grad(loss), (params,), (grads,))[1]
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(product))


def test_the_wrong_things_are_refused():
    with pytest.raises(TypeError, match="tx"):
        jaxcomp.wrap_optimizer(0.1, identity())
    with pytest.raises(TypeError, match="gradual"):
        jaxcomp.wrap_optimizer(optax.sgd(0.1), prune.gradual)
    params = methods.params()
    tx = jaxcomp.wrap_optimizer(optax.sgd(0.1), identity())
    opt_state = tx.init(params)
    with pytest.raises(ValueError, match="needs the weights"):
        tx.update(params, opt_state)
    with pytest.raises(ValueError, match="holds 0 compression states"):
        jaxcomp.compressed(params, optax.sgd(0.1).init(params))
    with pytest.raises(ValueError, match="holds 0 compression states"):
        jaxcomp.pack(params, None)
    twice = jaxcomp.wrap_optimizer(optax.sgd(0.1), identity())
    with pytest.raises(ValueError, match="holds 2 compression states"):
        jaxcomp.compressed(params, (opt_state, twice.init(params)))


def test_a_model_that_diverged_is_not_packed():
    params = methods.params()
    opt_state = jaxcomp.wrap_optimizer(optax.sgd(0.1), quantize.train(Format(4))).init(params)
    params["second"]["kernel"] = params["second"]["kernel"].at[0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match="second/kernel: 1 of 32 values are NaN"):
        jaxcomp.pack(params, opt_state)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.Dense(8)(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        return nn.Dense(4)(nn.relu(x))


def test_train_state_with_batch_norm():
    x, y = methods.batch()
    variables = Net().init(jax.random.key(0), x, train=True)
    method = chain(pruner(0.6), share.train(4, begin=3))
    tx = jaxcomp.wrap_optimizer(optax.adamw(0.01), method)
    state = TrainState.create(apply_fn=Net().apply, params=variables["params"], tx=tx)
    stats = variables["batch_stats"]

    @jax.jit
    def step(state, stats):
        def loss(params):
            params = jaxcomp.compressed(params, state.opt_state)
            out, new = state.apply_fn(
                {"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"]
            )
            return jnp.mean((out - y) ** 2), new["batch_stats"]

        grads, stats_new = jax.grad(loss, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads), stats_new

    for _ in range(6):
        state, stats = step(state, stats)
    packed = jaxcomp.pack(state.params, state.opt_state)
    run_net = jax.jit(lambda p: Net().apply({"params": p, "batch_stats": stats}, x, train=False))
    seen = jaxcomp.compressed(state.params, state.opt_state)
    np.testing.assert_allclose(run_net(packed), run_net(seen), rtol=1e-6)
    assert float(jnp.mean(packed["Dense_0"]["kernel"].decode() == 0)) == pytest.approx(
        0.6, abs=0.02
    )


class Module(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(6, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 4, rngs=rngs)])

    def __call__(self, x):
        x = self.dropout(nnx.relu(self.norm(self.first(x))))
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize(
    "method",
    [pruner(), quantize.train(Format(4)), chain(pruner(), share.train(4, begin=3))],
    ids=["prune", "quantize", "chain"],
)
def test_nnx_loop(method):
    x, y = methods.batch()
    model = Module(nnx.Rngs(0))
    optimizer = nnx.Optimizer(
        model, jaxcomp.wrap_optimizer(optax.adamw(0.01), method), wrt=nnx.Param
    )

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return jnp.mean((jaxcomp.compressed(model, optimizer.opt_state)(x) - y) ** 2)

        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    mean_before, count_before = model.norm.mean[...], model.dropout.rngs.count[...]
    for _ in range(6):
        value = step(model, optimizer)
    assert np.isfinite(value)
    assert not np.allclose(model.norm.mean[...], mean_before), "batch statistics must be updated"
    assert model.dropout.rngs.count[...] > count_before, "dropout must draw new masks"
    packed = jaxcomp.pack(model, optimizer.opt_state)
    assert isinstance(packed.layers[0].kernel[...], jax.Array)
    assert isinstance(
        packed.layers[0].kernel.get_value(),
        jaxcomp.CompressedArray,
    )
    assert packed.norm.mean is not model.norm.mean
    model.eval()
    packed.eval()
    seen = jaxcomp.compressed(model, optimizer.opt_state)
    np.testing.assert_allclose(packed(x), seen(x), rtol=1e-5, atol=1e-6)


def test_the_inner_optimizer_sees_nodes_only_where_something_is_learned():
    shown = []

    def init(params):
        shown.append(params)
        return optax.EmptyState()

    spy = optax.GradientTransformation(init, lambda u, s, p=None: (u, s))
    method = jaxcomp.partition({"first/*": share.train(4), "second/*": pruner()})
    jaxcomp.wrap_optimizer(spy, method).init(methods.params())
    assert isinstance(shown[0]["first"]["kernel"], Trained)
    assert shown[0]["second"]["kernel"].shape == (8, 4)
    assert shown[0]["first"]["bias"].shape == (8,)


def test_the_mask_rides_in_the_optimizers_own_kernels():
    """A pruned step has the plain step's passes over the weights and none more."""

    def passes(tx, see):
        params = {"kernel": jnp.ones((512, 256))}

        def step(params, opt_state, x):
            grads = jax.grad(lambda p: jnp.sum((x @ see(p, opt_state)["kernel"]) ** 2))(params)
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        lowered = jax.jit(step).lower(params, tx.init(params), jnp.ones((8, 512)))
        text = lowered.compile().as_text()
        entry = text[text.index("ENTRY") :].splitlines()
        return sum("= f32[512,256]" in line and "fusion(" in line for line in entry)

    plain = passes(optax.adam(0.01), lambda params, opt_state: params)
    assert plain > 0
    assert passes(jaxcomp.wrap_optimizer(optax.adam(0.01), pruner()), jaxcomp.compressed) == plain
