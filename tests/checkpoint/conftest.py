"""A small file that has everything in it."""

import pytest
from jxc_forge import sample

from jaxcomp.checkpoint import leaves


@pytest.fixture
def small_tensors(monkeypatch):
    monkeypatch.setattr(leaves, "TENSOR_BYTES", 20)


@pytest.fixture
def sound(tmp_path, small_tensors):
    return sample(tmp_path)
