"""Intermediate values by name: against Flax's own capture, in every framework and around it."""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec

from jaxcomp import QuantizedArray, quantize
from jaxcomp.distill.features import features, frozen, list_features

X = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)


class Block(nn.Module):
    """A residual block whose activation has a name."""

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm(name="norm")(x)
        y = checkpoint_name(nn.relu(nn.Dense(8, name="up")(y)), "act")
        self.sow("intermediates", "kept", y)
        return x + nn.Dense(4, name="down")(y)


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = Block(name="b0")(x)
        x = nn.remat(Block)(name="b1")(x)
        return nn.Dense(2, name="head")(x)


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            lambda layer, x, _: (layer(x), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        x, _ = layers(Block(name="layers"), x, None)
        return nn.Dense(2, name="head")(x)


MODEL, SCANNED = Model(), Scanned()
PARAMS = MODEL.init(jax.random.key(0), X)
DEEP = SCANNED.init(jax.random.key(1), X)


def equal(actual, expected, tolerance=1e-6):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


class TestAgainstFlax:
    def test_scopes_are_what_flax_captures_of_every_module(self):
        outputs, kept = MODEL.apply(PARAMS, X, capture_intermediates=True)
        calls = flatten_dict(kept["intermediates"])
        expected = {"/".join(("Model", *k[:-1])): v[0] for k, v in calls.items() if k[-1] != "kept"}
        found = features(MODEL.apply, PARAMS, X, at="Model*")
        assert found.values.keys() == expected.keys()
        assert len(expected) == 10
        for name, value in expected.items():
            equal(found.values[name], value)
        equal(found.outputs, outputs)

    def test_a_bias_is_what_its_layer_returns_and_a_kernel_that_without_the_bias(self):
        values = features(MODEL.apply, PARAMS, X, at=["Model/*/up", "*/up/*"]).values
        for block in ("b0", "b1"):
            bias = PARAMS["params"][block]["up"]["bias"]
            equal(values[f"params/{block}/up/bias"], values[f"Model/{block}/up"], 0)
            equal(values[f"params/{block}/up/kernel"] + bias, values[f"Model/{block}/up"])

    def test_named_values_and_sown_values_are_the_same(self):
        def apply(params, x):
            return MODEL.apply(params, x, mutable=["intermediates"])

        (_, sown), values = features(apply, PARAMS, X, at=["act*", "outputs/*/kept/*"])
        for name, block in (("act", "b0"), ("act#2", "b1")):
            equal(values[name], sown["intermediates"][block]["kept"][0], 0)
            equal(values[f"outputs/1/intermediates/{block}/kept/0"], values[name], 0)
        assert len(values) == 4

    def test_scanned_layers_come_stacked(self):
        values = features(SCANNED.apply, DEEP, X, at=["params/layers/*", "act", "Scanned"]).values
        x = X
        for i in range(3):
            own = jax.tree.map(lambda leaf, i=i: leaf[i], DEEP["params"]["layers"])
            x, kept = Block().apply({"params": own}, x, capture_intermediates=True)
            up = kept["intermediates"]["up"]["__call__"][0]
            equal(values["params/layers/up/bias"][i], up, 1e-5)
            equal(values["act"][i], np.maximum(up, 0), 1e-5)
        assert values["params/layers/down/kernel"].shape == (3, 5, 4)
        equal(values["Scanned"], SCANNED.apply(DEEP, X))


class TestFrameworks:
    """One network, five ways to write it, the same values."""

    FIRST = np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32)
    LAST = np.random.default_rng(2).normal(size=(3, 2)).astype(np.float32)

    def check(self, apply, params, first, last):
        outputs, values = features(jax.jit(apply), params, X, at=[first, last])
        hidden = X @ self.FIRST + 1
        equal(values[first], hidden, 1e-5)
        equal(values[last], np.tanh(hidden) @ self.LAST, 1e-5)
        equal(outputs, np.tanh(hidden) @ self.LAST, 1e-5)

    def test_plain(self):
        params = {"a": self.FIRST, "b": np.ones(3, np.float32), "c": self.LAST}
        self.check(lambda p, x: jnp.tanh(x @ p["a"] + p["b"]) @ p["c"], params, "b", "c")

    def test_nnx(self):
        class Net(nnx.Module):
            def __init__(self, rngs):
                self.first = nnx.Linear(4, 3, rngs=rngs)
                self.last = nnx.Linear(3, 2, use_bias=False, rngs=rngs)

            def __call__(self, x):
                return self.last(jnp.tanh(self.first(x)))

        net = Net(nnx.Rngs(0))
        net.first.kernel[...], net.first.bias[...] = self.FIRST, np.ones(3)
        net.last.kernel[...] = self.LAST
        graph, state = nnx.split(net)
        self.check(lambda p, x: nnx.merge(graph, p)(x), state, "first/bias", "last/kernel")

    def test_equinox(self):
        net = eqx.nn.MLP(4, 2, 3, 1, jnp.tanh, key=jax.random.key(0), use_final_bias=False)
        arrays, rest = eqx.partition(net, eqx.is_array)
        arrays = eqx.tree_at(
            lambda n: (n.layers[0].weight, n.layers[0].bias, n.layers[1].weight),
            arrays,
            (jnp.asarray(self.FIRST.T), jnp.ones(3), jnp.asarray(self.LAST.T)),
        )
        self.check(
            lambda p, x: jax.vmap(eqx.combine(p, rest))(x),
            arrays,
            "layers/0/bias",
            "layers/1/weight",
        )

    def test_haiku(self):
        net = hk.without_apply_rng(
            hk.transform(
                lambda x: hk.Linear(2, with_bias=False)(jnp.tanh(hk.Linear(3, name="in")(x)))
            )
        )
        params = {"in": {"w": self.FIRST, "b": np.ones(3)}, "linear": {"w": self.LAST}}
        self.check(net.apply, params, "in/b", "linear/w")


