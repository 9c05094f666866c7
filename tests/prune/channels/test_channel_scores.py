"""Channel scores against plain loops over every number that belongs to a unit."""

import doctest
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcomp.prune import channel_scores as scores
from jaxcomp.prune.channels.groups import (
    ChannelScore,
    ScoredGroup,
    evaluate,
    needs,
    needs_of,
    only,
    scored_group,
)


class Slice(NamedTuple):
    path: str
    axis: int
    positions: np.ndarray
    reason: str = "test"


class Group(NamedTuple):
    name: str
    size: int
    slices: tuple[Slice, ...]
    fixed: str | None = None


@st.composite
def groups(draw):
    """A group of one to four slices, and leaves that it takes one to three positions a unit of."""
    size = draw(st.integers(1, 4))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    leaves, slices = {}, []
    for i in range(draw(st.integers(1, 3))):
        ndim = draw(st.integers(1, 3))
        # The last leaf may be taken along two axes, as a square recurrent kernel is.
        axes = draw(st.lists(st.integers(0, ndim - 1), min_size=1, max_size=2, unique=True))
        shape = [draw(st.integers(1, 3)) for _ in range(ndim)]
        for axis in axes:
            per_unit = draw(st.integers(1, 3))
            shape[axis] = size * per_unit + draw(st.integers(0, 2))
            chosen = generator.permutation(shape[axis])[: size * per_unit]
            slices.append(Slice(f"layer_{i}/kernel", axis, chosen.reshape(size, per_unit)))
        leaves[f"layer_{i}/kernel"] = generator.normal(size=shape).astype(np.float32)
    return Group("layer_0/kernel[0]", size, tuple(slices)), leaves, generator


def loop(group, leaves, term):
    """Sum ``term(path, index)`` over every index of every slice, one number at a time."""
    totals = np.zeros(group.size)
    for part in group.slices:
        for index in np.ndindex(leaves[part.path].shape):
            for unit in range(group.size):
                if index[part.axis] in part.positions[unit]:
                    totals[unit] += term(part.path, index)
    return totals


@settings(max_examples=12)
@given(groups())
def test_scores_against_loops(case):
    group, leaves, generator = case
    normal = lambda: {
        p: generator.normal(size=w.shape).astype(np.float32) for p, w in leaves.items()
    }
    gradients, squared = normal(), {p: g**2 for p, g in normal().items()}
    scored = scored_group(group, leaves, gradients=gradients, squared_gradients=squared)
    w = lambda path, index: float(leaves[path][index])
    expected = {
        scores.l1: loop(group, leaves, lambda p, i: abs(w(p, i))),
        scores.l2: np.sqrt(loop(group, leaves, lambda p, i: w(p, i) ** 2)),
        scores.taylor: np.abs(loop(group, leaves, lambda p, i: w(p, i) * float(gradients[p][i]))),
        scores.fisher: 0.5 * loop(group, leaves, lambda p, i: w(p, i) ** 2 * float(squared[p][i])),
    }
    # One program for all, instead of one for every score, leaf and operation.
    arrays = {n: getattr(scored, n) for n in ("weights", "gradients", "squared_gradients")}
    found = jax.jit(lambda arrays: [evaluate(s, scored._replace(**arrays)) for s in expected])
    for got, totals in zip(found(arrays), expected.values(), strict=True):
        np.testing.assert_allclose(got, totals, rtol=2e-5, atol=2e-5)


@settings(max_examples=6)
@given(groups())
def test_activation_norm_against_a_loop(case):
    group, leaves, generator = case
    seen = {
        (part.path, part.axis): generator.uniform(size=leaves[part.path].shape[part.axis])
        for part in group.slices[:2]
    }
    scored = scored_group(group, leaves, activations=seen | {("elsewhere", 0): np.ones(3)})
    totals = np.zeros(group.size)
    for part in group.slices[:2]:
        for unit in range(group.size):
            squares = [seen[part.path, part.axis][p] for p in part.positions[unit]]
            totals[unit] += np.sqrt(sum(squares))
    np.testing.assert_allclose(evaluate(scores.activation_norm, scored), totals, rtol=1e-5)


