"""What every distillation loss does with its inputs first: masks, dtypes, safe norms, checks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.distill.inputs import (
    as_floats,
    as_mask,
    check_axis,
    check_same_batch,
    check_same_shape,
    check_scalar,
    computing_dtype,
    known,
    masked_mean,
    norm,
    normalized,
)

NAN, INF = np.nan, np.inf


@jax.jit
def norms(x):
    """Both functions of rows, with the gradients of ``sum(weights * result)``."""
    weights = jnp.arange(1.0, x.size + 1).reshape(x.shape).astype(x.dtype)
    unit, unit_back = jax.vjp(normalized, x)
    length, length_back = jax.vjp(norm, x)
    return unit, unit_back(weights)[0], length, length_back(weights[:, 0])[0]


def rows(seed=0):
    return np.random.default_rng(seed).normal(size=(4, 3)).astype(np.float32)


class TestNorms:
    @pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e30, 2.0**120])
    def test_values_and_gradients_at_every_magnitude(self, scale):
        x = rows() * np.float32(scale)
        unit, to_unit, length, to_length = (np.asarray(a) for a in norms(x))
        exact = np.float64(x)
        size = np.sqrt((exact**2).sum(-1, keepdims=True))
        np.testing.assert_allclose(unit, exact / size, rtol=1e-6)
        np.testing.assert_allclose(length, size[:, 0], rtol=1e-6)
        weights = np.arange(1.0, 13).reshape(4, 3)
        across = weights - (weights * exact / size).sum(-1, keepdims=True) * exact / size
        np.testing.assert_allclose(to_unit * scale, across / size * scale, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(to_length, weights[:, :1] * exact / size, rtol=1e-6)

    def test_the_largest_floats(self):
        x = np.full((4, 3), np.finfo(np.float32).max)
        unit, to_unit, _, to_length = (np.asarray(a) for a in norms(x))
        np.testing.assert_allclose(unit, 3**-0.5, rtol=1e-6)
        assert np.isfinite(to_unit).all()
        np.testing.assert_allclose(to_length[0], 3**-0.5, rtol=1e-6)
        np.testing.assert_allclose(norms(x / 2)[2], np.sqrt(3) * (x / 2)[:, 0], rtol=1e-6)

    def test_zero_is_zero_with_gradient_zero_and_finite_second_derivatives(self):
        for result in norms(np.zeros((4, 3), np.float32)):
            assert not np.asarray(result).any()

        def both(x):
            return norm(x).sum() + normalized(x).sum()

        curve = jax.jit(jax.hessian(both))
        assert not np.asarray(curve(np.zeros((1, 3), np.float32))).any()

    def test_nan_and_infinity_show_in_their_row(self):
        for bad in (NAN, INF):
            x = rows()
            x[1, 2] = bad
            for result in (norms(x)[0], norms(x)[2][:, None]):
                shows = np.isnan(np.asarray(result)).any(-1)
                np.testing.assert_array_equal(shows, [False, True, False, False])

    def test_second_derivatives(self):
        with jax.enable_x64(True):
            x = np.float64(rows()[:1])

            def both(x):
                return (norm(x)[:, None] * normalized(x) ** 2 * np.arange(3.0)).sum()

            slope = jax.jit(jax.grad(both))
            curve = np.asarray(jax.jit(jax.hessian(both))(x))[0, :, 0]
            for i in range(3):
                step = np.zeros((1, 3))
                step[0, i] = 1e-6
                rise = np.asarray(slope(x + step)) - np.asarray(slope(x - step))
                np.testing.assert_allclose(curve[:, i], rise[0] / 2e-6, rtol=1e-6, atol=1e-8)

    def test_several_axes(self):
        x = jnp.asarray(rows().reshape(2, 2, 3))
        size = np.sqrt((np.asarray(x) ** 2).sum((0, 2)))
        np.testing.assert_allclose(norm(x, (0, 2)), size, rtol=1e-6)
        np.testing.assert_allclose(normalized(x, [0, 2]), x / size[:, None], rtol=1e-6)


class TestMasks:
    @pytest.mark.parametrize(
        ("where", "shapes", "shape"),
        [
            (None, [(4,), (4, 3)], (1, 1)),
            (np.ones(4, bool), [(4,), (4, 3)], (4, 1)),
            (np.ones((4, 3), bool), [(4,), (4, 3)], (4, 3)),
            (np.ones((1, 3), bool), [(4,), (4, 3)], (1, 3)),
            (np.ones((4, 1), bool), [(4,), (4, 5), (4, 5, 3)], (4, 1, 1)),
            (np.ones((), bool), [(), (4, 3)], (1, 1)),
        ],
    )
    def test_shapes(self, where, shapes, shape):
        keep = as_mask(where, *shapes)
        assert keep.shape == shape
        assert keep.dtype == bool
        np.broadcast_shapes(keep.shape, shapes[-1])

    @pytest.mark.parametrize(
        ("error", "match", "where", "shapes"),
        [
            (TypeError, "pass where != 0", np.ones(4), [(4,), (4, 3)]),
            (
                ValueError,
                r"must have the shape \(4,\) or \(4, 3\)",
                np.ones(3, bool),
                [(4,), (4, 3)],
            ),
            (ValueError, "must have the shape", np.ones((4, 2), bool), [(4,), (4, 3)]),
            (ValueError, "must have the shape", np.ones((4, 3), bool), [(4,)]),
            (ValueError, "must have the shape", np.ones((2, 1), bool), [(4, 3)]),
        ],
    )
    def test_errors(self, error, match, where, shapes):
        with pytest.raises(error, match=match):
            as_mask(where, *shapes)

    def test_mean_of_what_counts(self):
        x, keep = rows(), rows(1) > 0
        keep[2], keep[3] = False, True
        array, mask = jnp.asarray(x), jnp.asarray(keep)
        expected = [x[i][keep[i]].mean() if keep[i].any() else 0.0 for i in range(4)]
        np.testing.assert_allclose(masked_mean(array, mask, -1), expected, rtol=1e-6)
        np.testing.assert_allclose(masked_mean(array, mask), x[keep].mean(), rtol=1e-5)
        some = masked_mean(array, mask[:, :1], [0, 1])
        np.testing.assert_allclose(some, x[keep[:, 0]].mean(), rtol=1e-5)
        assert masked_mean(array, jnp.zeros((1, 1), bool)) == 0

    def test_mean_does_not_read_what_is_left_out(self):
        x, keep = rows(), rows(1) > 0
        slope = jax.jit(jax.value_and_grad(lambda x: masked_mean(x, jnp.asarray(keep))))
        expected = slope(x)
        np.testing.assert_allclose(expected[1], keep / keep.sum(), rtol=1e-6)
        for behind in (NAN, INF):
            value, gradient = slope(np.where(keep, x, np.float32(behind)))
            np.testing.assert_array_equal(value, expected[0])
            np.testing.assert_array_equal(gradient, expected[1])


class TestDtypes:
    def test_float32_unless_one_is_float64(self):
        half, single = jnp.ones(2, jnp.float16), jnp.ones(2, jnp.bfloat16)
        assert [a.dtype for a in as_floats(student=half, teacher=single)] == [jnp.float32] * 2
        with jax.enable_x64(True):
            double = np.ones(2)
            assert computing_dtype(jnp.asarray(double), half) == jnp.float64
            assert [a.dtype for a in as_floats(a=double, b=half)] == [jnp.float64] * 2

    def test_gradients_return_in_the_arguments_dtype(self):
        slope = jax.grad(lambda x: as_floats(x=x)[0].sum())
        assert slope(jnp.ones(2, jnp.bfloat16)).dtype == jnp.bfloat16

    @pytest.mark.parametrize("dtype", [int, bool, complex])
    def test_what_is_not_a_float_is_named(self, dtype):
        with pytest.raises(TypeError, match="teacher must be floating point"):
            as_floats(student=np.ones(2, np.float32), teacher=np.ones(2, dtype))


class TestChecks:
    def test_shapes(self):
        a, b = jnp.ones((2, 3)), jnp.ones((2, 4))
        check_same_shape("do.", student=a, teacher=a)
        with pytest.raises(ValueError, match=r"student \(2, 3\) and teacher \(2, 4\) .*: do\."):
            check_same_shape("do.", student=a, teacher=b)

    def test_batches(self):
        a = jnp.ones((2, 3))
        check_same_batch(student=a, teacher=jnp.ones(2), third=a)
        for bad in (jnp.ones((3, 3)), jnp.ones(())):
            with pytest.raises(ValueError, match="the same examples on axis 0"):
                check_same_batch(student=a, teacher=bad)
        with pytest.raises(ValueError, match="the same examples on axis 0"):
            check_same_batch(student=jnp.ones(()), teacher=jnp.ones(()))
        with pytest.raises(ValueError, match=r"student \(0, 3\) and .* hold no example on axis 0"):
            check_same_batch(student=jnp.ones((0, 3)), teacher=jnp.ones((0, 3)))

    def test_axes(self):
        assert [check_axis("x", jnp.ones((2, 3)), axis) for axis in (0, -1, -2)] == [0, 1, 0]
        for shape, axis in (((2, 3), 2), ((2, 3), -3), ((2, 0), 1), ((), -1)):
            with pytest.raises(ValueError, match=r"x .* has nothing on axis"):
                check_axis("x", jnp.ones(shape), axis)

    def test_scalars(self):
        assert check_scalar("weight", 1, 0, 1, "must") == 1
        assert check_scalar("weight", np.float64(0.5), 0, 1, "must") == 0.5
        for bad in (-0.1, 1.1, NAN, INF):
            with pytest.raises(ValueError, match=r"weight .* must be\."):
                check_scalar("weight", jnp.float32(bad), 0, 1, "must be")
        with pytest.raises(ValueError, match="must be a scalar"):
            check_scalar("weight", np.ones(1), 0, 1, "must be")
        # What is traced has no value yet.
        jax.jit(lambda w: check_scalar("weight", w, 0, 1, "must be"))(7.0)

    def test_known(self):
        np.testing.assert_array_equal(known(jnp.arange(3)), np.arange(3))
        seen = []
        jax.jit(lambda x: seen.append(known(x)))(jnp.ones(2))
        assert seen == [None]
