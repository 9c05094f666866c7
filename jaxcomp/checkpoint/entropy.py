"""Entropy coding with two coders of constriction, each where it is the better.

Both code within a hair of the model's cross entropy. The range coder (Martin, 1979) ends short
streams within a byte of it, but rounds its interval in every step, which adds up; asymmetric
numeral systems (Duda, 2009) lose nothing on the way, but three bytes at the start.

The bytes are the same in constriction 0.4 and 0.5, on every platform: see :func:`_categorical`.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxcomp.checkpoint import frequencies
from jaxcomp.checkpoint.errors import CheckpointError
from jaxcomp.checkpoint.packing import CHUNK, Symbolic, symbol_dtype

SHORT = 1 << 16
_TRIMMED = 1 << 18


def range_encode(values: Symbolic, alphabet: int) -> bytes | None:
    """Range-code a stream of 2 to 65,536 symbols, two of them different; else None.

    Example:
        >>> range_encode(np.array([0, 0, 1, 0] * 25, np.uint8), 2).hex()
        '15707d9c8f5c1b3aa186769e70'
    """
    fitted = _fit(values, alphabet) if values.size <= SHORT else None
    if fitted is None:
        return None
    model, description = fitted
    return description + range_words(_ranks(model)[values.reshape(-1)], model)


def range_decode(data: bytes, shape: tuple[int, ...], alphabet: int) -> Symbolic:
    """Undo :func:`range_encode`.

    Raises:
        CheckpointError: the bytes are damaged.
    """
    model, start = frequencies.parse(data, alphabet, math.prod(shape))
    try:
        return _decode(_range_decoder(data[start:]), model, shape, alphabet)
    except AssertionError as error:
        raise CheckpointError("range-coded symbols are damaged") from error


def ans_encode(values: Symbolic, alphabet: int) -> bytes | None:
    """Code a stream of more than 65,536 symbols, two of them different; else None."""
    fitted = _fit(values, alphabet) if values.size > SHORT else None
    if fitted is None:
        return None
    model, description = fitted
    ranks, categorical, flat = _ranks(model), _categorical(model), values.reshape(-1)
    coder = _stream().stack.AnsCoder()
    # A stack: what is to be read first is written last.
    for start in reversed(range(0, flat.size, CHUNK)):
        coder.encode_reverse(ranks[flat[start : start + CHUNK]], categorical)
    return description + coder.get_compressed().astype("<u4").tobytes().rstrip(b"\0")


def ans_decode(data: bytes, shape: tuple[int, ...], alphabet: int) -> Symbolic:
    """Undo :func:`ans_encode`.

    Raises:
        CheckpointError: the bytes are damaged.
    """
    model, start = frequencies.parse(data, alphabet, math.prod(shape))
    words = data[start:]
    if words.endswith(b"\0"):
        raise CheckpointError("coded symbols end in a zero that no encoder writes")
    padded = words + bytes(-len(words) % 4)
    decoder = _stream().stack.AnsCoder(np.frombuffer(padded, "<u4").astype(np.uint32))
    values = _decode(decoder, model, shape, alphabet)
    if not decoder.is_empty():
        raise CheckpointError("coded symbols do not end where their part ends")
    return values


def range_words(ranks: np.ndarray, model: frequencies.Model) -> bytes:
    """The range coder's bytes for symbols given by their rank among the present ones."""
    encoder, categorical = _stream().queue.RangeEncoder(), _categorical(model)
    encoder.encode(ranks, categorical)
    return _trim(encoder.get_compressed().astype(">u4").tobytes(), ranks, categorical)


def answer_writer() -> tuple[Callable[[np.ndarray, np.ndarray], None], Callable[[], bytes]]:
    """A range coder of yes-or-no answers, each under a probability of its own.

    Returns:
        ``write(answers, yes)``, where ``yes`` are the probabilities of 1 out of ``2**24``, neither
        0 nor 1, and ``finish()``, which gives the bytes.

    Example:
        >>> write, finish = answer_writer()
        >>> write(np.array([1, 0, 0]), np.full(3, 1 << 22))
        >>> len(finish())
        1
    """
    encoder, model = _stream().queue.RangeEncoder(), _binary()
    kept: list[tuple[np.ndarray, np.ndarray]] = []
    total = 0

    def write(answers: np.ndarray, yes: np.ndarray) -> None:
        nonlocal total
        symbols = answers.astype(np.int32)
        encoder.encode(symbols, model, _odds(yes))
        if total <= _TRIMMED:
            kept.append((symbols, yes))
        total += len(symbols)

    def finish() -> bytes:
        words = encoder.get_compressed().astype(">u4").tobytes()
        if total > _TRIMMED:
            return words
        symbols = np.concatenate([symbols for symbols, _ in kept])
        odds = _odds(np.concatenate([yes for _, yes in kept]))
        return _shorten(words, symbols, lambda decoder: decoder.decode(model, odds))

    return write, finish