class TestTransformations:
    @pytest.mark.parametrize(("model", "params"), [(MODEL, PARAMS), (SCANNED, DEEP)])
    def test_gradients_through_values_are_those_of_flax(self, model, params):
        rows = ["b0", "b1"] if model is MODEL else ["layers"]

        def ours(params):
            _, values = features(model.apply, params, X, at="act*")
            return sum(jnp.square(value).sum() for value in values.values())

        def flax(params):
            variables = {"params": params["params"]}
            if model is MODEL:
                _, kept = model.apply(variables, X, mutable=["intermediates"])
                return sum(jnp.square(kept["intermediates"][r]["kept"][0]).sum() for r in rows)
            total, x = 0.0, X
            for i in range(3):
                own = jax.tree.map(lambda leaf, i=i: leaf[i], params["params"]["layers"])
                x, kept = Block().apply({"params": own}, x, mutable=["intermediates"])
                total += jnp.square(kept["intermediates"]["kept"][0]).sum()
            return total

        actual, expected = jax.jit(jax.grad(ours))(params), jax.jit(jax.grad(flax))(params)
        jax.tree.map(lambda a, b: equal(a, b, 2e-5), actual, expected)
        assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected)) > 0.1

    def test_vmap_and_eager_and_jit_agree(self):
        one = lambda x: features(MODEL.apply, PARAMS, x, at="Model/b0").values["Model/b0"]
        eager = one(X)
        equal(jax.jit(one)(X), eager)
        equal(jax.vmap(one)(X), eager)

    def test_nothing_is_compiled_again_and_any_batch_size_will_do(self):
        traced = []

        @jax.jit
        def step(params, x):
            traced.append(x.shape)
            return features(MODEL.apply, params, x, at="Model/*").values["Model/b1"]

        for size in (5, 5, 2, 5):
            assert step(PARAMS, np.ones((size, 4), np.float32)).shape == (size, 4)
        assert traced == [(5, 4), (2, 4)]

    def test_nothing_is_computed_twice(self):
        both = jax.jit(lambda p, x: tuple(features(MODEL.apply, p, x, at="Model/*")))
        text = both.lower(PARAMS, X).as_text()
        assert text.count("stablehlo.dot_general") == 5

    def test_sharded_batches(self):
        mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        x = np.random.default_rng(3).normal(size=(16, 4)).astype(np.float32)
        sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
        run = jax.jit(lambda x: features(SCANNED.apply, DEEP, x, at="act").values["act"])
        found = run(sharded)
        equal(found, run(x))
        assert found.sharding.shard_shape(found.shape)[1] == 2

    def test_inside_a_scan_over_batches_and_with_closed_over_values(self):
        def mean(carry, x):
            scale = carry + 1.0  # a value of this trace, which the model closes over
            _, values = features(lambda p, x: (x * scale) @ p, jnp.ones((4, 2)), x, at="*")
            (value,) = values.values()
            return carry, value

        _, rows = jax.lax.scan(mean, jnp.float32(1.0), X[None])
        equal(rows[0], 2 * X @ np.ones((4, 2)), 1e-5)

    def test_compressed_leaves_go_by_their_own_path(self):
        packed = dict(PARAMS["params"])
        packed["head"] = {
            "kernel": quantize.encode(packed["head"]["kernel"], quantize.Format(8)),
            "bias": packed["head"]["bias"],
        }
        assert isinstance(packed["head"]["kernel"], QuantizedArray)
        outputs, values = features(MODEL.apply, {"params": packed}, X, at="*/head/kernel")
        equal(values["params/head/kernel"] + packed["head"]["bias"], outputs)


