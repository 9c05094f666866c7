"""Evaluating many candidates at once: every form, every size, one compilation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from jaxcomp import search
from jaxcomp.search.memory import default_bytes, fitting

compiled: list[str] = []


def _note(event: str, seconds: float, **_: object) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        compiled.append(event)


jax.monitoring.register_event_duration_secs_listener(_note)
X = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)


def score(candidate, x):
    """Arrays, numbers, keys and half floats go in and come out."""
    noise = jax.random.normal(candidate["key"], (3,))
    hidden = jnp.tanh(x * candidate["scale"] + noise * candidate["half"].astype(jnp.float32))
    return {"sum": hidden.sum(), "half": candidate["half"] * 2, "key": candidate["key"]}


def candidates(count):
    return {
        "scale": jnp.linspace(0.5, 2.0, count),
        "half": jnp.arange(count, dtype=jnp.bfloat16),
        "key": jax.random.split(jax.random.key(3), count),
    }


def expected(stacked, count):
    """Each alone, by a compiled function."""
    alone = jax.jit(score)
    rows = [alone(jax.tree.map(lambda x, i=i: x[i], stacked), X) for i in range(count)]
    return {
        "sum": np.array([row["sum"] for row in rows]),
        "half": np.stack([np.asarray(row["half"]) for row in rows]),
        "key": np.stack([np.asarray(jax.random.key_data(row["key"])) for row in rows]),
    }


ALL = candidates(8)
WANTED = expected(ALL, 8)


def first(count, stacked=ALL):
    return jax.tree.map(lambda x: x[:count], stacked)


def check(found, count, exact=False):
    assert isinstance(found["sum"], np.ndarray)
    tolerance = {"rtol": 0} if exact else {"rtol": 1e-6, "atol": 1e-6}
    np.testing.assert_allclose(found["sum"], WANTED["sum"][:count], **tolerance)
    assert found["half"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(found["half"], WANTED["half"][:count])
    data = np.asarray(jax.random.key_data(found["key"]))
    np.testing.assert_array_equal(data.reshape(count, 2), WANTED["key"][:count])


@pytest.mark.parametrize(
    ("form", "chunk", "size"),
    [("vmap", None, 5), ("vmap", 2, 2), ("map", None, 5), ("map", 2, 6), ("loop", None, 5)],
)
def test_a_form_gives_what_each_alone_gives_at_any_size(form, chunk, size):
    evaluate = search.population(score, first(5), X, form=form, chunk=chunk)
    assert (evaluate.form, evaluate.size, evaluate.seconds) == (form, size, {})
    for count in (5, 1, 0, 8):
        check(evaluate(first(count), X), count, exact=chunk is None and form != "vmap")


def test_no_size_is_compiled_again():
    function = lambda slope, x: (slope * x).sum()
    slopes = np.arange(11, dtype=np.float32)
    for form in ("vmap", "map", "loop"):
        evaluate = search.population(function, slopes[:4], X, form=form, max_bytes=1 << 30)
        shared = jnp.asarray(X)
        evaluate(slopes[:4], shared)
        before = len(compiled)
        for count in (1, 2, 3, 4, 5, 11):
            found = evaluate(slopes[:count], shared)
            np.testing.assert_allclose(found, slopes[:count] * X.sum(), atol=1e-5)
        assert len(compiled) == before, form


def test_looking_at_memory_is_no_second_compilation():
    jax.clear_caches()
    slopes = np.arange(4, dtype=np.float32)
    shared = jax.device_put(X)
    before = len(compiled)
    search.population(lambda s, x: x @ x.T * s, slopes, shared, form="vmap")(slopes, shared)
    assert len(compiled) - before == 1


def test_the_fastest_form_is_taken():
    evaluate = search.population(lambda slope, x: (slope * x).sum(), np.arange(4.0), X)
    assert set(evaluate.seconds) == {"vmap", "map", "loop"}
    assert evaluate.form == min(evaluate.seconds, key=evaluate.seconds.__getitem__)
    assert "a candidate takes" in str(evaluate)
    alone = search.population(lambda slope, x: (slope * x).sum(), np.arange(1.0), X)
    assert (alone.seconds, alone.size) == ({}, 1)  # nothing to choose


@pytest.mark.parametrize("form", ["vmap", "map", "loop"])
def test_nan_stays_where_it_is(form):
    scales = np.array([1.0, np.nan, np.inf, 2.0], np.float32)
    found = search.population(lambda s, x: jnp.linalg.norm(x * s), scales, X, form=form)(scales, X)
    np.testing.assert_allclose(found[[0, 3]], np.linalg.norm(X) * np.array([1, 2]), rtol=1e-6)
    assert np.isnan(found[1])
    assert not np.isfinite(found[2])


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(("form", "chunk"), [("vmap", None), ("map", 2)])
def test_candidates_are_spread_over_a_mesh(kind, form, chunk):
    mesh = jax.make_mesh((4, 2), ("many", "other"), axis_types=(kind, kind))
    evaluate = search.population(score, first(5), X, form=form, chunk=chunk, mesh=mesh, axis="many")
    assert evaluate.devices == 4
    assert evaluate.size == 8  # 5, up to a multiple
    for count in (5, 1, 8):
        check(evaluate(first(count), X), count)
    # Arrays that already lie on the mesh, otherwise than they are wanted.
    other = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("other"))
    check(evaluate(jax.device_put(ALL, other), jax.device_put(X, other)), 8)


def test_the_mesh_is_really_used():
    mesh = jax.make_mesh((8,), ("d",))
    evaluate = search.population(lambda s: s * 2, np.arange(8.0), form="vmap", mesh=mesh)
    placed = evaluate.program(np.arange(8, dtype=np.float32))
    assert len(placed.sharding.device_set) == 8
    assert placed.addressable_shards[0].data.shape == (1,)
    timed = search.population(lambda s: s * 2, np.arange(9.0), mesh=mesh)
    assert set(timed.seconds) == {"vmap", "map"}


def test_chunks_are_what_memory_holds():
    work = lambda s, x: jnp.tanh(jnp.tile(x, (100, 1)) * s).T @ jnp.tile(x, (100, 1))
    slopes = np.arange(64, dtype=np.float32)
    free = search.population(work, slopes, X, form="vmap", max_bytes=1 << 40)
    tight = search.population(work, slopes, X, form="vmap", max_bytes=60_000)
    assert free.chunk == 64
    assert 1 <= tight.chunk < 64
    assert tight.program.bytes_at(tight.chunk, slopes, (X,)) <= 60_000
    np.testing.assert_allclose(tight(slopes, X), free(slopes, X), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="one candidate takes"):
        search.population(work, slopes, X, form="vmap", max_bytes=100)


def test_fitting_keeps_to_the_limit_whatever_the_curve():
    for bytes_at in (lambda n: 10 * n, lambda n: 5 + n * n, lambda n: 100, lambda n: 10 * n + 90):
        for limit in (100, 250, 1000):
            found = fitting(bytes_at, 1000, limit)
            assert bytes_at(found) <= limit
    assert fitting(lambda n: 10 * n, 1000, 105) == 10
    assert fitting(lambda n: None, 7, 1) == 7
    assert fitting(lambda n: 10 * n, 7, None) == 7
    assert default_bytes(jax.devices()) is None or default_bytes(jax.devices()) > 0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: search.population(score, ALL, X, form="pmap"), ValueError, "form is 'pmap'"),
        (lambda: search.population(score, ALL, X, chunk=0), ValueError, "chunk is 0"),
        (lambda: search.population(score, first(0), X), ValueError, "example is empty"),
        (lambda: search.population(score, {"a": "relu"}, X), TypeError, "a: 'relu' is no array"),
        (lambda: search.population(score, {"a": 1.0}, X), ValueError, "a: no first axis"),
        (lambda: search.population(None, ALL, X), TypeError, "function must be"),
        (lambda: search.population(score, ALL, X, axis="d"), ValueError, "pass mesh too"),
        (lambda: search.population(score, ALL, X, mesh=2), TypeError, "mesh must be"),
    ],
)
def test_errors_come_before_anything_is_computed(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_other_candidates_than_the_example_are_named():
    evaluate = search.population(lambda c: c["a"] * 2, {"a": np.zeros(2)}, form="map")
    with pytest.raises(ValueError, match=r"a: float32 \(3,\) for each candidate"):
        evaluate({"a": np.zeros((2, 3), np.float32)})
    with pytest.raises(ValueError, match="differ in b"):
        evaluate({"a": np.zeros(2), "b": np.zeros(2)})
    mesh = jax.make_mesh((4, 2), ("i", "j"))
    with pytest.raises(ValueError, match="name one with axis="):
        search.population(lambda c: c["a"], {"a": np.zeros(2)}, mesh=mesh)
    with pytest.raises(ValueError, match="runs on one device"):
        search.population(lambda c: c["a"], {"a": np.zeros(2)}, mesh=mesh, axis="i", form="loop")
