"""Notes in a program: they change nothing, and are not taken for names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from jaxcomp import distill, quantize
from jaxcomp.marks import mark, read_mark
from jaxcomp.quantize import Format


@pytest.mark.parametrize("change", [jax.jit, jax.vmap, jax.grad, jax.checkpoint, lambda f: f])
def test_a_marked_value_is_the_value(change):
    x = jnp.asarray(1.5) if change is jax.grad else jnp.arange(3.0)
    found = change(lambda x: mark(x, "rounded", [1, None, True]) ** 2)(x)
    np.testing.assert_array_equal(found, change(lambda x: x**2)(x))


def test_notes_come_back_and_names_are_none():
    jaxpr = jax.make_jaxpr(lambda x: checkpoint_name(mark(x, "rounded", [1, None]), "hidden"))(1.0)
    names = [equation.params["name"] for equation in jaxpr.eqns]
    assert list(map(read_mark, names)) == [["rounded", [1, None]], None]


def test_features_name_what_the_user_named_only():
    def model(params, x):
        rounded = quantize.fake_quant(params["kernel"], Format(4))
        return checkpoint_name(x @ rounded, "hidden")

    params = {"kernel": jnp.ones((4, 2))}
    told = str(distill.list_features(model, params, jnp.ones((1, 4))))
    assert "hidden" in told
    assert "rounded" not in told
    assert "jaxcomp" not in told
