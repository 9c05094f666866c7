"""Leaves in Orbax checkpoints, and in Equinox, Haiku and plain functions once decoded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from leaf_samples import FORMS, compress, quantized, reference, sparse, weights

from jaxcomp.arrays import decode, is_compressed, nbytes


def same_tree(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, two in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (one.shape, one.dtype) == (two.shape, two.dtype)
        np.testing.assert_array_equal(np.asarray(one), np.asarray(two))


def every_form():
    forms = {f"model/{name}": {"w": form(weights((4, 6)))} for name, form in FORMS.items()}
    stack = FORMS["sparse"](weights((3, 4, 6), "bfloat16"), batch_axes=1)
    return {**forms, "a/b/c": [stack, jnp.arange(3.0)], "plain": {"bias": jnp.ones(2)}}


@pytest.fixture(name="ocp")
def orbax():
    return pytest.importorskip("orbax.checkpoint")


class TestOrbax:
    def test_standard_checkpointer(self, ocp, tmp_path):
        tree = every_form()
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "step", tree)
            checkpointer.wait_until_finished()
            target = jax.eval_shape(lambda: tree)
            back = checkpointer.restore(tmp_path / "step", target)
        same_tree(back, tree)
        for name, form in FORMS.items():
            leaf = back[f"model/{name}"]["w"]
            np.testing.assert_array_equal(leaf.decode(), reference(form(weights((4, 6)))))
        assert nbytes(back) == nbytes(tree)

    def test_pytree_checkpointer(self, ocp, tmp_path):
        tree = every_form()
        checkpointer = ocp.PyTreeCheckpointer()
        checkpointer.save(tmp_path / "step", tree)
        same_tree(checkpointer.restore(tmp_path / "step", item=tree), tree)

    def test_manager_with_a_sharded_tree(self, ocp, tmp_path):
        mesh = jax.make_mesh((8,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
        tree = {"w": quantized(weights((8, 16))), "s": sparse(weights((8, 16)))}
        place = lambda x: NamedSharding(mesh, P("a") if x.shape[0] == 8 else P())
        tree = jax.tree.map(lambda x: jax.device_put(x, place(x)), tree)
        with ocp.CheckpointManager(tmp_path) as manager:
            manager.save(3, args=ocp.args.StandardSave(tree))
            manager.wait_until_finished()
            target = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
            )
            back = manager.restore(3, args=ocp.args.StandardRestore(target))
        same_tree(back, tree)
        for one, two in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True):
            assert one.sharding == two.sharding
        np.testing.assert_array_equal(back["s"].decode(), tree["s"].decode())


def test_equinox():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(4, 2, 8, 2, key=jax.random.key(0))
    arrays, static = eqx.partition(model, eqx.is_array)
    small = compress(arrays, "int4")
    assert sum(map(is_compressed, jax.tree.leaves(small, is_leaf=is_compressed))) == 3
    x = jnp.asarray(weights((5, 4)))

    @jax.jit
    def run(arrays, x):
        return jax.vmap(eqx.combine(decode(arrays), static))(x)

    np.testing.assert_allclose(run(small, x), run(decode(small), x), rtol=1e-6, atol=1e-6)
    assert not np.allclose(run(small, x), run(arrays, x))


def test_haiku():
    hk = pytest.importorskip("haiku")
    model = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([8, 6])(x)))
    x = jnp.asarray(weights((5, 4)))
    params = model.init(jax.random.key(0), x)
    small = compress(params, "codebook16")
    run = jax.jit(lambda params, x: model.apply(decode(params), x))
    assert nbytes(small) < nbytes(params)
    np.testing.assert_allclose(run(small, x), run(decode(small), x), rtol=1e-6, atol=1e-6)
    assert not np.allclose(run(small, x), run(params, x))


@pytest.mark.parametrize("form", ["int3-affine", "codebook5", "sparse"])
def test_plain_functions(form):
    params = {"layers": [{"w": jnp.asarray(weights((8, 8), seed=i))} for i in range(2)]}
    small = compress(params, form)
    x = jnp.asarray(weights((3, 8)))

    @jax.jit
    def run(params, x):
        for layer in decode(params)["layers"]:
            x = jnp.tanh(x @ layer["w"])
        return x

    np.testing.assert_allclose(run(small, x), run(decode(small), x), rtol=1e-6, atol=1e-6)
