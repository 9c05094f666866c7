"""A model in low rank in one call: data, layouts, residuals, files, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcomp
from jaxcomp import decode, nbytes, quantize
from jaxcomp.arrays import LowRankArray, LowRankSumArray
from jaxcomp.factorize import LowRank, largest_weights, svd

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


PARAMS = {
    "conv": {"kernel": normal(3, 3, 4, 8), "bias": normal(8)},
    "dense": {"kernel": normal(8, 12) * 0.7 ** np.arange(12)},
    "head": {"kernel": normal(12, 3)},
}
BATCHES = [normal(8, 6, 6, 4) * jnp.array([2.0, 1.0, 0.1, 0.0]) for _ in range(2)]


def model(p, x):
    numbers = ("NHWC", "HWIO", "NHWC")
    x = jax.lax.conv_general_dilated(
        x, jnp.asarray(p["conv"]["kernel"]), (1, 1), "SAME", dimension_numbers=numbers
    )
    x = jnp.tanh(x + p["conv"]["bias"]).mean((1, 2))
    return jnp.tanh(x @ p["dense"]["kernel"]) @ p["head"]["kernel"]


RULES = {"head/*": LowRank(3), "*/kernel": LowRank(2)}


def test_inputs_decide_and_outputs_are_nearer():
    plain = svd(model, PARAMS, BATCHES, RULES, activation_aware=False)
    aware = svd(model, PARAMS, BATCHES, RULES)
    assert [leaf.path for leaf in aware.leaves] == ["conv/kernel", "dense/kernel", "head/kernel"]
    assert [leaf.form for leaf in aware.leaves][:2] == ["rank 2", "rank 2"]
    assert aware.leaves[2].form == "dense: rank 3 saves nothing: 45 numbers, dense 36"
    assert aware.params["head"]["kernel"] is PARAMS["head"]["kernel"]
    assert aware.params["conv"]["bias"] is PARAMS["conv"]["bias"]
    assert aware.leaves[0].output_error < plain.leaves[0].output_error
    assert aware.leaves[0].weight_error > plain.leaves[0].weight_error
    # What is told is what is there.
    kernel = np.asarray(PARAMS["conv"]["kernel"], np.float64)
    change = np.asarray(aware.params["conv"]["kernel"].decode()) - kernel
    np.testing.assert_allclose(
        aware.leaves[0].weight_error, np.sum(change**2) / np.sum(kernel**2), rtol=1e-4
    )
    assert nbytes(aware.params) == sum(leaf.nbytes for leaf in aware.leaves) + 8 * 4
    assert "other leaves: 32 bytes" in str(aware)
    # The model runs on it as it is.
    got, want = (model(p, BATCHES[0]) for p in (aware.params, decode(aware.params)))
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize(
    ("rule", "form", "factors"),
    [
        (LowRank(2, split="spatial"), "rank 2", 2),
        (LowRank((2, 3), split="tucker"), "ranks 2 and 3", 3),
        (LowRank(energy=0.6, split="tucker"), "ranks", 3),
        (LowRank(3, split="cp"), "rank 3", 4),
        (LowRank(energy=0.5), "rank", 2),
    ],
    ids=["spatial", "tucker", "tucker by energy", "cp", "energy"],
)
def test_splits_of_a_convolution(rule, form, factors):
    found = svd(None, {"kernel": PARAMS["conv"]["kernel"]}, None, rule)
    leaf = found.params["kernel"]
    assert isinstance(leaf, LowRankArray)
    assert leaf.form().startswith(form)
    assert len(leaf.factors) == factors
    assert leaf.shape == (3, 3, 4, 8)
    assert 0 < found.leaves[0].weight_error < 1
    assert np.isnan(found.leaves[0].output_error)
    if rule.energy is not None and rule.split == "matrix":
        assert found.leaves[0].weight_error <= 0.5 + 1e-6


def test_a_residual_makes_up_for_what_is_left():
    format = quantize.Format(4, granularity=quantize.PerTensor())
    kernel = {"kernel": PARAMS["dense"]["kernel"]}
    rule = LowRank(1)
    alone = svd(None, kernel, None, rule).leaves[0].weight_error
    for residual, name in (
        (lambda x: quantize.encode(x, format), "rank 1 + int4"),
        (largest_weights(0.2), "rank 1 + "),
    ):
        both = svd(None, kernel, None, rule, residual=residual)
        leaf = both.params["kernel"]
        assert isinstance(leaf, LowRankSumArray)
        assert leaf.form().startswith(name)
        assert both.leaves[0].weight_error < 0.5 * alone
        once = svd(None, kernel, None, rule, residual=residual, iterations=1)
        assert both.leaves[0].weight_error <= once.leaves[0].weight_error
    quantized = decode(quantize.encode(kernel["kernel"], format)) - kernel["kernel"]
    worse = float(jnp.sum(quantized**2) / jnp.sum(kernel["kernel"] ** 2))
    found = svd(None, kernel, None, rule, residual=lambda x: quantize.encode(x, format))
    assert found.leaves[0].weight_error < worse


def test_low_rank_and_sparse_parts_are_found_again():
    low = np.outer(RNG.normal(size=12), RNG.normal(size=10))
    spikes = np.zeros((12, 10))
    spikes.flat[RNG.choice(120, 6, replace=False)] = 8.0
    params = {"w": jnp.asarray(low + spikes, jnp.float32)}
    found = svd(None, params, None, LowRank(1), residual=largest_weights(0.05), iterations=30)
    assert found.leaves[0].weight_error < 1e-3
    kept = np.asarray(found.params["w"].inner.decode()) != 0
    np.testing.assert_array_equal(kept, spikes != 0)


def test_files_hold_and_go_on(tmp_path):
    first = svd(model, PARAMS, BATCHES, RULES, directory=tmp_path)
    jaxcomp.save(tmp_path / "model.jxc", first.params)
    loaded = jaxcomp.load(tmp_path / "model.jxc")
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(first.params), strict=True):
        np.testing.assert_array_equal(a, b)

    def never(p, x):
        return model(p, x)

    again = svd(never, PARAMS, BATCHES, RULES, directory=tmp_path)
    assert str(again) == str(first)
    with pytest.raises(ValueError, match="another damping"):
        svd(model, PARAMS, BATCHES, RULES, directory=tmp_path, damping=0.1)


def test_embeddings_heads_and_narrow_dtypes():
    params = {
        "embedding": normal(20, 8),
        "q": normal(8, 2, 4).astype(jnp.bfloat16),
        "norm": {"kernel": normal(8, 8)},
    }

    def attend(p, tokens):
        x = p["embedding"][tokens]
        q = jnp.einsum("td,dhk->thk", x, p["q"].astype(jnp.float32))
        return q.reshape(-1, 8) @ jnp.tanh(p["norm"]["kernel"])

    found = svd(attend, params, [jnp.arange(6)], LowRank(2))
    told = {leaf.path: leaf for leaf in found.leaves}
    assert told["embedding"].form == "rank 2"
    assert np.isnan(told["embedding"].output_error)
    assert found.params["q"].equation == "ar,rbc->abc"
    assert {f.dtype for f in found.params["q"].factors} == {jnp.dtype("bfloat16")}
    assert found.params["q"].dtype == jnp.bfloat16


@pytest.mark.parametrize("value", [0.0, 0.3], ids=["zeros", "all equal"])
def test_constant_weights_are_of_rank_one(value):
    params = {"w": jnp.full((6, 8), value)}
    for rule in (LowRank(energy=1.0), LowRank(2)):
        found = svd(None, params, None, rule)
        np.testing.assert_allclose(found.params["w"].decode(), params["w"], atol=1e-6)
    assert svd(None, params, None, LowRank(energy=1.0)).params["w"].ranks == {"r": 1}


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: LowRank(), ValueError, "a rank or an energy"),
        (lambda: LowRank(2, 0.5), ValueError, "not both"),
        (lambda: LowRank(0), ValueError, "rank is 0"),
        (lambda: LowRank(2.0), TypeError, "whole number"),
        (lambda: LowRank(energy=1.2), ValueError, "energy is 1.2"),
        (lambda: LowRank((2, 2)), ValueError, "split='tucker'"),
        (lambda: LowRank(energy=0.5, split="cp"), ValueError, "give a rank"),
        (lambda: LowRank(2, split="svd"), ValueError, "split must be one of"),
        (lambda: svd(None, PARAMS, None, 2), TypeError, "must be a LowRank"),
        (lambda: svd(None, PARAMS, None, {}), ValueError, "rules is empty"),
        (lambda: svd(None, PARAMS, None, {"*": None}), ValueError, "nothing to factorize"),
        (lambda: svd(None, PARAMS, None, {"*bias": LowRank(1)}), ValueError, "by default"),
        (lambda: svd(None, PARAMS, None, {"covn/*": LowRank(1)}), ValueError, "nearest"),
        (
            lambda: svd(None, {"w": jnp.full((2, 2), jnp.nan)}, None, LowRank(1)),
            ValueError,
            "w: 4 of 4 values are NaN",
        ),
        (lambda: svd(None, {"w": jnp.ones((0, 2))}, None, LowRank(1)), ValueError, "no elements"),
        (lambda: svd(None, {"w": jnp.ones(3)}, None, LowRank(1)), ValueError, "no weight"),
        (lambda: svd(None, PARAMS, BATCHES, RULES), TypeError, "apply_fn"),
        (lambda: svd(model, PARAMS, [], RULES), ValueError, "batch"),
        (lambda: svd(None, PARAMS, None, RULES, iterations=0), ValueError, "iterations"),
        (
            lambda: svd(None, PARAMS, None, RULES, residual=lambda x: x),
            TypeError,
            "must return a compressed leaf",
        ),
        (lambda: largest_weights(0.0), ValueError, "density is 0.0"),
        (lambda: svd(None, PARAMS, None, RULES, iterations=1.5), TypeError, "iterations"),
    ],
)
def test_bad_input_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()
