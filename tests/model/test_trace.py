"""Traces of whole models: FLOPs against XLA's own count, axes, notes and the table."""

import functools

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxcomp.model.program import read
from jaxcomp.model.trace import trace
from jaxcomp.model.uses import find_uses

F32 = np.float32


def ones(*shape):
    return np.ones(shape, F32)


def xla(function, *inputs):
    """FLOPs and transcendentals by XLA's own analysis, before it optimizes."""
    found = jax.jit(function).lower(*inputs).cost_analysis() or {}
    return found.get("flops", 0), found.get("transcendentals", 0)


class Residual(nn.Module):
    width: int
    stride: int = 1

    @nn.compact
    def __call__(self, x):
        norm = functools.partial(nn.BatchNorm, use_running_average=True)
        y = nn.Conv(self.width, (3, 3), self.stride, use_bias=False)(x)
        y = nn.Conv(self.width, (3, 3), use_bias=False)(nn.relu(norm()(y)))
        y = norm()(y)
        if x.shape != y.shape:
            x = norm()(nn.Conv(self.width, (1, 1), self.stride, use_bias=False)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(8, (3, 3))(x)))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for width, stride in ((8, 1), (16, 2)):
            x = Residual(width, stride)(x)
        return nn.Dense(10)(x.mean((1, 2)))


class Inverted(nn.Module):
    width: int
    stride: int = 1

    @nn.compact
    def __call__(self, x):
        hidden = 4 * x.shape[-1]
        conv = functools.partial(nn.Conv, use_bias=False)
        norm = functools.partial(nn.BatchNorm, use_running_average=True)
        y = nn.relu6(norm()(conv(hidden, (1, 1))(x)))
        y = conv(hidden, (3, 3), self.stride, feature_group_count=hidden)(y)
        y = norm()(conv(self.width, (1, 1))(nn.relu6(norm()(y))))
        return x + y if x.shape == y.shape else y


class MobileNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu6(nn.Conv(8, (3, 3), 2)(x))
        for width, stride in ((8, 1), (16, 2)):
            x = Inverted(width, stride)(x)
        return nn.Dense(10)(x.mean((1, 2)))


class ViT(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(16, (4, 4), (4, 4))(x).reshape(x.shape[0], -1, 16)
        token = self.param("token", nn.initializers.zeros, (1, 1, 16))
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, 16)), x], 1)
        x = x + self.param("position", nn.initializers.normal(), (1, x.shape[1], 16))
        for _ in range(2):
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(4, deterministic=True)(y, y)
            x = x + nn.Dense(16)(nn.gelu(nn.Dense(32)(nn.LayerNorm()(x))))
        return nn.Dense(10)(nn.LayerNorm()(x)[:, 0])


class Decoder(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embedding = nn.Embed(50, 16)
        x, mask = embedding(tokens), nn.make_causal_mask(tokens)
        dense = functools.partial(nn.Dense, use_bias=False)
        for _ in range(2):
            y = nn.RMSNorm()(x)
            attention = nn.MultiHeadDotProductAttention(4, deterministic=True, use_bias=False)
            x = x + attention(y, y, mask=mask)
            y = nn.RMSNorm()(x)
            x = x + dense(16)(nn.silu(dense(32)(y)) * dense(32)(y))
        return embedding.attend(nn.RMSNorm()(x))


IMAGE, TOKENS = ones(2, 16, 16, 3), np.zeros((2, 12), np.int32)


def initialized(model, inputs):
    return jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, leaf.dtype),
        jax.eval_shape(model.init, jax.random.key(0), inputs),
    )


@pytest.mark.parametrize(
    ("model", "inputs"),
    [(ResNet(), IMAGE), (MobileNet(), IMAGE), (ViT(), IMAGE), (Decoder(), TOKENS)],
)
def test_flops_are_xlas(model, inputs):
    params = initialized(model, inputs)
    found = trace(model.apply, params, inputs)
    flops, transcendentals = xla(model.apply, params, inputs)
    assert found.total.flops == flops
    # XLA folds the square root of a literal head size, two to a layer.
    assert 0 <= found.total.transcendentals - transcendentals <= 2
    assert not found.uncounted
    assert not found.unused
    assert not found.notes


@pytest.mark.parametrize(
    "function",
    [
        lambda w, x: (x * w + 0) * 1 - 0.0,
        lambda w, x: x * w - jnp.zeros((3, 4)),
        lambda w, x: 0 - x * w,
        lambda w, x: jnp.logaddexp(x * w, 0.0),
        lambda w, x: jax.nn.softplus(x * w) / 1,
    ],
)
def test_neutral_literals_cost_nothing(function):
    found = trace(function, ones(3, 4), ones(3, 4)).total
    assert (found.flops, found.transcendentals) == xla(function, ones(3, 4), ones(3, 4))