def mlp():
    positions = np.arange(3)[:, None]
    slices = (
        Slice("first/kernel", 1, positions),
        Slice("first/bias", 0, positions),
        Slice("norm/weight", 0, positions),
        Slice("batch_stats/norm/var", 0, positions),
        Slice("second/weight", 0, positions),
    )
    leaves = {
        "first/kernel": jnp.array([[1.0, -2.0, 0.5], [1.0, 2.0, 0.0]]),
        "first/bias": jnp.array([10.0, 0.0, 0.0]),
        "norm/weight": jnp.array([-3.0, 1.0, 2.0]),
        "batch_stats/norm/var": jnp.array([1e9, 1.0, 1.0]),
        "second/weight": jnp.array([[4.0], [0.0], [0.0]]),
    }
    return Group("first/kernel[1]", 3, slices), leaves


def test_the_whole_group_counts_but_no_running_statistic():
    group, leaves = mlp()
    scored = scored_group(group, leaves)
    np.testing.assert_allclose(scores.l1(scored), [2 + 10 + 3 + 4, 4 + 1, 0.5 + 2])
    everything = scored_group(group, leaves, where=lambda path, leaf: True)
    assert ("batch_stats/norm/var", 0) in everything.weights
    no_bias = only(scored, lambda path, axis: not path.endswith("bias"))
    np.testing.assert_allclose(scores.l1(no_bias), [2 + 3 + 4, 4 + 1, 0.5 + 2])
    with pytest.raises(ValueError, match=r"leaves none of first/kernel\[1\], first/bias\[0\]"):
        only(scored, lambda path, axis: False)


def test_batch_norm_scale_takes_scales_and_no_matrix():
    group, leaves = mlp()
    # `second/weight` has one number a unit too, but is a matrix.
    np.testing.assert_allclose(scores.batch_norm_scale(scored_group(group, leaves)), [3, 1, 2])
    bare = group._replace(slices=(group.slices[0], group.slices[4]))
    with pytest.raises(ValueError, match=r"first/kernel\[1\]: no normalization scale among"):
        scores.batch_norm_scale(scored_group(bare, leaves))
    # Haiku's scale has axes of size one in front; a stack of layers has one in front of any size.
    stacked = Slice("norm/scale", 1, np.arange(3)[:, None])
    tall = {"norm/scale": jnp.array([[1.0, 2.0, 3.0], [-1.0, 0.0, 1.0]])}
    scored = scored_group(Group("norm", 3, (stacked,)), tall)
    np.testing.assert_allclose(scores.batch_norm_scale(scored), [2, 2, 4])


def test_taylor_is_the_change_of_a_linear_loss():
    group, leaves = mlp()
    weights = {path: leaf for path, leaf in leaves.items() if "batch_stats" not in path}
    direction = {p: jnp.sin(jnp.arange(w.size) + 1.0).reshape(w.shape) for p, w in weights.items()}
    loss = lambda tree: sum(jnp.vdot(direction[p], w) for p, w in tree.items())
    scored = scored_group(group, leaves, gradients=jax.grad(loss)(weights))
    for unit, score in enumerate(evaluate(scores.taylor, scored)):
        removed = dict(weights)
        for part in group.slices:
            if part.path in removed:
                at = (slice(None),) * part.axis + (part.positions[unit],)
                removed[part.path] = removed[part.path].at[at].set(0)
        np.testing.assert_allclose(score, abs(loss(weights) - loss(removed)), rtol=1e-5, atol=1e-5)


def test_random_has_a_key_of_its_own_for_each_group():
    group, leaves = mlp()
    key = jax.random.key(3)
    first = evaluate(scores.random, scored_group(group, leaves, key=key))
    again = evaluate(scores.random, scored_group(group, leaves, key=key))
    other = evaluate(scores.random, scored_group(group._replace(name="b"), leaves, key=key))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("need", ["gradients", "squared_gradients", "activations", "key"])