def answer_reader(data: bytes) -> Callable[[np.ndarray], np.ndarray]:
    """Undo :func:`answer_writer`: a function from probabilities to the answers that come next.

    Its result raises :class:`CheckpointError` where the bytes are damaged.

    Example:
        >>> write, finish = answer_writer()
        >>> write(np.array([1, 0, 0]), np.full(3, 1 << 22))
        >>> answer_reader(finish())(np.full(3, 1 << 22))
        array([1, 0, 0], dtype=int32)
    """
    decoder, model = _range_decoder(data), _binary()

    def read(yes: np.ndarray) -> np.ndarray:
        try:
            return decoder.decode(model, _odds(yes))
        except AssertionError as error:
            raise CheckpointError("range-coded answers are damaged") from error

    return read


def _binary() -> Any:
    return _stream().model.Categorical(perfect=False)


def _odds(yes: np.ndarray) -> np.ndarray:
    """Weights that the library takes over unchanged: see :func:`_categorical`."""
    weights = np.empty((len(yes), 2))
    np.subtract(float(1 << frequencies.PRECISION) - 1.0, yes, out=weights[:, 0])
    np.subtract(yes, 1.0, out=weights[:, 1])
    return weights


def _fit(values: Symbolic, alphabet: int) -> tuple[frequencies.Model, bytes] | None:
    flat = values.reshape(-1)
    if not 2 <= flat.size <= frequencies.MAX_SYMBOLS:
        return None
    counts = np.zeros(alphabet, np.int64)
    for start in range(0, flat.size, CHUNK):
        counts += np.bincount(flat[start : start + CHUNK], minlength=alphabet)
    return frequencies.fit(counts) if np.count_nonzero(counts) > 1 else None


def _ranks(model: frequencies.Model) -> np.ndarray:
    ranks = np.zeros(int(model.present[-1]) + 1, np.int32)
    ranks[model.present] = np.arange(len(model.present), dtype=np.int32)
    return ranks


def _decode(
    decoder: Any, model: frequencies.Model, shape: tuple[int, ...], alphabet: int
) -> Symbolic:
    """Decode in chunks: the library gives 4 bytes a symbol."""
    symbols, categorical = model.present.astype(symbol_dtype(alphabet)), _categorical(model)
    out = np.empty(math.prod(shape), symbols.dtype)
    for start in range(0, out.size, CHUNK):
        count = min(CHUNK, out.size - start)
        out[start : start + count] = symbols[decoder.decode(categorical, count)]
    return out.reshape(shape)


def _categorical(model: frequencies.Model) -> Any:
    """The coder's model, with exactly the model's frequencies.

    constriction gives each symbol 1 and shares out the other ``2**24 - n`` in proportion. Weights
    that sum to just that are taken over unchanged, in arithmetic that is exact in any float.
    """
    weights = (model.frequencies - 1).astype(np.float64)
    return _stream().model.Categorical(weights, perfect=False)


def _range_decoder(data: bytes) -> Any:
    padded = data + bytes(-len(data) % 4)
    return _stream().queue.RangeDecoder(np.frombuffer(padded, ">u4").astype(np.uint32))


def _trim(words: bytes, ranks: np.ndarray, categorical: Any) -> bytes:
    return _shorten(words, ranks, lambda decoder: decoder.decode(categorical, ranks.size))


def _shorten(words: bytes, symbols: np.ndarray, decode: Callable[[Any], np.ndarray]) -> bytes:
    """Drop last bytes that the decoder does not need.

    Any number in the coder's last interval decodes alike; the encoder does not pick the shortest.
    """
    best = words
    for length in range(len(words) - 1, max(len(words) - 8, -1), -1):
        floor = int.from_bytes(words[:length], "big")
        for number in (floor, floor + 1):
            if number.bit_length() > 8 * length:
                continue
            candidate = number.to_bytes(length, "big")
            try:
                decoded = decode(_range_decoder(candidate))
            except AssertionError:
                continue
            if np.array_equal(decoded, symbols):
                best = candidate
                break
        if len(best) != length:
            break
    return best


def _stream() -> Any:
    import constriction

    # The module is compiled and has no types.
    return getattr(constriction, "stream")  # noqa: B009
