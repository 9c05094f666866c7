"""Removing channels from whole models."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcomp
from jaxcomp import prune
from jaxcomp.prune.channels import scores as channel_scores
from tests.model.cases import randomize
from tests.model.cutting import difference
from tests.model.zoo import ZOO

RNG = np.random.default_rng(0)


def normal(*shape):
    return jax.device_put(RNG.normal(size=shape).astype(np.float32))


PARAMS = {"w0": normal(6, 16), "b0": normal(16), "w1": normal(16, 12), "w2": normal(12, 3)}
X = normal(5, 6)


def mlp(p, x):
    return jax.nn.relu(jax.nn.sigmoid(x @ p["w0"] + p["b0"]) @ p["w1"]) @ p["w2"]


def loss(p, x, y):
    return ((mlp(p, x) - y) ** 2).mean()


BATCHES = [(normal(5, 6), normal(5, 3)) for _ in range(3)]


def test_the_lowest_l1_of_the_whole_group_go():
    smaller = prune.channels(mlp, PARAMS, X, sparsity=0.25)
    hidden = np.abs(PARAMS["w0"]).sum(0) + np.abs(PARAMS["b0"]) + np.abs(PARAMS["w1"]).sum(1)
    assert smaller.kept["b0"][0].tolist() == sorted(np.argsort(hidden)[4:].tolist())
    np.testing.assert_array_equal(smaller.params["w0"], PARAMS["w0"][:, smaller.kept["b0"][0]])
    assert smaller.shapes["w1"] == ((16, 12), (12, 9))
    assert difference(mlp(smaller.masked, X), smaller.apply(smaller.params, X)) < 1e-6
    assert (np.asarray(smaller.masked["b0"]) != 0).sum() == 12


def test_the_print_out_names_shapes_and_totals():
    lines = str(prune.channels(mlp, PARAMS, X, sparsity=0.5)).splitlines()
    assert lines[:4] == [
        "b0 (16,) → (8,)",
        "w0 (6, 16) → (6, 8)",
        "w1 (16, 12) → (8, 6)",
        "w2 (12, 3) → (6, 3)",
    ]
    assert lines[4] == "MACs: 1,620 → 570 (35.2%)"
    assert lines[6] == "parameters: 340 → 122 (35.9%)"
    assert lines[7] == "bytes: 1,360 → 488 (35.9%)"


@pytest.mark.parametrize(
    ("score", "given"),
    [
        (channel_scores.l1, {}),
        (channel_scores.l2, {}),
        (channel_scores.taylor, {"loss": loss, "batches": BATCHES}),
        (channel_scores.fisher, {"loss": loss, "batches": BATCHES}),
        (channel_scores.activation_norm, {"batches": BATCHES}),
        (channel_scores.random, {"key": jax.random.key(3)}),
        (lambda group: -jnp.arange(group.size), {}),
    ],
)
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_every_score_cuts_as_much_and_keeps_the_law(score, given, scope):
    smaller = prune.channels(mlp, PARAMS, X, score=score, sparsity=0.5, scope=scope, **given)
    removed = sum(n - len(smaller.kept[path][0]) for path, n in (("b0", 16), ("w2", 12)))
    assert removed == 14
    assert difference(mlp(smaller.masked, X), smaller.apply(smaller.params, X)) < 1e-6


def test_gradient_scores_are_those_of_a_plain_loop():
    gradient = jax.jit(jax.grad(loss))
    grads = [jax.tree.map(np.asarray, gradient(PARAMS, *batch)) for batch in BATCHES]
    total = jax.tree.map(lambda *g: sum(g), *grads)
    products = {path: total[path] * np.asarray(PARAMS[path]) for path in PARAMS}
    expected = np.abs(products["w1"].sum(0) + products["w2"].sum(1))
    smaller = prune.channels(
        mlp, PARAMS, X, score=channel_scores.taylor, sparsity=0.5, loss=loss, batches=BATCHES
    )
    assert smaller.kept["w2"][0].tolist() == sorted(np.argsort(expected)[6:].tolist())
    squares = jax.tree.map(lambda *g: sum(x**2 for x in g), *grads)
    weights = jax.tree.map(np.asarray, PARAMS)
    fisher = sum((squares[p] * weights[p] ** 2).sum(a) for p, a in (("w1", 0), ("w2", 1)))
    smaller = prune.channels(
        mlp, PARAMS, X, score=channel_scores.fisher, sparsity=0.5, loss=loss, batches=BATCHES
    )
    assert smaller.kept["w2"][0].tolist() == sorted(np.argsort(fisher)[6:].tolist())


def test_activation_scores_are_the_mean_squares_of_what_readers_see():
    weights = jax.tree.map(np.asarray, PARAMS)
    inputs = np.concatenate([x for x, _ in BATCHES])
    first = 1 / (1 + np.exp(-(inputs @ weights["w0"] + weights["b0"])))
    second = np.maximum(first @ weights["w1"], 0)
    smaller = prune.channels(
        mlp, PARAMS, X, score=channel_scores.activation_norm, sparsity=0.5, batches=BATCHES
    )
    for path, seen in (("b0", first), ("w2", second)):
        order = np.argsort((seen**2).mean(0), kind="stable")
        assert smaller.kept[path][0].tolist() == sorted(order[len(order) // 2 :].tolist())


@pytest.mark.parametrize("kind", ["flops", "macs", "parameters", "bytes"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_budget_is_met_and_one_unit_less_would_not_meet_it(kind, scope):
    budget = prune.Budget(**{kind: 0.6})
    smaller = prune.channels(mlp, PARAMS, X, budget=budget, scope=scope)
    limit = 0.6 * getattr(smaller.before, kind)
    assert getattr(smaller.after, kind) <= limit
    kept = {path: len(smaller.kept[path][0]) for path in ("b0", "w2")}
    if scope == "global":
        more = prune.channels(
            mlp, PARAMS, X, scope=scope, sparsity=(28 - sum(kept.values()) - 1) / 28
        )
        assert getattr(more.after, kind) > limit


def test_the_counted_size_is_that_of_the_smaller_model_itself():
    case = ZOO["resnet"]()
    smaller = prune.channels(case.apply_fn, case.params, *case.inputs, sparsity=0.5)
    traced = jaxcomp.model.trace(smaller.apply, smaller.params, *case.inputs)
    assert smaller.after.macs == traced.total.macs
    assert smaller.after.parameters == traced.parameters
    assert smaller.after.bytes == traced.parameter_bytes == jaxcomp.nbytes(smaller.params)


def test_a_measured_budget_removes_something_and_says_what_it_took():
    wide = {"w0": normal(64, 1024), "b0": normal(1024), "w1": normal(1024, 1024)}
    wide["w2"] = normal(1024, 3)
    x = normal(64, 64)
    dense = prune.channels(
        mlp, wide, x, budget=prune.Budget(milliseconds=1e6), scope="layer", progress=False
    )
    assert dense.after == dense.before
    (note,) = dense.notes
    taken = float(note.split()[1])
    # A sixth, so that a machine that was busy the first time has something to remove all the same.
    smaller = prune.channels(
        mlp, wide, x, budget=prune.Budget(milliseconds=taken / 6), round_to=128, progress=False
    )
    assert smaller.after.macs < dense.before.macs
    assert smaller.notes[0].startswith("budget: ")


def test_round_to_keep_and_limits():
    smaller = prune.channels(mlp, PARAMS, X, sparsity=0.6, round_to=8)
    assert [len(smaller.kept[path][0]) for path in ("b0", "w2")] == [8, 8]
    assert any("w1[1]" in note for note in smaller.notes) or smaller.shapes["w2"][1] == (8, 3)
    smaller = prune.channels(mlp, PARAMS, X, sparsity=0.5, keep=["b0"])
    assert smaller.kept["b0"] == (None,)
    assert smaller.shapes["w2"] == ((12, 3), (6, 3))
    smaller = prune.channels(mlp, PARAMS, X, sparsity=0.75, limits={"w2": 0.25})
    assert (len(smaller.kept["b0"][0]), len(smaller.kept["w2"][0])) == (4, 9)
    assert any("6" not in note and "w1[1]" in note for note in smaller.notes)


def test_heads_and_head_sizes_are_groups_of_one_call():
    case = ZOO["vit"]()
    smaller = prune.channels(
        case.apply_fn, case.params, *case.inputs, sparsity=0.5, keep=["*/query/kernel[2]"]
    )
    path = next(path for path in smaller.kept if path.endswith("query/kernel"))
    before, after = smaller.shapes[path]
    assert after[1] < before[1]
    assert after[2] == before[2]


def test_nnx_modules_run_on_the_smaller_parameters_themselves():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(6, 16, rngs=rngs)
            self.norm = nnx.BatchNorm(16, use_running_average=True, rngs=rngs)
            self.second = nnx.Linear(16, 3, rngs=rngs)

        def __call__(self, x):
            return self.second(nnx.relu(self.norm(self.first(x))))

    graph, state = nnx.split(nnx.eval_shape(lambda: Net(nnx.Rngs(0))))
    state = randomize(state)
    smaller = prune.channels(lambda s, x: nnx.merge(graph, s)(x), state, X, sparsity=0.5)
    result = nnx.merge(graph, smaller.params)(X)
    assert difference(nnx.merge(graph, smaller.masked)(X), result) < 1e-6
    assert nnx.merge(graph, smaller.params).first.kernel.shape == (6, 8)


def test_a_linen_model_runs_on_with_the_widths_of_the_report():
    class Net(nn.Module):
        widths: tuple[int, ...]

        @nn.compact
        def __call__(self, x):
            for width in self.widths:
                x = nn.relu(nn.Dense(width)(x))
            return nn.Dense(3)(x)

    variables = randomize(jax.eval_shape(Net((16, 12)).init, jax.random.key(0), X))
    smaller = prune.channels(Net((16, 12)).apply, variables, X, sparsity=0.5)
    widths = tuple(smaller.shapes[f"params/Dense_{i}/kernel"][1][-1] for i in (0, 1))
    assert widths == (8, 6)
    masked = Net((16, 12)).apply(smaller.masked, X)
    assert difference(masked, Net(widths).apply(smaller.params, X)) < 1e-6


def test_training_goes_on_with_the_optimizer_as_it_was():
    tx = optax.adam(1e-2)

    def compiled(loss):
        @jax.jit
        def step(params, opt_state, *batch):
            updates, opt_state = tx.update(jax.grad(loss)(params, *batch), opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        return step

    opt_state, params, step = tx.init(PARAMS), PARAMS, compiled(loss)
    for batch in BATCHES:
        params, opt_state = step(params, opt_state, *batch)
    smaller = prune.channels(mlp, params, X, sparsity=0.5)
    state = smaller.shrink(opt_state)
    small_loss = smaller.rewrite(loss)
    before = float(small_loss(smaller.params, *BATCHES[0]))
    assert before == pytest.approx(float(loss(smaller.masked, *BATCHES[0])), rel=1e-5)
    small, step = smaller.params, compiled(small_loss)
    for _ in range(20):
        small, state = step(small, state, *BATCHES[0])
    assert float(small_loss(small, *BATCHES[0])) < before / 2


def test_a_smaller_model_can_be_cut_again_and_saved(tmp_path):
    once = prune.channels(mlp, PARAMS, X, sparsity=0.5)
    twice = prune.channels(once.apply, once.params, X, sparsity=0.5)
    assert twice.params["w1"].shape == (4, 3)
    assert difference(once.apply(twice.masked, X), twice.apply(twice.params, X)) < 1e-6
    jaxcomp.save(tmp_path / "small.jxc", twice.params)
    loaded = jaxcomp.load(tmp_path / "small.jxc")
    np.testing.assert_array_equal(twice.apply(loaded, X), twice.apply(twice.params, X))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_parameters_lose_the_same_channels_and_stay_sharded(kind):
    mesh = jax.make_mesh((4,), ("model",), axis_types=(kind,))
    specs = {"w0": P(None, "model"), "b0": P("model"), "w1": P("model"), "w2": P()}

    def model(p, x):
        h = jax.nn.sigmoid(x @ p["w0"] + p["b0"])
        # Explicit axes want to know where a product of sharded axes goes.
        where = {"out_sharding": P()} if kind == AxisType.Explicit else {}
        return jax.nn.relu(jnp.dot(h, p["w1"], **where)) @ p["w2"]

    expected = prune.channels(mlp, PARAMS, X, sparsity=0.5)
    with jax.set_mesh(mesh):
        place = lambda path: NamedSharding(mesh, specs[path])
        sharded = {path: jax.device_put(leaf, place(path)) for path, leaf in PARAMS.items()}
        smaller = prune.channels(model, sharded, X, sparsity=0.5)
        result = jax.jit(smaller.apply)(smaller.params, X)
    for path in PARAMS:
        np.testing.assert_array_equal(smaller.params[path], expected.params[path])
        np.testing.assert_array_equal(smaller.masked[path], expected.masked[path])
        assert smaller.params[path].sharding.is_equivalent_to(place(path), PARAMS[path].ndim)
    assert difference(expected.apply(expected.params, X), result) < 1e-6


def test_the_smaller_model_can_be_quantized_like_any_other():
    smaller = prune.channels(mlp, PARAMS, X, sparsity=0.5)
    method = jaxcomp.quantize.train(jaxcomp.quantize.Format(8))
    packed = method.pack(smaller.params, method.init(smaller.params))
    exact = smaller.apply(smaller.params, X)
    assert difference(exact, smaller.apply(jaxcomp.decode(packed), X)) < 0.05


@pytest.mark.parametrize(
    ("how", "error", "words"),
    [
        ({}, ValueError, "give sparsity="),
        ({"sparsity": 0.5, "budget": prune.Budget(flops=0.5)}, ValueError, "give sparsity="),
        ({"sparsity": 1.0}, ValueError, "sparsity"),
        ({"sparsity": 0.5, "keep": "b1"}, ValueError, "pattern 'b1' matches no group"),
        ({"sparsity": 0.5, "keep": ["nothing"]}, ValueError, "pattern 'nothing' matches no group"),
        ({"sparsity": 0.5, "keep": ["*"]}, ValueError, "no channel of this model can be cut"),
        ({"sparsity": 0.5, "limits": {"w1": 2.0}}, ValueError, "limits"),
        ({"sparsity": 0.5, "score": channel_scores.taylor}, ValueError, "pass loss"),
        ({"sparsity": 0.5, "score": channel_scores.random}, ValueError, "pass key"),
        ({"sparsity": 0.5, "loss": loss}, ValueError, "leave loss out"),
        ({"sparsity": 0.5, "batches": BATCHES}, ValueError, "leave batches out"),
        ({"sparsity": 0.5, "score": channel_scores.batch_norm_scale}, ValueError, "no normaliz"),
        ({"sparsity": 0.5, "score": lambda g: jnp.full(g.size, jnp.nan)}, ValueError, "NaN"),
        ({"budget": prune.Budget(parameters=1)}, ValueError, "cannot be met"),
        ({"sparsity": 0.5, "score": channel_scores.fisher, "loss": loss, "batches": []},
         ValueError, "batches is empty"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_before_anything_changes(how, error, words):
    with pytest.raises(error, match=words):
        prune.channels(mlp, PARAMS, X, **how)


def test_compressed_parameters_are_refused_by_path():
    method = jaxcomp.quantize.train(jaxcomp.quantize.Format(8))
    packed = method.pack(PARAMS, method.init(PARAMS))
    with pytest.raises(TypeError, match=r"w0: QuantizedArray is compressed already"):
        prune.channels(mlp, packed, X, sparsity=0.5)


def test_widths_of_norms_stay_and_the_reason_is_printed():
    case = ZOO["bert split"]()
    kept = prune.channels(case.apply_fn, case.params, *case.inputs, sparsity=0.5)
    assert "takes a mean over it" in str(kept)
    cut = prune.channels(case.apply_fn, case.params, *case.inputs, sparsity=0.5, renormalize=True)
    assert any("masked and smaller differ" in note for note in cut.notes)
    assert cut.after.parameters < kept.after.parameters
    for leaf in jax.tree.leaves(jax.jit(cut.apply)(cut.params, *case.inputs)):
        assert np.isfinite(leaf).all()
