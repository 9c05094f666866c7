"""The same codes as other coders would store them: plain functions from codes to bytes.

nncodec (ISO/IEC 15938-17) is measured, never depended on; its package imports torch, so that only
its compiled coder is loaded, from wherever the package was installed (``pip install --no-deps``).
"""

import glob
import importlib.util
import itertools
import lzma
import os
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Codes(NamedTuple):
    """The codes of one layer.

    Attributes:
        values: unsigned integers below ``alphabet``, in the shape of the kernel (inputs before
            outputs).
        alphabet: how many codes there are.
        zero: which of them stands for zero, or for the middle where none does.
    """

    values: np.ndarray
    alphabet: int
    zero: int


def entropy_bytes(layers: Sequence[Codes]) -> float:
    """First-order entropy of each layer, summed; a decoder's frequencies are taken to be free."""
    total = 0.0
    for layer in layers:
        counts = np.bincount(layer.values.ravel())
        used = counts[counts > 0]
        total -= float((used * np.log2(used / max(layer.values.size, 1))).sum()) / 8
    return total


def packed(layers: Sequence[Codes]) -> bytes:
    """Codes at ``ceil(log2 alphabet)`` bits each, one layer after the other."""
    return b"".join(_pack(layer) for layer in layers)


def _pack(layer: Codes) -> bytes:
    bits = max(1, (layer.alphabet - 1).bit_length())
    flat = layer.values.ravel()
    split = (flat[:, None] >> np.arange(bits)) & 1
    return np.packbits(split.astype(np.uint8), bitorder="little").tobytes()


def unpacked(layers: Sequence[Codes]) -> bytes:
    """Codes of one or two bytes each, which a byte-wise coder often shortens better."""
    return b"".join(
        x.values.astype(np.uint8 if x.alphabet <= 256 else "<u2").tobytes() for x in layers
    )


def zlib_bytes(layers: Sequence[Codes]) -> int:
    """Bit-packing and then zlib at level 9, or zlib of unpacked codes: whichever is smaller."""
    return min(len(zlib.compress(text, 9)) for text in (packed(layers), unpacked(layers)))


def zstd_bytes(layers: Sequence[Codes]) -> int | None:
    """The smaller of packed and unpacked codes with zstd at level 22; None without zstandard."""
    try:
        zstandard: Any = importlib.import_module("zstandard")
    except ImportError:
        return None
    packer = zstandard.ZstdCompressor(level=22)
    return min(len(packer.compress(text)) for text in (packed(layers), unpacked(layers)))


def xz_bytes(layers: Sequence[Codes]) -> int:
    """The smaller of packed and unpacked codes with LZMA2 at its strongest, in raw streams."""
    return min(
        len(
            lzma.compress(
                text,
                lzma.FORMAT_RAW,
                filters=[{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "pb": pb}],
            )
        )
        for text in (packed(layers), unpacked(layers))
        for pb in (0, 2)
    )


def load_nncodec(site_packages: str | None) -> Any:
    """The compiled coder of an installed nncodec, or None where there is none.

    Args:
        site_packages: the directory into which it was installed; None: this interpreter's path.
    """
    if site_packages is None:
        found = importlib.util.find_spec("nncodec")
        roots = [] if found is None else list(found.submodule_search_locations or [])
    else:
        roots = [os.path.join(site_packages, "nncodec")]
    for root in roots:
        for path in glob.glob(os.path.join(root, "extensions", "deepCABAC*.so")):
            spec = importlib.util.spec_from_file_location("deepCABAC", path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
    return None


class Choice(NamedTuple):
    """How nncodec is asked to code a layer."""

    transposed: bool
    profile: int
    skip_rows: bool
    codebook: bool


CHOICES = [
    Choice(transposed, profile, skip, codebook)
    for transposed, (profile, skip, codebook) in itertools.product(
        (False, True), ((0, False, False), (1, True, False), (1, True, True))
    )
]
_UNARY = 10


def nncodec_choice(coder: Any, layer: Codes) -> Choice:
    """The choice of :data:`CHOICES` that makes a layer smallest."""
    if layer.values.size > 1 << 20:
        # The larger layers differ by little, and one try takes seconds.
        return min(CHOICES[::3], key=lambda choice: len(nncodec_encode(coder, [layer], [choice])))
    return min(CHOICES, key=lambda choice: len(nncodec_encode(coder, [layer], [choice])))


def nncodec_encode(coder: Any, layers: Sequence[Codes], choices: Sequence[Choice]) -> bytes:
    """All layers in one stream of nncodec's arithmetic coder, without its headers."""
    encoder = coder.Encoder()
    for layer, choice in zip(layers, choices, strict=True):
        encoder.initCtxModels(_UNARY, 1)
        signed = _signed(layer, choice)
        skipped = (~signed.any(axis=1)).astype(np.int32)
        encoder.encodeLayer(
            signed, 0, 0, choice.profile, 0, int(choice.skip_rows), skipped, *_tail(
                coder, layer, choice
            )
        )  # fmt: skip
    return encoder.finish().tobytes()


def nncodec_decode(
    coder: Any, data: bytes, layers: Sequence[Codes], choices: Sequence[Choice]
) -> list[np.ndarray]:
    """Undo :func:`nncodec_encode`; of ``layers`` only shapes, alphabets and zeros are read."""
    decoder, found = coder.Decoder(), []
    decoder.setStream(np.frombuffer(data, np.uint8))
    for layer, choice in zip(layers, choices, strict=True):
        decoder.initCtxModels(_UNARY)
        signed = np.zeros_like(_signed(layer, choice))
        decoder.decodeLayer(signed, 0, 0, choice.profile, 0, *_tail(coder, layer, choice))
        rows = signed.T if choice.transposed else signed
        found.append((rows + layer.zero).reshape(layer.values.shape))
    return found


def nncodec_bytes(coder: Any, layers: Sequence[Codes]) -> int:
    """Bytes of all layers in one stream, each coded in the way that is best for it."""
    return len(nncodec_encode(coder, layers, [nncodec_choice(coder, x) for x in layers]))


def _signed(layer: Codes, choice: Choice) -> np.ndarray:
    """Signed codes in two axes; for the coder, outputs are rows unless it is asked otherwise."""
    rows = layer.values.reshape(-1, layer.values.shape[-1]).astype(np.int32) - layer.zero
    return np.ascontiguousarray(rows.T if choice.transposed else rows)


def _tail(coder: Any, layer: Codes, choice: Choice) -> tuple[Any, ...]:
    size = layer.alphabet if choice.codebook else 0
    zero = layer.zero if choice.codebook else 0
    return (coder.HdspMode.AlwaysOff, np.zeros(2, np.int8), size, zero)
