"""Uniform quantization once more, in float64 NumPy, and what the tests here have in common."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.arrays.bits import unpack_bits_host
from jaxcomp.quantize import Format, PerChannel, PerGroup, PerTensor, encode

DTYPES = (jnp.float32, jnp.float16, jnp.bfloat16)
BITS = tuple(range(2, 9))
GRANULARITIES = (PerTensor(), PerChannel(-1), PerChannel((0, -1)), PerGroup(4, -2))
SHAPE = (2, 8, 6)  # fits every granularity above
FORMATS = tuple(Format(*fields) for fields in itertools.product(BITS, (True, False), GRANULARITIES))
FEW_FORMATS = (
    Format(2, True, PerTensor()),
    Format(2, False, PerGroup(4, -2)),
    Format(4, True, PerChannel(-1)),
    Format(4, False, PerChannel((0, -1))),
    Format(5, True, PerGroup(4, -2)),
    Format(7, False, PerChannel(0)),
    Format(8, True, PerTensor()),
    Format(8, False, PerTensor()),
)


def name_of(value) -> str:
    """Short names for `parametrize`."""
    if isinstance(value, Format):
        granularity = str(value.granularity).replace("axis=", "").replace("size=", "")
        return f"{value.bits}{'s' if value.symmetric else 'a'}-{granularity}"
    return getattr(value, "__name__", str(value))


def wide(x) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def same_bits(a, b) -> bool:
    a, b = np.asarray(a), np.asarray(b)
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def codes_of(leaf) -> np.ndarray:
    """Codes as integers; signed around zero if symmetric."""
    codes = unpack_bits_host(np.asarray(leaf.codes), leaf.bits, leaf.length).astype(np.int64)
    return codes - (1 << (leaf.bits - 1)) if leaf.zero_point is None else codes


def grouped(x: np.ndarray, format: Format) -> np.ndarray:
    """With the groups of `format` split off, so that scales broadcast."""
    if not isinstance(format.granularity, PerGroup):
        return x
    size, axis = format.granularity.size, format.granularity.axis % x.ndim
    return x.reshape(*x.shape[:axis], x.shape[axis] // size, size, *x.shape[axis + 1 :])


def shared_axes(ndim: int, format: Format) -> tuple[int, ...]:
    """Axes of `grouped` over which a scale is shared, told by the words of the documentation."""
    match format.granularity:
        case PerTensor():
            return tuple(range(ndim))
        case PerChannel(axis):
            kept = {a % ndim for a in (axis if isinstance(axis, tuple) else (axis,))}
            return tuple(a for a in range(ndim) if a not in kept)
        case PerGroup(_, axis):
            return (axis % ndim + 1,)
    raise AssertionError(format)


def reference_range(x: np.ndarray, format: Format):
    """Scale and zero point in float64 (scale 1 for zeros)."""
    x = grouped(wide(x), format)
    axes = shared_axes(x.ndim - isinstance(format.granularity, PerGroup), format)
    if format.symmetric:
        scale = np.max(np.abs(x), axis=axes, keepdims=True) / (2 ** (format.bits - 1) - 1)
        return np.where(scale == 0, 1.0, scale), None
    low = np.minimum(np.min(x, axis=axes, keepdims=True), 0)
    high = np.maximum(np.max(x, axis=axes, keepdims=True), 0)
    scale = (high - low) / (2**format.bits - 1)
    scale = np.where(scale == 0, 1.0, scale)
    return scale, np.rint(-low / scale)


def half_step(leaf, dtype) -> np.ndarray:
    """By how much a value may be off: half a step, and the rounding to the weight's own dtype."""
    info = jnp.finfo(dtype)
    values = np.abs(grouped(wide(leaf.decode()), format_of(leaf)))
    rounding = values * float(info.eps) / 2 * (1 + 1e-6) + float(info.smallest_subnormal)
    return wide(leaf.scale) / 2 * (1 + 1e-4) + rounding


def format_of(leaf) -> Format:
    """A format with the groups of a leaf."""
    return Format(leaf.bits, granularity=PerGroup(*leaf.blocks[0]) if leaf.blocks else PerTensor())


def samples(dtype, shape=SHAPE, seed: int = 0) -> dict[str, jax.Array]:
    """Weights of all kinds, easy and hostile, of one shape."""
    rng = np.random.default_rng(seed)
    top = float(jnp.finfo(dtype).max)
    signs = np.where(rng.random(shape) < 0.3, 1.0, -1.0)
    with np.errstate(over="ignore"):
        found = {
            "normal": rng.normal(size=shape),
            "zero": np.zeros(shape),
            "minus zero": -np.zeros(shape),
            "constant": np.full(shape, 0.37),
            "negative": -np.abs(rng.normal(size=shape)),
            "one large": np.where(np.arange(np.prod(shape)).reshape(shape) == 5, 1e4, 1e-3),
            "huge": signs * rng.uniform(0.5, 1, shape) * top,
            "largest": signs * top,
            "huge, lopsided": np.where(rng.random(shape) < 0.2, -1, rng.uniform(-0.3, 0.9, shape))
            * top,
            "subnormal": rng.normal(size=shape) * 1e-40,
            "tiny": rng.normal(size=shape) * 1e-37,
            "mixed": rng.normal(size=shape) * 10.0 ** rng.integers(-30, 4, shape),
            "halves": rng.integers(-15, 16, shape) / 2,
        }
    return {
        name: jnp.asarray(np.clip(x, -top, top).astype(jnp.dtype(dtype)))
        for name, x in found.items()
    }


# Compiled once a format and shape, where it is not the point to run operation by operation.
encode_jit = jax.jit(encode, static_argnums=1)
decode_jit = jax.jit(lambda leaf: leaf.decode())


def round_trip(x, format: Format):
    return encode(x, format).decode()
