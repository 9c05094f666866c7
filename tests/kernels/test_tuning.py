"""Tables of what is fastest: measured once, kept in a file, obeyed by what is traced inside."""

import dataclasses
import json
import warnings
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.arrays import BlockSparseArray
from jaxcomp.kernels import block_sparse_matmul, tables
from jaxcomp.kernels.forms import Kernel, choose
from jaxcomp.kernels.masked.matmul import masked_matmul
from jaxcomp.kernels.packed_mask import pack_mask
from jaxcomp.kernels.tables import Row, Table
from jaxcomp.kernels.tuning import tune

X, W = jnp.ones((2, 8)), jnp.ones((8, 4))
MASK = pack_mask(jnp.ones((8, 4), bool))


def loss(x, w):
    return masked_matmul(x, w, MASK).sum()


def row(**changes):
    device = jax.devices()[0].device_kind
    return Row("double", device, ("float32[2]",), "xla", (), 1.0, 1.0)._replace(**changes)


def test_each_operation_of_a_gradient_is_measured_once(tmp_path):
    file = tmp_path / "table.json"
    table = tune(jax.jit(jax.grad(loss, (0, 1))), X, W, file=file, repeats=1)
    assert sorted(each.operation for each in table.rows) == [
        "masked_matmul", "masked_matmul, to input", "masked_matmul, to weight"
    ]  # fmt: skip
    assert all(each.microseconds > 0 for each in table.rows)
    assert tables.load_table(file) == table
    # What is known is not measured again; what is new is.
    other = tune(loss, jnp.ones((3, 8)), W, file=file, repeats=1)
    assert other.rows[:3] == table.rows
    assert len(other.rows) == 4
    assert not list(tmp_path.glob("*.part"))


def _tuned_on_a_cpu(monkeypatch, kernel, *factors):
    """The row of an operation of a chip that a CPU plays; XLA's form is made slow."""
    monkeypatch.setattr("jaxcomp.kernels.forms.PLATFORMS", {"cpu": ("triton",)})
    monkeypatch.setattr("jaxcomp.kernels.tuning.PLATFORMS", {"cpu": ("triton",)})
    slow = lambda x: 2 * x + 1e-9 * jnp.linalg.matrix_power(jnp.outer(x, x) / x.size, 9).sum()
    tiles = tuple({"thousandths": factor} for factor in factors)
    kernels = {"triton": Kernel(kernel, lambda x: None, tiles)}
    return tune(lambda x: choose("double", slow, kernels, (x,)), jnp.ones(300), repeats=3).rows[0]


@pytest.mark.parametrize("wrong", [2100, 0])
def test_a_form_that_computes_something_else_is_not_taken(monkeypatch, wrong):
    # No thousandths are no number.
    kernel = lambda x, *, thousandths, interpret: x * ((thousandths or np.nan) / 1000)
    with pytest.warns(UserWarning, match=r"double, triton \{'thousa.*computes other numbers"):
        row = _tuned_on_a_cpu(monkeypatch, kernel, wrong, 2001)
    assert (row.implementation, row.tile) == ("triton", (("thousandths", 2001),))
    with pytest.warns(UserWarning, match="not taken"):
        assert _tuned_on_a_cpu(monkeypatch, kernel, wrong).implementation == "xla"


def test_a_form_of_which_no_tile_runs_is_told_of(monkeypatch):
    def kernel(x, *, thousandths, interpret):
        # As when it is measured; a compiler fails later than a function is traced.
        if interpret and thousandths > 2000:
            raise ValueError("too much shared memory")
        return x * 2

    with pytest.warns(UserWarning, match="no tile of it runs on this chip: too much shared"):
        assert _tuned_on_a_cpu(monkeypatch, kernel, 2001, 2002).implementation == "xla"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        row = _tuned_on_a_cpu(monkeypatch, kernel, 2001, 2000)
    assert row.tile == (("thousandths", 2000),)


def test_a_function_without_operations_is_an_error():
    with pytest.raises(ValueError, match="nothing to tune"):
        tune(lambda x: 2 * x, X)
    with pytest.raises(TypeError, match="function"):
        tune(cast("Any", 3), X)


def test_a_table_in_force_decides_and_compiles_anew():
    """Here a CPU plays the chip: its kernel adds 1, so that one sees which form has run."""
    traced = []

    def double(x):
        traced.append(tables.row_for("double", (x,)))
        return choose("double", lambda x: 2 * x, {}, (x,))

    run = jax.jit(double)
    x = jnp.ones(2)
    run(x)
    with tables.tuned(Table((row(),))):
        run(x)
        run(x)
    with tables.tuned(Table((row(device="another"),))):
        run(x)
    run(x)
    assert traced == [None, row(), None]


