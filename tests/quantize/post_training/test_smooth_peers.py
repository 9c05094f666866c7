"""SmoothQuant beside llm-compressor: the same layers, activations, strength and format."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.quantize import smooth

pytestmark = pytest.mark.slow
FEATURES, OUTPUTS = 64, 48


def layers(seed):
    """A norm that makes a few wide channels, and two kernels that read it."""
    rng = np.random.default_rng(seed)
    x = rng.standard_t(5, size=(400, FEATURES))
    norm = np.exp(0.3 * rng.normal(size=FEATURES))
    norm[rng.choice(FEATURES, 3, replace=False)] *= 40
    params = {"norm": norm, "bias": 0.1 * rng.normal(size=FEATURES)}
    for name in ("up", "gate"):
        rows = np.exp(0.3 * rng.normal(size=(FEATURES, 1)))
        params[name] = rng.normal(size=(FEATURES, OUTPUTS)) * rows / FEATURES**0.5
    return x, params


def activations(params, x):
    return x * params["norm"] + params["bias"]


def model(params, x):
    h = activations(params, x)
    return h @ params["up"], h @ params["gate"]


def rounded(x):
    """8 bits, a scale a tensor."""
    scale = np.abs(x).max() / 127
    return np.round(x / scale) * scale


def error(params, x):
    """Of both layers with weights and activations in 8 bits, in float64."""
    params = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
    h = activations(params, x)
    pairs = [(h @ params[n], rounded(h) @ rounded(params[n])) for n in ("up", "gate")]
    return sum(np.sum((a - b) ** 2) / np.sum(a**2) for a, b in pairs)


def theirs(params, strength, sizes):
    """The layers as llm-compressor smooths them, by sizes of the activations."""
    torch = pytest.importorskip("torch")
    module = pytest.importorskip("llmcompressor.modifiers.transform.smoothquant")
    modifier = module.SmoothQuantModifier(smoothing_strength=strength)
    kernels = [torch.nn.Linear(FEATURES, OUTPUTS) for _ in range(2)]
    for kernel, name in zip(kernels, ("up", "gate"), strict=True):
        kernel.weight.data = torch.tensor(params[name].T, dtype=torch.float32)
    with torch.no_grad():
        sizes = torch.tensor(sizes, dtype=torch.float32)
        scales = modifier._calculate_smoothing_scales(kernels, sizes).numpy()
    return {
        name: leaf / scales if leaf.ndim == 1 else leaf * scales[:, None]
        for name, leaf in params.items()
    }


def ours(params, strength, x):
    narrow = {name: jnp.asarray(leaf, jnp.float32) for name, leaf in params.items()}
    batches = [jnp.asarray(x, jnp.float32)]
    return smooth(model, narrow, batches, strength=strength, progress=False).params


@pytest.mark.parametrize("strength", [0.5, 0.8])
def test_the_same_equation(strength):
    """It doubles the weights' magnitudes, as it takes spans for the activations'."""
    x, params = layers(0)
    sizes = 2 * np.abs(activations(params, x)).max(0)
    expected, found = theirs(params, strength, sizes), ours(params, strength, x)
    # With both doubled the scales are larger by one number, which no rounding sees.
    factor = 2.0 ** (2 * strength - 1)
    for name, leaf in expected.items():
        leaf = leaf * factor if leaf.ndim == 1 else leaf / factor
        np.testing.assert_allclose(found[name], leaf, rtol=2e-5)


def test_no_worse_by_spans():
    """What it does by itself takes the span where the paper has the largest magnitude."""
    mine, other, plain = [], [], []
    for seed in range(8):
        x, params = layers(seed)
        h = activations(params, x)
        mine.append(error(ours(params, 0.5, x), x))
        other.append(error(theirs(params, 0.5, h.max(0) - h.min(0)), x))
        plain.append(error(params, x))
    assert np.mean(mine) <= np.mean(other)
    assert np.mean(mine) < np.mean(plain) / 2
    print(f"ours {np.mean(mine):.3g}, theirs {np.mean(other):.3g}, none {np.mean(plain):.3g}")