class TestNames:
    def test_a_parameter_that_meets_data_twice_has_two_values(self):
        tied = lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T
        shapes = list_features(tied, {"w": np.ones((4, 3), np.float32)}, X).shapes
        assert {name: shape.shape for name, shape in shapes.items()} == {
            "w": (5, 3),
            "w#2": (5, 4),
        }

    def test_a_look_up(self):
        table = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
        ids = np.array([[1, 2], [6, 0]])
        _, values = features(lambda p, i: nn.relu(p["t"][i]), {"t": table}, ids, at="t")
        equal(values["t"], table[ids], 0)

    def test_what_is_done_to_a_weight_before_it_meets_data_does_not_count(self):
        def apply(p, x):
            centred = p["w"] - p["w"].mean(0)
            return x @ (centred * p["mask"]).astype(jnp.float32)

        params = {"w": np.eye(4, dtype=np.float32), "mask": np.ones((4, 4), np.float32)}
        found = features(apply, params, X, at="*")
        equal(found.values["w"], found.outputs, 0)
        equal(found.values["mask"], found.outputs, 0)

    def test_recurrent_cells_give_every_turn(self):
        cell = nn.RNN(nn.SimpleCell(3))
        x = np.random.default_rng(0).normal(size=(2, 6, 4)).astype(np.float32)
        params = cell.init(jax.random.key(0), x)
        found = features(cell.apply, params, x, at="*/h/kernel")
        (value,) = found.values.values()
        kernel = params["params"]["cell"]["h"]["kernel"]
        equal(value[1:], np.moveaxis(found.outputs, 1, 0)[:-1] @ kernel, 1e-5)

    def test_a_scope_entered_again(self):
        def apply(p, x):
            for _ in range(2):
                with jax.named_scope("layer"):
                    x = x @ p
                x = jnp.sin(x)
            return x

        w = np.eye(4, dtype=np.float32) / 2
        values = features(apply, w, X, at="layer*").values
        equal(values["layer"], X / 2)
        equal(values["layer#2"], np.sin(X / 2) / 2)


class TestErrors:
    def test_a_pattern_that_matches_nothing_names_the_nearest(self):
        with pytest.raises(ValueError, match=r"at: '\*/uq/kernel' matches no named value; nearest"):
            features(MODEL.apply, PARAMS, X, at="*/uq/kernel")

    def test_a_pattern_must_be_a_string(self):
        with pytest.raises(TypeError, match="pattern must be a string, not 3"):
            features(MODEL.apply, PARAMS, X, at=[3])

    @pytest.mark.parametrize(
        ("around", "words"),
        [
            (lambda f: lambda w, x: jax.lax.cond(x.sum() > 0, f, f, w, x), "in a branch of cond"),
            (
                lambda f: (
                    lambda w, x: jax.lax.while_loop(
                        lambda c: c.sum() < 9, lambda c: f(w, c) ** 2 + 1, x
                    )
                ),
                "inside while",
            ),
            (jax.custom_jvp, "own derivative would be lost"),
        ],
    )
    def test_what_cannot_be_had_is_refused_and_listed(self, around, words):
        apply = around(lambda w, x: x * w["inner"])
        if isinstance(apply, jax.custom_jvp):
            apply.defjvp(lambda primals, dots: (primals[1] * 2, primals[1] * 2))
        weights = {"inner": np.ones(4, np.float32)}
        with pytest.raises(ValueError, match=f"'inner' cannot be had: .*{words}"):
            features(apply, weights, X, at="inner*")
        listed = list_features(apply, weights, X)
        assert words in listed.left_out["inner"]
        assert "left out: inner: it is computed" in str(listed)


class TestFrozen:
    def test_no_gradient_flows_and_the_dtype_is_lower(self):
        def loss(params):
            params, x = frozen((params, X), jnp.bfloat16)
            outputs, values = features(MODEL.apply, params, x, at="Model/b0")
            assert outputs.dtype == values["Model/b0"].dtype == jnp.bfloat16
            return outputs.sum().astype(jnp.float32) + values["Model/b0"].sum()

        gradients = jax.jit(jax.grad(loss))(PARAMS)
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradients))

    def test_integers_keys_and_compressed_leaves_stay(self):
        packed = quantize.encode(jnp.ones((4, 4)), quantize.Format(4))
        tree = {"packed": packed, "count": np.arange(3), "key": jax.random.key(0), "w": np.ones(2)}
        kept = frozen(tree, jnp.bfloat16)
        assert kept["count"].dtype == np.arange(3).dtype or kept["count"].dtype == jnp.int32
        assert kept["w"].dtype == jnp.bfloat16
        assert kept["packed"].dtype == jnp.float32
        equal(kept["packed"].decode(), packed.decode(), 0)

    def test_a_dtype_that_is_not_floating(self):
        with pytest.raises(TypeError, match="dtype must be floating"):
            frozen({"w": np.ones(2)}, jnp.int8)