def test_the_tile_of_a_row_reaches_the_kernel(monkeypatch):
    monkeypatch.setattr("jaxcomp.kernels.forms.PLATFORMS", {"cpu": ("triton",)})

    def kernel(x, *, size, interpret):
        assert not interpret
        return x * size

    kernels = {"triton": Kernel(kernel, lambda x: None, ({"size": 3}, {"size": 5}))}
    run = lambda: choose("double", lambda x: 2 * x, kernels, (jnp.ones(2),))
    np.testing.assert_array_equal(run(), [3, 3])
    with tables.tuned(Table((row(implementation="triton", tile=(("size", 5),)),))):
        np.testing.assert_array_equal(run(), [5, 5])
    with tables.tuned(Table((row(),))):
        np.testing.assert_array_equal(run(), [2, 2])


def test_a_stale_row_is_said_and_not_taken(monkeypatch):
    monkeypatch.setattr("jaxcomp.kernels.forms.PLATFORMS", {"cpu": ("triton",)})
    kernel = lambda x, *, size, interpret: x * size
    kernels = {"triton": Kernel(kernel, lambda x: None, ({"size": 3},))}
    for name, tile in (("stale tile", {"size": 4}), ("stale name", {"rows": 3})):
        run = lambda name=name: choose(name, lambda x: 2 * x, kernels, (jnp.ones(2),))
        stale = row(operation=name, implementation="triton", tile=tuple(tile.items()))
        with tables.tuned(Table((stale,))), pytest.warns(UserWarning, match=f"{name}.*tune it"):
            np.testing.assert_array_equal(run(), [3, 3])


def test_a_form_for_some_chips_is_taken_where_it_was_tuned(monkeypatch):
    monkeypatch.setattr("jaxcomp.kernels.forms.PLATFORMS", {"cpu": ("mosaic_gpu",)})
    kernel = lambda x, *, size, interpret: x * size
    kernels = {"mosaic_gpu": Kernel(kernel, lambda x: None, ({"size": 3},), tuned_only=True)}
    run = lambda: choose("for some", lambda x: 2 * x, kernels, (jnp.ones(2),))
    with pytest.warns(UserWarning, match="for some runs as XLA .* only where it was tuned"):
        np.testing.assert_array_equal(run(), [2, 2])
    found = row(operation="for some", implementation="mosaic_gpu", tile=(("size", 3),))
    with tables.tuned(Table((found,))):
        np.testing.assert_array_equal(run(), [3, 3])


def test_falling_back_is_said_once(monkeypatch):
    monkeypatch.setattr("jaxcomp.kernels.forms.PLATFORMS", {"cpu": ("triton",)})
    kernels = {"triton": Kernel(lambda x, **_: x, lambda x: "2 is too few")}
    run = lambda: choose("said once", lambda x: 2 * x, kernels, (jnp.ones(2),))
    with pytest.warns(UserWarning, match="said once runs as XLA compiles it: triton: 2 is too few"):
        run()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run()


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{}", '{"version": 2, "rows": []}', '{"version": 1, "rows": [{}]}',
        '{"version": 1, "rows": 3}', "\x00", '{"version": 1, "rows": {}}',
    ],
)  # fmt: skip
def test_another_file_is_an_error(tmp_path, text):
    file = tmp_path / "table.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"table\.json: no table of kernels"), tables.tuned(file):
        pass


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tile", {"rows": 0}), ("tile", {"rows": "16"}), ("tile", 3), ("microseconds", -1.0),
        ("microseconds", "1"), ("implementation", 4), ("implementation", "cuda"), ("arrays", [1]),
        ("arrays", "float32[2]"),
    ],
)  # fmt: skip
def test_a_broken_row_is_an_error(tmp_path, name, value):
    file = tmp_path / "table.json"
    tables.save_table(Table((row(),)), file)
    found = json.loads(file.read_text())
    found["rows"][0][name] = value
    file.write_text(json.dumps(found))
    with pytest.raises(ValueError, match="no table of kernels"):
        tables.load_table(file)


@pytest.mark.parametrize("known", [True, False])
def test_a_block_sparse_product_and_its_gradients_are_tuned(known):
    leaf = BlockSparseArray.encode(jnp.eye(32), (16, 16))
    mask = leaf.mask

    def loss(x, values, mask):
        whole = dataclasses.replace(leaf, values=values, mask=leaf.mask if known else mask)
        return block_sparse_matmul(x, whole).sum()

    table = tune(jax.grad(loss, (0, 1)), jnp.ones((2, 32)), leaf.values, mask, repeats=1)
    assert sorted(each.operation for each in table.rows) == [
        "block_sparse_matmul", "block_sparse_matmul, to input", "block_sparse_matmul, to values"
    ]  # fmt: skip
