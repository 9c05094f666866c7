"""Models run on factors: the same outputs as with the decoded weights, and fewer operations."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxcomp import decode
from jaxcomp.arrays import LowRankArray
from jaxcomp.factorize import LowRank, largest_weights, low_rank_apply, svd

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def check(apply_fn, params, *inputs, left=0, tolerance=1e-5):
    model = low_rank_apply(apply_fn, params, *inputs)
    assert len(model.left) == left, model.left
    want: Any = apply_fn(decode(params), *inputs)
    got = model.apply(params, *inputs)
    assert got.dtype == want.dtype
    scale = float(np.abs(np.asarray(want)).max())
    np.testing.assert_allclose(got, want, atol=tolerance * scale)
    return model


def factors(equation, *shapes):
    return LowRankArray.from_factors([normal(*shape) for shape in shapes], equation, jnp.float32)


DOTS = {
    "plain": (lambda p, x: x @ p, factors("ia,ao->io", (8, 2), (2, 6)), (5, 8)),
    "transposed": (lambda p, x: x @ p.T, factors("ia,ao->io", (6, 2), (2, 8)), (5, 8)),
    "on the left": (lambda p, x: p @ x, factors("ia,ao->io", (6, 2), (2, 8)), (8, 5)),
    "vector": (lambda p, x: x @ p, factors("ia,ao->io", (8, 2), (2, 6)), (8,)),
    "heads": (
        lambda p, x: jnp.einsum("btd,dhk->bhtk", x, p),
        factors("da,ahk->dhk", (8, 2), (2, 3, 4)),
        (2, 3, 8),
    ),
    "experts": (
        lambda p, x: jnp.einsum("ebd,edf->ebf", x, p),
        factors("eda,eaf->edf", (3, 8, 2), (3, 2, 6)),
        (3, 4, 8),
    ),
}


@pytest.mark.parametrize("name", DOTS)
def test_dots(name):
    apply_fn, leaf, shape = DOTS[name]
    model = check(apply_fn, leaf, normal(*shape))
    (product,) = model.executed.values()
    assert product.flops < product.dense_flops


CONVOLUTIONS = {
    "matrix": factors("hwia,ao->hwio", (3, 3, 6, 2), (2, 8)),
    "spatial": factors("hia,awo->hwio", (3, 6, 2), (2, 3, 8)),
    "tucker": factors("ia,ahwb,bo->hwio", (6, 2), (2, 3, 3, 3), (3, 8)),
    "cp": factors("ha,wa,ia,ao->hwio", (3, 3), (3, 3), (6, 3), (3, 8)),
}
STRIDED = {"window_strides": (2, 1), "padding": ((2, 0), (1, 3)), "rhs_dilation": (1, 2)}
TRANSPOSED = {"window_strides": (1, 1), "padding": ((1, 2), (0, 1)), "lhs_dilation": (2, 1)}


@pytest.mark.parametrize(
    ("split", "options"),
    [*((split, STRIDED) for split in CONVOLUTIONS), ("spatial", TRANSPOSED)],
)
def test_convolutions(split, options):
    def apply_fn(p, x):
        names = ("NHWC", "HWIO", "NCHW")
        return lax.conv_general_dilated(x, p, dimension_numbers=names, **options)

    check(apply_fn, CONVOLUTIONS[split], normal(2, 7, 6, 6))


def test_outputs_first_and_windows_of_one():
    leaf = factors("ia,ao->oi", (6, 1), (1, 8))
    outputs_first = lambda p, x: lax.conv_general_dilated(x, p[:, :, None, None], (2, 2), "SAME")
    check(outputs_first, leaf, normal(2, 6, 3, 3))
    small = factors("hwia,ao->hwio", (1, 1, 6, 2), (2, 8))
    names = ("NHWC", "HWIO", "NHWC")
    check(
        lambda p, x: lax.conv_general_dilated(x, p, (1, 1), "SAME", dimension_numbers=names),
        small,
        normal(2, 3, 3, 6),
    )


def test_loops_walk_along_stacked_factors():
    stack = factors("ia,ao->io", (3, 8, 2), (3, 2, 8))

    def scanned(p, x):
        step = lambda x, w: (jnp.tanh(x @ w), None)
        return lax.scan(jax.checkpoint(step), x, p)[0]

    model = check(scanned, stack, normal(4, 8))
    x = normal(4, 8)
    grads = jax.grad(lambda p: jnp.sum(model.apply(p, x) ** 2))(stack)
    want = jax.grad(lambda p: jnp.sum(scanned(p.decode(), x) ** 2))(stack)
    for a, b in zip(grads.factors, want.factors, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), strides=2, name="conv")(x))
        x = nn.relu(nn.Dense(16, name="dense", dtype=jnp.bfloat16)(x.reshape(len(x), -1)))
        return nn.Dense(10, name="head")(x)


def test_an_unmodified_module_and_other_batches():
    net, x = Net(), normal(4, 8, 8, 4)
    params = net.init(jax.random.key(0), x)
    found = svd(net.apply, params, None, {"*/head/*": None, "*": LowRank(3)})
    model = check(net.apply, found.params, x, tolerance=0.02)
    assert list(model.executed) == ["params/conv/kernel", "params/dense/kernel"]
    # The same model takes other batches, inside transformations too.
    wide = normal(6, 8, 8, 4)
    want: Any = net.apply(decode(found.params), wide)
    np.testing.assert_allclose(jax.jit(model.apply)(found.params, wide), want, atol=0.02)
    with pytest.raises(ValueError, match="another structure"):
        model.apply(params, x)


def test_what_cannot_is_left_and_named():
    leaf = factors("ia,ao->io", (8, 2), (2, 8))
    twice = lambda p, x: x @ p["a"] @ jnp.tanh(p["b"]) + p["b"][0] + jnp.sum(p["c"])
    params = {"a": leaf, "b": leaf, "c": leaf}
    model = check(twice, params, normal(4, 8), left=3)
    assert "tanh changes it" in model.left["b"]
    assert "left: b: tanh" in str(model)
    masked = LowRankArray.from_factors(leaf.factors, leaf.equation, "float32", normal(8, 8) > 0)
    both = svd(None, {"w": normal(8, 8)}, None, LowRank(1), residual=largest_weights(0.1)).params
    for params, words in (
        (masked, "it is masked"),
        (both["w"], "leave over is added"),
        (factors("ia,ao->io", (8, 6), (6, 8)), "its factors take"),
        (normal(8, 8), "there is no LowRankArray"),
    ):
        with pytest.raises(ValueError, match=words):
            low_rank_apply(lambda p, x: x @ p, params, normal(4, 8))
