"""Rounding of a whole model for the file: error against bits, going on, and what cannot be."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp import quantize
from jaxcomp.quantize import Format, PerTensor
from jaxcomp.quantize.rate.density import code_bits, fitted_density

FORMAT = Format(4, granularity=PerTensor())
RNG = np.random.default_rng(0)
PARAMS = {
    "table": jnp.asarray(RNG.normal(size=(40, 12)), jnp.float32),
    "kernel": jnp.asarray(RNG.standard_t(4, size=(12, 24)), jnp.float32),
    "bias": jnp.zeros(24, jnp.float32),
}
TOKENS = [jnp.asarray(RNG.integers(0, 40, 40)), jnp.asarray(RNG.integers(0, 40, 40))]
RULES = {"kernel": FORMAT, "table": Format(8)}


def model(params, tokens):
    return params["table"][tokens] @ params["kernel"] + params["bias"]


def bits_of(leaf):
    codes = np.asarray(leaf.decode() / leaf.scale).round().astype(int)
    density = fitted_density(codes, 7)
    return float(code_bits(jnp.asarray(codes, jnp.float32), density).sum())


def test_a_higher_penalty_takes_fewer_bits_and_loses_more():
    found = [quantize.rate_rounding(model, PARAMS, TOKENS, p, RULES) for p in (0.0, 3e-4, 1e-3)]
    bits = [bits_of(each.params["kernel"]) for each in found]
    errors = [each.leaves[-1].output_error for each in found]
    assert bits[0] > 1.15 * bits[1] > 1.3 * bits[2]
    assert errors[0] < errors[1] < errors[2] < 0.3
    # What is looked up is rounded to nearest, and what no rule names stays.
    nearest = quantize.encode(PARAMS["table"], Format(8))
    np.testing.assert_array_equal(found[2].params["table"].decode(), nearest.decode())
    assert found[2].params["bias"] is PARAMS["bias"]


def test_beats_a_coarser_step_at_the_same_bits():
    ours = quantize.rate_rounding(model, PARAMS, TOKENS, 7e-4, RULES)
    coarse = {"kernel": Format(3, granularity=PerTensor()), "table": Format(8)}
    theirs = quantize.gptq(model, PARAMS, TOKENS, coarse)
    assert bits_of(ours.params["kernel"]) < bits_of(theirs.params["kernel"])
    assert ours.leaves[-1].output_error < theirs.leaves[-1].output_error


def test_goes_on_after_finished_leaves_and_refuses_another_call(tmp_path):
    call = (model, PARAMS, TOKENS, 1e-3, RULES)
    first = quantize.rate_rounding(*call, directory=tmp_path)
    again = quantize.rate_rounding(*call, directory=tmp_path)
    np.testing.assert_array_equal(first.params["kernel"].codes, again.params["kernel"].codes)
    with pytest.raises(ValueError, match="penalty"):
        quantize.rate_rounding(model, PARAMS, TOKENS, 2e-3, RULES, directory=tmp_path)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"penalty": -1.0}, ValueError, "penalty is -1"),
        ({"penalty": 0.1, "rounds": 0}, ValueError, "rounds is 0"),
        ({"penalty": 0.1, "rules": Format(4, False)}, ValueError, "affine"),
        ({"penalty": 0.1, "rules": {"kernel": quantize.nf4()}}, TypeError, "uniform"),
    ],
)
def test_what_cannot_be_is_refused(options, error, words):
    with pytest.raises(error, match=words):
        quantize.rate_rounding(model, PARAMS, TOKENS, **options)
