"""The walk over a model that solvers of one leaf share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcomp
from jaxcomp.checkpoint import CheckpointError
from jaxcomp.model.layerwise import WalkFiles, moment_of, moments, uses_of, walk
from jaxcomp.model.observe import observe
from jaxcomp.model.statistics import absmax
from jaxcomp.quantize.affine import encode
from jaxcomp.quantize.formats import Format

RNG = np.random.default_rng(0)
PARAMS = {
    "w0": jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32),
    "w1": jnp.asarray(RNG.normal(size=(3, 4)), jnp.float32),
}
X = jnp.asarray(RNG.normal(size=(9, 4)), jnp.float32)


def model(p, x):
    return jnp.tanh(x @ p["w0"]) @ p["w1"]


def again():
    return [X[:4], X[4:]]


GROUPS = [["w0"], ["w1"]]


def largest(path, leaf, evidence):
    """Keeps what the inputs are at most, and makes the leaf a number."""
    return (jnp.full_like(leaf, 2.0), [float(evidence[0].max())])


@pytest.mark.parametrize("sequential", [True, False])
def test_later_leaves_see_what_earlier_ones_became(sequential):
    found = dict(walk(model, PARAMS, again, GROUPS, absmax(), largest, sequential=sequential))
    seen = jnp.full((4, 3), 2.0) if sequential else PARAMS["w0"]
    expected = float(jnp.max(jnp.abs(jnp.tanh(X @ seen))))
    np.testing.assert_allclose(found["w1"][1], [expected], rtol=1e-6)
    together = walk(model, PARAMS, again, [["w0", "w1"]], absmax(), largest)
    dense = float(jnp.max(jnp.abs(jnp.tanh(X @ PARAMS["w0"]))))
    np.testing.assert_allclose(dict(together)["w1"][1], [dense], rtol=1e-6)


def test_compressed_leaves_are_seen_decoded():
    solve = lambda path, leaf, evidence: (encode(leaf, Format(2)), evidence[0])
    found = dict(walk(model, PARAMS, again, GROUPS, absmax(), solve))
    hidden = jnp.tanh(X @ found["w0"][0].decode())
    np.testing.assert_allclose(found["w1"][1], jnp.max(jnp.abs(hidden), 0), rtol=1e-6)
    assert isinstance(found["w0"][0], jaxcomp.arrays.CompressedArray)


def test_moments_of_several_uses_count_by_their_samples():
    params = {"w": PARAMS["w0"][:3]}
    apply = lambda p, x: jnp.tanh(x @ p["w"])[:2] @ p["w"]
    x = X[:, :3]
    found = observe(apply, params, [x], moments())
    hidden = np.tanh(np.asarray(x) @ np.asarray(params["w"]))[:2]
    both = np.concatenate([x, hidden])
    uses = [value for _, value in uses_of(found, "w")]
    np.testing.assert_allclose(moment_of(uses), both.T @ both / len(both), rtol=1e-5)


def test_what_is_looked_up_needs_no_pass_and_no_evidence():
    params = {"embed": jnp.ones((5, 4)), **PARAMS}
    apply = lambda p, ids: model(p, p["embed"][ids])
    passes, met = [], {}

    def batches():
        passes.append(1)
        return [jnp.arange(3)]

    def solve(path, leaf, evidence):
        met[path] = len(evidence)
        return (leaf,)

    groups = [["embed"], ["w0", "w1"]]
    list(walk(apply, params, batches, groups, moments(), solve, looked_up=frozenset({"embed"})))
    assert met == {"embed": 0, "w0": 1, "w1": 1}
    assert len(passes) == 1
    with pytest.raises(ValueError, match="embed: its rows are looked up"):
        list(walk(apply, params, batches, groups, moments(), solve))


def test_what_is_looked_up_besides_is_solved_for_its_product():
    params = {"embed": jnp.asarray(RNG.normal(size=(5, 4)), jnp.float32)}
    apply = lambda p, ids: jnp.tanh(p["embed"][ids]) @ p["embed"].T
    call = (apply, params, lambda: [jnp.arange(5)], [["embed"]], moments())
    solve = lambda path, leaf, evidence: (leaf, moment_of(evidence))
    with pytest.raises(ValueError, match="embed: its rows are looked up"):
        list(walk(*call, solve))
    ((_, (_, found)),) = walk(*call, solve, also_looked_up=frozenset({"embed"}))
    hidden = np.tanh(np.asarray(params["embed"], np.float64))
    np.testing.assert_allclose(found, hidden.T @ hidden / 5, rtol=1e-5)


def test_files_hold_compressed_leaves_bit_for_bit(tmp_path):
    solve = lambda path, leaf, evidence: (encode(leaf, Format(3)), [float(evidence[0].max())])
    call = {"damping": "0.01"}
    files = WalkFiles.open(tmp_path, "test", call, PARAMS)
    first = list(walk(model, PARAMS, again, GROUPS, absmax(), solve, files=files))

    def never(*_):
        raise AssertionError("read again")

    files = WalkFiles.open(tmp_path, "test", call, PARAMS)
    second = list(walk(model, PARAMS, never, GROUPS, absmax(), never, files=files))
    for (path, one), (other_path, other) in zip(first, second, strict=True):
        assert path == other_path
        assert jax.tree.structure(one) == jax.tree.structure(other)
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()

    def refuse(path, parts):
        raise ValueError(f"{path} will not do")

    with pytest.raises(CheckpointError, match="does not fit this call: w0 will not do"):
        list(walk(model, PARAMS, again, GROUPS, absmax(), solve, files=files, check=refuse))
    with pytest.raises(CheckpointError, match=r"leaves \['w0'\], not \['w1'\]"):
        list(walk(model, PARAMS, again, GROUPS[::-1], absmax(), solve, files=files))
    with pytest.raises(ValueError, match=r"another damping: 0.01, now 0.1"):
        WalkFiles.open(tmp_path, "test", {"damping": "0.1"}, PARAMS)
    with pytest.raises(ValueError, match="another params/w0"):
        WalkFiles.open(tmp_path, "test", call, {**PARAMS, "w0": PARAMS["w0"] + 1})


@pytest.mark.parametrize("tree", [[1, 2], {"call": "x"}, {"leaves": [], "other": 1}])
def test_files_of_something_else_are_refused(tmp_path, tree):
    files = WalkFiles.open(tmp_path, "test", {}, PARAMS)
    jaxcomp.save(files.path(0), tree)
    with pytest.raises(CheckpointError, match="not a file of finished leaves"):
        files.read(0, ["w0"], lambda path, parts: None)