def test_what_is_needed_is_asked_for_by_name(need):
    group, leaves = mlp()
    score = needs(need)(lambda group: jnp.zeros(group.size))
    assert needs_of(score) == {need}
    with pytest.raises(ValueError, match=rf"first/kernel\[1\]: the score needs {need}: pass"):
        score(scored_group(group, leaves))


def test_declared_needs():
    assert needs_of(scores.l1) == needs_of(scores.batch_norm_scale) == set()
    assert needs_of(scores.taylor) == {"gradients"}
    assert needs_of(scores.fisher) == {"squared_gradients"}
    assert needs_of(scores.activation_norm) == {"activations"}
    assert needs_of(scores.random) == {"key"}
    with pytest.raises(Exception, match="hessian"):
        needs("hessian")


def test_narrow_and_complex_leaves_are_summed_in_float32():
    cut = Slice("kernel", 1, np.arange(2)[:, None])
    kernel = jnp.full((4096, 2), 1.0, jnp.bfloat16)
    scored = scored_group(Group("kernel[1]", 2, (cut,)), {"kernel": kernel})
    np.testing.assert_array_equal(evaluate(scores.l1, scored), [4096, 4096])
    turned = scored_group(Group("kernel[1]", 2, (cut,)), {"kernel": jnp.array([[3 + 4j, 1j]])})
    np.testing.assert_allclose(evaluate(scores.l1, turned), [5, 1])
    np.testing.assert_allclose(evaluate(scores.l2, turned), [5, 1])


def test_bad_scores_and_bad_groups():
    group, leaves = mlp()
    scored = scored_group(group, leaves)
    with pytest.raises(ValueError, match=r"returned shape \(\), not \(3,\)"):
        evaluate(lambda group: jnp.sum(group.weights["first/kernel", 1]), scored)
    with pytest.raises(TypeError, match="complex64: take its absolute value"):
        evaluate(lambda group: jnp.zeros(3, jnp.complex64), scored)
    with pytest.raises(ValueError, match="first/bias is in group"):
        scored_group(group, {p: w for p, w in leaves.items() if p != "first/bias"})
    with pytest.raises(ValueError, match=r"second/weight: .* takes axis 0 up to position 2"):
        scored_group(group, leaves | {"second/weight": jnp.ones((2, 1))})
    with pytest.raises(ValueError, match="first/kernel: no gradient"):
        scored_group(group, leaves, gradients={})
    with pytest.raises(ValueError, match=r"first/kernel: shape \(3, 2\), but the leaf's"):
        scored_group(group, leaves, gradients={**leaves, "first/kernel": jnp.ones((3, 2))})
    with pytest.raises(ValueError, match="none of its leaves takes part"):
        scored_group(group, leaves, where=lambda path, leaf: False)
    with pytest.raises(ValueError, match="no weight that reads these channels was observed"):
        evaluate(scores.activation_norm, scored_group(group, leaves, activations={}))
    assert isinstance(scores.taylor, ChannelScore)
    assert isinstance(scored, ScoredGroup)


def test_scores_can_be_jitted():
    group, leaves = mlp()
    jitted = jax.jit(lambda leaves: evaluate(scores.l2, scored_group(group, leaves)))
    np.testing.assert_allclose(jitted(leaves), scores.l2(scored_group(group, leaves)), rtol=1e-6)


@pytest.mark.parametrize("name", ["taylor", "fisher", "activation_norm", "random"])
def test_examples_of_scores_that_declare_needs(name):
    # Doctest collects functions, and these are wrapped.
    function = getattr(scores, name).function
    (example,) = doctest.DocTestFinder(recurse=False).find(function, name, globs=vars(scores))
    assert example.examples
    assert doctest.DocTestRunner().run(example).failed == 0
