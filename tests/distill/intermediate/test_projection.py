"""Features brought to the width and to the resolution of a teacher's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcomp.distill.intermediate.hint import hint_loss
from jaxcomp.distill.intermediate.projection import init_projection, project, resize


def features(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


class TestProject:
    @pytest.mark.parametrize("axis", [1, -1])
    def test_is_a_linear_map_of_the_channels(self, axis):
        student = features(2, 6, 5, 6)
        shapes = (jax.ShapeDtypeStruct(x, jnp.bfloat16) for x in ((1, 6, 1, 6), (3, 4, 9, 4)))
        projection = init_projection(jax.random.key(0), *shapes, axis=axis)
        projection = {"kernel": projection["kernel"], "bias": features(4, seed=1)}
        actual = project(projection, student, axis=axis)
        moved = np.moveaxis(student, axis, -1) @ np.asarray(projection["kernel"])
        expected = np.moveaxis(moved + projection["bias"], -1, axis)
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)

    def test_variance_is_kept_and_the_key_decides(self):
        shapes = (jnp.ones((1, 400)), jnp.ones((1, 300)))
        first, again, other = (init_projection(jax.random.key(i), *shapes) for i in (0, 0, 1))
        np.testing.assert_array_equal(first["kernel"], again["kernel"])
        assert (np.asarray(first["kernel"]) != np.asarray(other["kernel"])).any()
        assert not np.asarray(first["bias"]).any()
        projected = np.asarray(project(first, features(200, 400)))
        np.testing.assert_allclose(projected.std(), 1, rtol=0.02)

    def test_bias_is_optional_and_half_precision_is_computed_in_float32(self):
        student = features(3, 4).astype(jnp.bfloat16)
        projection = init_projection(jax.random.key(0), student, jnp.ones((3, 2)), bias=False)
        assert list(projection) == ["kernel"]
        actual = project(projection, student)
        assert actual.dtype == jnp.float32
        expected = student.astype(np.float32) @ np.asarray(projection["kernel"])
        np.testing.assert_allclose(actual, expected, rtol=1e-5)

    @pytest.mark.parametrize("where", [np.array([True, False]), np.array([[1, 1, 0], [1, 0, 0]])])
    def test_nan_in_padding_reaches_no_gradient(self, where):
        where = where.astype(bool)
        kept = where if where.ndim == 2 else np.stack([where] * 3, 1)
        student, teacher = features(2, 3, 4), features(2, 3, 5, seed=1)
        projection = init_projection(jax.random.key(0), student, teacher)

        def total(projection, student):
            projected = project(projection, student, where=where)
            return hint_loss(projected, teacher, where=kept).sum()

        gradient = jax.jit(jax.grad(total, (0, 1)))
        dirty = np.where(kept[..., None], student, np.nan).astype(np.float32)
        for a, b in zip(
            jax.tree.leaves(gradient(projection, dirty)),
            jax.tree.leaves(gradient(projection, student)),
            strict=True,
        ):
            assert np.isfinite(a).all()
            np.testing.assert_array_equal(a, b)

    def test_an_optimizer_learns_it_next_to_a_student(self):
        student = features(64, 6)
        teacher = student[:, :3] @ features(3, 4, seed=1) + 2
        projection = init_projection(jax.random.key(0), student, teacher)
        tx = optax.adam(0.1)

        def loss(projection):
            return hint_loss(project(projection, student), teacher).mean()

        def step(state, _):
            projection, moments = state
            value, gradient = jax.value_and_grad(loss)(projection)
            updates, moments = tx.update(gradient, moments)
            return (optax.apply_updates(projection, updates), moments), value

        state = projection, tx.init(projection)
        losses = np.asarray(jax.lax.scan(step, state, length=200)[1])
        assert losses[0] > 3 > 0.01 > losses[-1]

    def test_what_does_not_fit_is_refused(self):
        student = features(2, 6)
        projection = init_projection(jax.random.key(0), student, features(2, 3))
        with pytest.raises(ValueError, match="must have 6 channels on axis 1"):
            project(projection, features(2, 5))
        with pytest.raises(ValueError, match="nothing on axis 2"):
            init_projection(jax.random.key(0), student, features(2, 3), axis=2)
        with pytest.raises(TypeError, match="floating"):
            project(projection, student.astype(int))
        with pytest.raises(ValueError, match="where"):
            project(projection, student, where=np.ones(3, bool))


class TestResize:
    @pytest.mark.parametrize(("sizes", "axis"), [((3, 2), -1), ((5, 7), 1), ((3, 14), 2)])
    def test_down_is_the_mean_of_each_run_and_up_is_linear(self, sizes, axis):
        x = features(2, 5, 7, 3)  # channels last
        resized = resize(np.moveaxis(x, -1, axis), sizes, axis=axis)
        actual = np.moveaxis(np.asarray(resized), axis, -1)
        for at, size in enumerate(sizes, 1):
            old = x.shape[at]
            if size > old:
                # Centres of the new positions among those of the old, held at the edges.
                centres = (np.arange(size) + 0.5) * old / size - 0.5
                parts = [
                    [np.interp(centres, np.arange(old), line) for line in np.moveaxis(x, at, -1)[i]]
                    for i in np.ndindex(*np.moveaxis(x, at, -1).shape[:-2])
                ]
                shape = (*np.moveaxis(x, at, -1).shape[:-1], size)
                x = np.moveaxis(np.array(parts).reshape(shape), -1, at)
            else:
                runs = [(i * old // size, -(-(i + 1) * old // size)) for i in range(size)]
                means = [x.take(range(*run), at).mean(at) for run in runs]
                x = np.stack(means, at)
        np.testing.assert_allclose(actual, x, rtol=1e-5, atol=1e-6)

    @pytest.mark.slow
    def test_down_is_torch_adaptive_average_pooling(self):
        torch = pytest.importorskip("torch")
        x = features(2, 7, 5, 3)
        expected = torch.nn.functional.adaptive_avg_pool2d(
            torch.tensor(x).permute(0, 3, 1, 2), (3, 2)
        ).permute(0, 2, 3, 1)
        np.testing.assert_allclose(resize(x, (3, 2)), expected, rtol=1e-5, atol=1e-6)

    def test_same_sizes_change_nothing(self):
        x = features(2, 4, 3)
        np.testing.assert_array_equal(resize(x, (4,)), x)

    @pytest.mark.parametrize(
        ("sizes", "axis"), [((3,), -1), ((3, 0), -1), ((3, 2, 2), -1), ((3, 2), 0)]
    )
    def test_what_does_not_fit_is_refused(self, sizes, axis):
        with pytest.raises(ValueError, match=r"sizes .* must be positive"):
            resize(features(2, 5, 7, 3), sizes, axis=axis)
