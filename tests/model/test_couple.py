"""What ties channels and what fixes them, operation by operation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.model import couple

X = jnp.ones((2, 6))


def params(width=8, out=4):
    return {"a": jnp.ones((6, width)), "b": jnp.ones(width), "c": jnp.ones((width, out))}


def hidden(function, given=None):
    """The group of the hidden width, when `function` works on it between two dense layers."""
    given = params() if given is None else given
    groups = couple(lambda p, x: function(x @ p["a"] + p["b"]) @ p["c"], given, X)
    return [group for group in groups if any(part.path == "b" for part in group.slices)]


def test_a_group_names_what_it_cuts_and_why():
    (group,) = hidden(jax.nn.relu)
    assert group.name == "a[1]"
    assert group.size == 8
    assert {(part.path, part.axis) for part in group.slices} == {("a", 1), ("b", 0), ("c", 0)}
    assert str(group).splitlines() == [
        "a[1]: 8 channels, can be cut",
        "  a axis 1",
        "  c axis 0: custom_jvp_call, dot_general",
        "  b axis 0: add",
    ]


def test_inputs_and_outputs_stay_and_say_so():
    reasons = {group.name: group.fixed for group in couple(lambda p, x: x @ p["a"], params(), X)}
    assert reasons["a[0]"] == "is an axis of the model's inputs"
    assert reasons["a[1]"] == "is an axis of the model's outputs"


def test_the_chain_of_reasons_names_the_module():
    import flax.linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.Dense(8)(x)
            return nn.Dense(3)(y + nn.Dense(8)(jnp.tanh(y)))

    shapes = jax.eval_shape(Net().init, jax.random.key(0), X)
    (group,) = (g for g in couple(Net().apply, shapes, X) if g.fixed is None)
    reasons = {part.path: part.reason for part in group.slices if part.axis == 1}
    assert set(reasons) == {"params/Dense_0/kernel", "params/Dense_2/kernel"}
    assert "add in Net" in "".join(reasons.values())


def shifted(new, old):
    """A loop whose last carry holds `new` only after five turns."""
    step = lambda _, carry: (new, *carry[:-1])
    return jax.lax.fori_loop(0, 9, step, (old,) * 6)[-1]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda h: jnp.sort(h, axis=1), "sort orders along it"),
        (lambda h: jnp.cumsum(h, axis=1), "cumsum runs along it"),
        (lambda h: h[:, ::-1], "rev reverses it"),
        (lambda h: jax.lax.top_k(h, 8)[0], "top_k orders along it"),
        (lambda h: h[:, jnp.array([1, 0, 2, 3, 4, 5, 6, 7])], "gather takes positions"),
        (lambda h: h.at[:, 3].set(1.0), "scatter writes to positions"),
        (lambda h: jax.lax.dynamic_slice(h, (0, h.shape[0]), (2, 7)).sum(1, keepdims=True) + h,
         "only the running program knows"),
        (lambda h: jnp.fft.irfft(jnp.fft.rfft(h), 8), "fft is not followed"),
        (lambda h: h * jnp.argmax(h, axis=1)[:, None], "argmax returns a position"),
        (lambda h: jax.nn.softmax(h), "reduce_max compares or multiplies"),
        (lambda h: h - h.mean(1, keepdims=True), "div takes a mean over it"),
        (lambda h: h * jax.lax.rsqrt((h**2).mean(1, keepdims=True)), "takes a mean over it"),
        (lambda h: h * jax.nn.sigmoid(h).sum(1, keepdims=True), "reduce_sum adds up"),
        (lambda h: h + jnp.prod(h, 1, keepdims=True), "reduce_prod compares or multiplies"),
        (lambda h: h * (jax.nn.sigmoid(h) @ jax.nn.sigmoid(h).T)[:, :1], "dot_general sums over"),
        (lambda h: h * jax.lax.cumlogsumexp(h, 0).sum(1, keepdims=True), "reduce_sum adds up"),
        (lambda h: h * shifted(jax.nn.sigmoid(h), h).sum(1, keepdims=True), "reduce_sum adds up"),
        (lambda h: h / h, "may be infinite"),
        (lambda h: jnp.log(h * h) * 1.0, "may be infinite"),
    ],
)  # fmt: skip
def test_what_treats_channels_differently_fixes_them_and_is_named(function, words):
    groups = hidden(function)
    assert all(group.fixed is not None for group in groups)
    assert any(words in group.fixed for group in groups)


@pytest.mark.parametrize(
    "function",
    [
        lambda h: h / jnp.sqrt((h**2).sum(1, keepdims=True) + 1e-3),  # zeros add nothing
        lambda h: jax.nn.sigmoid(h) * 2 + 1,
        lambda h: jnp.where(h > 0, h, -jnp.inf).clip(-1),
        lambda h: jax.lax.cond(h[0, 0] > 0, jnp.tanh, jnp.sin, h),
        lambda h: jax.checkpoint(jnp.tanh)(h),
        lambda h: jax.lax.fori_loop(0, 3, lambda _, c: jnp.tanh(c) + h, h),
        lambda h: jax.lax.while_loop(lambda c: c[0, 0] < 3, lambda c: c + h * h + 1, h),
        lambda h: jax.lax.scan(lambda c, _: (jnp.tanh(c), c), h, None, length=3)[0],
        lambda h: jax.vmap(jnp.tanh)(h),
        lambda h: h.astype(jnp.bfloat16).astype(jnp.float32),
        lambda h: jax.lax.optimization_barrier((h, h))[1],
        lambda h: jnp.concatenate([h, h], 1)[:, :8],
        lambda h: jnp.pad(h, ((0, 0), (2, 2)))[:, 2:-2],
        lambda h: jnp.tile(h, (1, 2))[:, 8:],
        lambda h: h.at[0].set(h[1]),
        lambda h: h[jnp.array([1, 0])],
        lambda h: jnp.flip(h, 0),
        lambda h: jnp.einsum("bi,bi->bi", h, h),
    ],
)
def test_what_treats_channels_alike_leaves_them_free(function):
    (group,) = hidden(function)
    assert group.fixed is None


def test_factors_are_groups_of_their_own():
    found = hidden(lambda h: jnp.tanh(h.reshape(2, 2, 4)).swapaxes(1, 2).reshape(2, 8))
    assert [(group.size, group.fixed) for group in found] == [(2, None), (4, None)]
    assert found[0].slices[0].positions.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert found[1].slices[0].positions.tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    # The next layer reads them in the other order.
    (read,) = (part for part in found[0].slices if part.path == "c")
    assert read.positions.tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_a_layer_norm_is_fixed_unless_it_may_be_renormalized():
    def model(p, x):
        h = x @ p["a"]
        h = (h - h.mean(1, keepdims=True)) / jnp.sqrt(h.var(1, keepdims=True) + 1e-5)
        return (h * p["b"]) @ p["c"]

    (fixed,) = (g for g in couple(model, params(), X) if g.name == "a[1]")
    (free,) = (g for g in couple(model, params(), X, renormalize=True) if g.name == "a[1]")
    assert "mean" in fixed.fixed
    assert free.fixed is None
    assert "mean" in free.note


def test_shapes_are_enough():
    shapes = jax.eval_shape(params)
    (group,) = (
        group
        for group in couple(
            lambda p, x: jnp.tanh(x @ p["a"] + p["b"]) @ p["c"],
            shapes,
            jax.ShapeDtypeStruct((2, 6), np.float32),
        )
        if group.fixed is None
    )
    assert group.size == 8


def test_arguments_that_are_not_a_model_are_refused():
    with pytest.raises(ValueError, match="params has no leaves"):
        couple(lambda p, x: x, {}, X)
    with pytest.raises(TypeError, match="a: str is not an array"):
        couple(lambda p, x: x, {"a": "kernel"}, X)