def test_a_scan_costs_what_its_turns_cost():
    params, x = {"kernel": ones(5, 8, 8), "bias": ones(5, 8)}, ones(3, 8)

    def layer(h, leaf):
        return jnp.tanh(h @ leaf["kernel"] + leaf["bias"]), None

    def looped(p, x):
        return lax.scan(layer, x, p)[0]

    def unrolled(p, x):
        for i in range(5):
            x, _ = layer(x, {name: leaf[i] for name, leaf in p.items()})
        return x

    found = trace(looped, params, x)
    assert (found.total.flops, found.total.transcendentals) == xla(unrolled, params, x)
    ((use, cost),) = found.leaves["kernel"].uses
    assert (use.trips, cost.macs) == (5, 5 * 3 * 8 * 8)


def test_a_while_loop_is_counted_once_and_says_so():
    def model(p, x):
        return lax.while_loop(lambda h: h.sum() > 1, lambda h: h @ p, x)

    found = trace(model, ones(4, 4), ones(2, 4))
    assert found.total.macs == 2 * 4 * 4
    assert any("while" in note and "per iteration" in note for note in found.notes)
    assert "per iteration" in str(found)
    assert "?" in str(found)


def test_a_cond_is_its_dearest_branch_and_says_so():
    def model(p, x):
        return lax.cond(x.sum() > 0, lambda: x @ p["a"] @ p["b"], lambda: x @ p["a"] @ p["c"])

    params = {"a": ones(4, 64), "b": ones(64, 4), "c": ones(64, 4)}
    found = trace(model, params, ones(2, 4))
    assert found.total.macs == 2 * (2 * 4 * 64)
    assert not found.notes

    def uneven(p, x):
        return lax.cond(x.sum() > 0, lambda: x @ p["a"] @ p["b"], lambda: x)

    found = trace(uneven, params, ones(2, 4))
    assert found.total.macs == 2 * (2 * 4 * 64)
    assert any("dearest" in note for note in found.notes)
    assert found.unused == ("c",)


def test_a_sharded_function_costs_what_the_whole_does():
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

    def local(w, x):
        return lax.psum(x @ w, "a")

    sharded = jax.shard_map(
        local, mesh=mesh, in_specs=(P("a"), P("b", "a")), out_specs=P("b"), check_vma=False
    )
    whole = trace(lambda w, x: x @ w, ones(8, 6), ones(4, 8))
    found = trace(sharded, ones(8, 6), ones(4, 8))
    assert found.total.macs == whole.total.macs
    assert found.output_axes("") == (1,)


def with_jvp(function):
    wrapped = jax.custom_jvp(function)
    wrapped.defjvp(lambda primals, tangents: jax.jvp(function, primals, tangents))
    return wrapped


def with_vjp(function):
    wrapped = jax.custom_vjp(function)
    wrapped.defvjp(lambda *args: jax.vjp(function, *args), lambda pull, g: pull(g))
    return wrapped


@pytest.mark.parametrize(
    "wrap",
    [jax.jit, jax.checkpoint, lambda f: jax.vmap(f, (None, 0)), with_jvp, with_vjp],
)
def test_wrappers_cost_nothing(wrap):
    def model(w, x):
        return jnp.tanh(x @ w)

    plain = trace(model, ones(4, 6), ones(3, 4))
    found = trace(wrap(model), ones(4, 6), ones(3, 4))
    assert found.total.flops == plain.total.flops
    assert found.output_axes("") == (1,)


def test_a_training_step_can_be_traced():
    def loss(w, x):
        return (jnp.tanh(x @ w) ** 2).sum()

    found = trace(jax.grad(loss, (0, 1)), ones(4, 6), ones(3, 4))
    assert found.total.macs == 3 * (3 * 4 * 6)


def test_what_is_not_counted_is_named():
    def model(w, x):
        return x @ jnp.linalg.cholesky(w)

    found = trace(model, np.eye(3, dtype=F32), ones(2, 3))
    assert found.uncounted == {"cholesky": 1}
    assert "not counted: FLOPs of cholesky" in str(found)


def test_axes_of_stacked_and_attention_leaves():
    found = trace(Decoder().apply, initialized(Decoder(), TOKENS), TOKENS)
    base = "params/MultiHeadDotProductAttention_0/"
    assert found.input_axes(base + "query/kernel") == (0,)
    assert found.output_axes(base + "query/kernel") == (1, 2)
    assert found.input_axes(base + "out/kernel") == (0, 1)
    assert found.output_axes(base + "out/kernel") == (2,)
    with pytest.raises(ValueError, match=r"Embed_0/embedding: its uses disagree on the output"):
        found.output_axes("params/Embed_0/embedding")


