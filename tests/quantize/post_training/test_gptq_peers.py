"""GPTQ beside qwix and llm-compressor: the same weights, moments, damping and groups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.model.matrices import MatrixForm
from jaxcomp.quantize.affine import encode
from jaxcomp.quantize.formats import Format, PerGroup
from jaxcomp.quantize.post_training.gptq import gptq_leaf
from jaxcomp.quantize.post_training.walk import Task
from jaxcomp.quantize.scales import find_scales

pytestmark = pytest.mark.slow
FEATURES, OUTPUTS, GROUP = 96, 48, 32


def layer(seed):
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(FEATURES, FEATURES)) * np.exp(-np.arange(FEATURES) / 24)
    x = rng.normal(size=(300, FEATURES)) @ mix.T + 0.3 * rng.normal(size=(300, FEATURES))
    x = x * np.exp(rng.normal(size=FEATURES))
    weight = rng.normal(size=(FEATURES, OUTPUTS)).astype(np.float32)
    return weight, (x.T @ x / len(x)).astype(np.float32)


def error(weight, values, moment):
    change = np.asarray(values, np.float64) - weight
    return np.sum(change * (moment.astype(np.float64) @ change))


def ours(weight, moment, format, order=True):
    task = Task("w", MatrixForm(weight.shape, (0,), (1,)), format)
    return gptq_leaf(task, weight, jnp.asarray(moment), order).decode()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_llm_compressor(bits, seed):
    """Its walk over the same affine levels; nothing is left to differ but rounding in float32."""
    torch = pytest.importorskip("torch")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    theirs = pytest.importorskip("llmcompressor.modifiers.gptq.gptq_quantize")
    weight, moment = layer(seed)
    format = Format(bits, symmetric=False, granularity=PerGroup(GROUP))
    found = find_scales(jnp.asarray(weight), format)
    scale, zero_point = (np.array(x, np.float32).reshape(-1, OUTPUTS).T for x in found[:2])
    arguments = quantization.QuantizationArgs(
        num_bits=bits, symmetric=False, strategy="group", group_size=GROUP, actorder="weight"
    )
    arrays = (weight.T, moment, scale, zero_point - 2.0 ** (bits - 1))
    tensors = [torch.tensor(np.ascontiguousarray(x, np.float32))[None] for x in arrays]
    values, _, _ = theirs.quantize_weight(*tensors, None, arguments, 128, 0.01)
    mine, other, nearest = (
        error(weight, x, moment)
        for x in (
            ours(weight, moment, format),
            values[0].numpy().T,
            encode(jnp.asarray(weight), format).decode(),
        )
    )
    assert mine <= other * 1.01
    assert other < 0.5 * nearest


@pytest.mark.parametrize("seed", range(3))
def test_qwix(seed):
    """It rounds features as they stand, in ranges of its own: 4% narrower steps, a level more."""
    core = pytest.importorskip("qwix.contrib.gptq_core")
    qarray = pytest.importorskip("qwix._src.core.qarray")
    weight, moment = layer(seed)
    how = qarray.HowToQuantize(
        qtype=jnp.int4, channelwise_axes=(0,), tiled_axes={1: GROUP}, calibration_method="absmax"
    )
    run = jax.jit(lambda w, h: core.quantize_weight(w, h, how, 128, 0.01)[0])
    theirs = np.asarray(qarray.dequantize(run(jnp.asarray(weight.T), jnp.asarray(moment)))).T
    format = Format(4, granularity=PerGroup(GROUP))
    other = error(weight, theirs, moment)
    assert error(weight, ours(weight, moment, format), moment) <= other
    # Without an order, steps 7% wider (max / 7, not max / 7.5) err by up to their square more.
    plain = error(weight, ours(weight, moment, format, order=False), moment)
    assert plain <= other * (7.5 / 7) ** 2 * 1.05
