"""What products say of arguments that they cannot take, before anything is traced."""

from typing import Any

import jax.numpy as jnp
import pytest

from jaxcomp import kernels, quantize, share
from jaxcomp.arrays import BlockSparseArray
from jaxcomp.kernels import Rounding
from jaxcomp.quantize import Format

W, X, MASK = jnp.ones((8, 6)), jnp.ones((2, 8)), jnp.ones((8, 6), bool)
LIST: Any = [[1.0] * 8]
ANY: Any = None
QUANTIZED, SHARED = quantize.encode(W, Format(8)), share.codebooks({"w": W}, clusters=2)["w"]
BLOCKS = BlockSparseArray.encode(W, (4, 3))
LAYOUT = {"dimension_numbers": ("NWC", "WIO", "NWC")}
SIGNAL, KERNEL = jnp.ones((2, 5, 4)), jnp.ones((3, 4, 6))


def rounded(rounding: Any, **how: Any) -> Any:
    return kernels.fake_quant_matmul(X, W, rounding, **how)


WRONG = {
    "x must be an array, not a list": [
        lambda: kernels.masked_matmul(LIST, W, MASK),
        lambda: kernels.fake_quant_matmul(LIST, W, Rounding(4)),
        lambda: kernels.quantized_matmul(LIST, QUANTIZED),
        lambda: kernels.codebook_matmul(LIST, SHARED),
        lambda: kernels.block_sparse_matmul(LIST, BLOCKS),
        lambda: kernels.masked_conv(LIST, KERNEL, KERNEL > 0, (1,), "SAME"),
        lambda: kernels.fake_quant_conv(LIST, KERNEL, Rounding(4), (1,), "SAME"),
    ],
    "w must be an array": [lambda: kernels.masked_matmul(X, LIST, MASK)],
    "mask is list: give booleans": [
        lambda: kernels.masked_matmul(X, W, [[True]]),
        lambda: kernels.masked_conv(SIGNAL, KERNEL, [[True]], (1,), "SAME", **LAYOUT),
    ],
    "mask is float32: give booleans": [lambda: kernels.masked_matmul(X, W, W)],
    "dense_gradient must be True or False, not 'no'": [
        lambda: kernels.masked_matmul(X, W, MASK, dense_gradient=ANY or "no"),
        lambda: rounded(Rounding(4), dense_gradient="no"),
    ],
    "w: rounding must be a Rounding, such as": [
        lambda: rounded(None),
        lambda: rounded(Format(4)),
        lambda: kernels.fake_quant_conv(SIGNAL, KERNEL, None, (1,), "SAME", **LAYOUT),
    ],
    "w: blocks must be pairs": [
        lambda: rounded(Rounding(4, blocks=ANY or [(4, -2)])),
        lambda: rounded(Rounding(4, blocks=ANY or (4, -2))),
    ],
    "w: axis must be an int, ints or None": [
        lambda: rounded(Rounding(4, axis=ANY or [0])),
        lambda: rounded(Rounding(4, axis=ANY or "0")),
    ],
    "padding 'FOO': ": [
        lambda: kernels.masked_conv(SIGNAL, KERNEL, KERNEL > 0, (1,), "FOO", **LAYOUT),
    ],
}


@pytest.mark.parametrize(
    ("message", "call"), [(message, call) for message, calls in WRONG.items() for call in calls]
)
def test_what_is_wrong_is_named(unchecked, message, call):
    with pytest.raises(ValueError if "padding" in message else TypeError, match=message):
        call()


def test_a_transposed_leaf_takes_no_rounded_activations():
    with pytest.raises(ValueError, match="not rounded before a transposed leaf"):
        kernels.quantized_matmul(W[:1], QUANTIZED, transposed=True, activations="int8")
    with pytest.raises(ValueError, match=r"\(\*rows, inputs\) and \(outputs, inputs\)"):
        kernels.quantized_matmul(X, QUANTIZED, transposed=True)
    assert kernels.quantized_matmul(W, QUANTIZED, transposed=True).shape == (8, 8)