def test_element_wise_uses_do_not_outvote_a_product():
    def model(p, x):
        return x @ p["w"], 1e-4 * x[0, 0] * p["w"].T

    found = trace(model, {"w": ones(4, 6)}, ones(3, 4))
    assert (found.input_axes("w"), found.output_axes("w")) == ((0,), (1,))


def test_axes_refuse_what_they_cannot_answer():
    found = trace(
        lambda p, x: x @ p["kernel"], {"kernel": ones(2, 3), "spare": ones(2)}, ones(4, 2)
    )
    with pytest.raises(ValueError, match="spare: the outputs do not depend on it"):
        found.output_axes("spare")
    with pytest.raises(ValueError, match="no leaf 'kernle'; nearest: kernel"):
        found.input_axes("kernle")


def check_dense(found, kernel, bias, output=1, macs=4 * 3 * 5):
    assert found.output_axes(kernel) == (output,)
    assert found.input_axes(kernel) == (1 - output,)
    assert found.output_axes(bias) == (0,)
    assert found.total.macs == macs


def test_linen():
    model = nn.Dense(5, dtype=jnp.bfloat16)
    found = trace(model.apply, initialized(model, ones(4, 3)), ones(4, 3))
    check_dense(found, "params/kernel", "params/bias")


def test_nnx():
    graph, state = nnx.split(nnx.Linear(3, 5, rngs=nnx.Rngs(0)))
    found = trace(lambda p, x: nnx.merge(graph, p)(x), state, ones(4, 3))
    check_dense(found, "kernel", "bias")


def test_equinox():
    model = eqx.nn.Linear(3, 5, key=jax.random.key(0))
    found = trace(lambda p, x: jax.vmap(p)(x), model, ones(4, 3))
    check_dense(found, "weight", "bias", output=0)


def test_haiku():
    model = hk.without_apply_rng(hk.transform(lambda x: hk.Linear(5)(x)))
    found = trace(model.apply, model.init(jax.random.key(0), ones(4, 3)), ones(4, 3))
    check_dense(found, "linear/w", "linear/b")


def test_linen_scan_and_remat():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.tanh(nn.Dense(6)(x)), None

    stack = nn.scan(
        nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=4
    )
    model = stack()
    params = jax.eval_shape(model.init, jax.random.key(0), ones(2, 6), None)
    found = trace(model.apply, params, ones(2, 6), None)
    assert found.axes("params/Dense_0/kernel", "stack") == (0,)
    assert found.output_axes("params/Dense_0/kernel") == (2,)
    assert found.total.macs == 4 * 2 * 6 * 6


def test_linen_gru():
    model = nn.RNN(nn.GRUCell(6))
    params = initialized(model, ones(2, 7, 3))
    found = trace(model.apply, params, ones(2, 7, 3))
    assert not found.unused
    for path in found.leaves:
        if path.endswith("kernel"):
            assert (found.input_axes(path), found.output_axes(path)) == ((0,), (1,)), path
    assert found.total.macs == 7 * 2 * 3 * (3 * 6 + 6 * 6)


def test_totals_hold_every_number():
    params = initialized(ResNet(), IMAGE)
    found = trace(ResNet().apply, params, IMAGE)
    assert found.parameters == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert found.parameter_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    macs = sum(c.macs for leaf in found.leaves.values() for _, c in leaf.uses)
    assert macs == found.total.macs
    assert len(find_uses(read(ResNet().apply, params, IMAGE))) == sum(
        len(leaf.uses) for leaf in found.leaves.values()
    )


def test_the_table_has_a_line_for_every_use_and_columns_that_line_up():
    params = initialized(ViT(), IMAGE)
    found = trace(ViT().apply, params, IMAGE)
    head, *rest = str(found).split("\n")
    body = rest[: rest.index("")]
    assert len(body) == sum(max(1, len(leaf.uses)) for leaf in found.leaves.values())
    assert {len(line) for line in [head, *body]} == {len(head)}
    assert all(any(line.startswith(path + " ") for line in body) for path in found.leaves)
    assert f"FLOPs {found.total.flops:,}" in str(found)


def test_abstract_parameters_will_do():
    params = jax.eval_shape(ResNet().init, jax.random.key(0), IMAGE)
    image = jax.ShapeDtypeStruct(IMAGE.shape, F32)
    found = trace(ResNet().apply, params, image)
    assert found.total == trace(ResNet().apply, initialized(ResNet(), IMAGE), IMAGE).total


def test_refusals():
    with pytest.raises(TypeError, match="w: str is not an array"):
        trace(lambda p, x: x, {"w": "kernel"}, ones(2))
    with pytest.raises(ValueError, match="no leaves"):
        trace(lambda p, x: x, {}, ones(2))
