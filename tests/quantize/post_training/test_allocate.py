"""Bits under a budget: what is measured, what is chosen, and what the result says of itself."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxcomp import arrays, partition, tree
from jaxcomp.checkpoint import CheckpointError
from jaxcomp.quantize.affine import encode
from jaxcomp.quantize.formats import Format, PerChannel, PerGroup
from jaxcomp.quantize.post_training.allocation.allocate import Budget, allocate
from jaxcomp.quantize.post_training.allocation.damage import increase, kl_divergence, mean_square
from jaxcomp.quantize.post_training.round_to_nearest import round_to_nearest
from jaxcomp.quantize.training.straight_through import train

WIDTHS = (6, 8, 8, 5)
BITS = (2, 4, 8)


def model(params, x):
    for i in range(3):
        layer = params[f"layer{i}"]
        x = x @ layer["kernel"] + layer["bias"]
        x = jnp.tanh(x) if i < 2 else x
    return x


def network():
    rng = np.random.default_rng(0)
    params = {}
    for i, (inputs, outputs) in enumerate(itertools.pairwise(WIDTHS)):
        kernel = rng.normal(0, (0.3, 1.0, 3.0)[i] / inputs**0.5, (inputs, outputs))
        bias = jnp.asarray(rng.normal(0, 0.1, outputs), jnp.float32)
        params[f"layer{i}"] = {"kernel": jnp.asarray(kernel, jnp.float32), "bias": bias}
    return params


def batches():
    rng = np.random.default_rng(1)
    return [jnp.asarray(rng.normal(0, 1, (7, WIDTHS[0])), jnp.float32) for _ in range(3)]


PATHS = [f"layer{i}/kernel" for i in range(3)]


@pytest.fixture(scope="module")
def found():
    return allocate(model, network(), batches(), Budget(bits=9.0), bits=BITS)


def kl_in_float64(dense, quantized):
    p, q = (scipy.special.softmax(np.asarray(x, np.float64), -1) for x in (dense, quantized))
    return float(scipy.special.rel_entr(p, q).sum(-1).mean())


# What damage is.

LOGITS = hnp.arrays(np.float32, (3, 4), elements=st.floats(-30, 30, width=32))


@settings(max_examples=200, deadline=None)
@given(LOGITS, LOGITS, st.sampled_from([1.0, 1e-2, 1e-4]))
def test_kl_divergence_is_that_of_float64_however_small(dense, change, size):
    quantized = (dense + np.float32(size) * change).astype(np.float32)
    value = float(kl_divergence(jnp.asarray(dense), jnp.asarray(quantized)))
    p, q = (x.astype(np.float64) for x in (dense, quantized))
    log_p, log_q = p - scipy.special.logsumexp(p, -1, keepdims=True), q
    log_q = q - scipy.special.logsumexp(q, -1, keepdims=True)
    # Every term p (q / p - 1 - log(q / p)) is at least 0; by expm1 it is right when it is small.
    ratio = log_q - log_p
    expected = (np.exp(log_p) * (np.expm1(ratio) - ratio)).sum(-1).mean()
    assert value >= 0
    # Logits of 30 are known to 1e-6, whose square is what a divergence can be wrong by.
    assert value == pytest.approx(expected, rel=2e-3, abs=1e-10)


def test_kl_divergence_of_classes_that_are_ruled_out():
    dense = jnp.array([[0.0, 1.0, -jnp.inf]])
    same = jnp.array([[0.5, 1.5, -jnp.inf]])
    spread = jnp.array([[0.0, 1.0, 0.0]])
    assert float(kl_divergence(dense, same)) == pytest.approx(0, abs=1e-12)
    assert float(kl_divergence(dense, spread)) == pytest.approx(kl_in_float64(dense, spread), 1e-5)
    assert float(kl_divergence(spread, dense)) == math.inf
    far = jnp.array([[0.0, 200.0]]), jnp.array([[200.0, 0.0]])
    assert float(kl_divergence(*far)) == pytest.approx(200.0)
    assert np.isnan(float(kl_divergence(dense, jnp.full((1, 3), jnp.nan))))


def test_mean_square_of_unit_vectors_is_twice_what_the_cosine_lacks():
    rng = np.random.default_rng(2)
    one, other = (rng.normal(size=(9, 4)).astype(np.float32) for _ in range(2))
    one, other = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (one, other))
    cosine = np.mean(np.sum(one * other, -1))
    assert float(mean_square(jnp.asarray(one), jnp.asarray(other))) == pytest.approx(2 - 2 * cosine)
    tree = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    assert float(mean_square(tree, {"a": jnp.array([3.0]), "b": jnp.array([9.0])})) == 1.0


# What is measured.


def test_each_leaf_is_measured_alone_over_all_batches(found):
    params = network()
    leaves = tree.flatten(params)
    assert [leaf.path for leaf in found.sensitivity] == PATHS
    for leaf in found.sensitivity:
        assert [f and f.bits for f in leaf.formats] == [*BITS, None]
        assert leaf.damages[-1] == 0
        for bits, damage in zip(BITS, leaf.damages, strict=False):
            rounded = encode(leaves[leaf.path], Format(bits)).decode()
            changed = tree.replace(params, {leaf.path: rounded})
            expected = [kl_in_float64(model(params, x), model(changed, x)) for x in batches()]
            assert damage == pytest.approx(np.mean(expected), rel=1e-3, abs=1e-9)


def test_the_whole_is_measured_with_all_leaves_rounded(found):
    params = network()
    rounded = round_to_nearest(model, params, None, found.rules).params
    together = arrays.decode(rounded)
    expected = [kl_in_float64(model(params, x), model(together, x)) for x in batches()]
    assert found.measured == pytest.approx(np.mean(expected), rel=1e-3)
    assert found.predicted == pytest.approx(sum(leaf.damage for leaf in found.leaves))


def test_the_model_is_traced_as_often_for_many_formats_as_for_one():
    def traces(bits):
        count = 0

        def counted(params, x):
            nonlocal count
            count += 1
            return model(params, x)

        allocate(counted, network(), batches(), Budget(bits=40), bits=bits)
        return count

    few, many = traces((8,)), traces((4, 6, 8))
    # Reading the program for each width is a trace; running it is not.
    assert many - few <= 2


def test_a_loss_can_be_what_is_measured():
    labels = jnp.arange(7) % 5

    def loss(params, x):
        picked = jnp.take_along_axis(jax.nn.log_softmax(model(params, x)), labels[:, None], 1)
        return -jnp.mean(picked)

    params = network()
    found = allocate(loss, params, batches(), Budget(bits=9), bits=BITS, compare=increase)
    leaf = found.sensitivity[1]
    rounded = encode(params["layer1"]["kernel"], Format(2)).decode()
    changed = tree.replace(params, {"layer1/kernel": rounded})
    expected = np.mean([loss(changed, x) - loss(params, x) for x in batches()])
    assert leaf.damages[0] == pytest.approx(expected, abs=1e-6)
    assert any(damage < 0 for leaf in found.sensitivity for damage in leaf.damages)


def test_what_a_comparison_says_of_the_dense_model_is_no_damage():
    off = lambda dense, quantized: 5.0 + mean_square(dense, quantized)
    budget = Budget(bits=9)
    one = allocate(model, network(), batches(), budget, bits=(2, 8), compare=mean_square)
    other = allocate(model, network(), batches(), budget, bits=(2, 8), compare=off)
    for leaf, shifted in zip(one.sensitivity, other.sensitivity, strict=True):
        np.testing.assert_allclose(shifted.damages, leaf.damages, atol=2e-6)


# What is chosen.


@pytest.mark.parametrize("bits", [7.2, 9.0, 12.0, 14.5, 20.0, 32.0])
def test_no_other_choice_within_the_bits_has_a_smaller_sum(found, bits):
    chosen = found.at(Budget(bits=bits))
    size = sum(leaf.size for leaf in found.sensitivity)
    each = [list(zip(leaf.nbytes, leaf.damages, strict=True)) for leaf in found.sensitivity]
    least = min(
        sum(damage for _, damage in choice)
        for choice in itertools.product(*each)
        if 8 * sum(cost for cost, _ in choice) <= bits * size
    )
    assert chosen.predicted == pytest.approx(least)
    assert chosen.bound == chosen.predicted
    assert chosen.bits <= bits
    assert math.isnan(chosen.measured)


@pytest.mark.parametrize(
    "rules",
    [
        {"layer[01]/*": Format(symmetric=False), "*": None},
        {"*": [Format(3), Format(5, granularity=PerGroup(2)), None]},
        {"layer2/*": [Format(8)], "*": Format(granularity=PerChannel(-1))},
    ],
)
def test_bytes_are_those_of_the_tree_that_is_made(rules):
    params = network()
    found = allocate(model, params, batches()[:1], Budget(bytes=560), rules, bits=(3, 8))
    made = round_to_nearest(model, params, None, found.rules).params
    assert found.nbytes == arrays.nbytes(made) <= 560
    for leaf in found.leaves:
        assert leaf.nbytes == arrays.nbytes(tree.flatten(made)[leaf.path])
    assert found.nbytes in dict(found.front)
    assert found.front_is_whole


def test_the_front_goes_from_the_smallest_to_the_dense(found):
    costs, damages = zip(*found.front, strict=True)
    assert list(costs) == sorted(set(costs))
    assert list(damages) == sorted(set(damages), reverse=True)
    assert (costs[-1], damages[-1]) == (arrays.nbytes(network()), 0.0)
    assert costs[0] == arrays.nbytes(round_to_nearest(model, network(), None, Format(2)).params)
    for cost, damage in found.front:
        assert found.at(Budget(bytes=cost)).predicted == pytest.approx(damage)


def test_rules_go_to_methods_in_training_too(found):
    params = network()
    methods = {path: format and train(format) for path, format in found.rules.items()}
    method = partition(methods)
    packed = method.pack(params, method.init(params))
    plain = round_to_nearest(model, params, None, found.rules).params
    jax.tree.map(np.testing.assert_array_equal, arrays.decode(packed), arrays.decode(plain))


def test_a_path_that_looks_like_a_pattern_names_itself():
    params = {"w[0]": jnp.eye(4), "w0": 2.0 * jnp.eye(4)}
    apply_fn = lambda p, x: x @ p["w[0]"] @ p["w0"]
    found = allocate(apply_fn, params, [jnp.ones((1, 4))], Budget(bits=30), bits=(2,))
    made = round_to_nearest(apply_fn, params, None, found.rules)
    assert {leaf.path for leaf in found.leaves if leaf.format} == {new.path for new in made.leaves}


def test_a_format_that_breaks_the_model_is_never_chosen():
    """The square root of what rounding makes negative, or zero divided by zero, is NaN."""
    params = network()
    exact = params["layer1"]["kernel"]

    def fragile(params, x):
        apart = jnp.max(jnp.abs(params["layer1"]["kernel"] - exact))
        return model(params, x) / jnp.where(apart < 0.05, 1.0, jnp.nan)

    found = allocate(fragile, params, batches(), Budget(bits=9), bits=BITS)
    assert np.isnan(found.sensitivity[1].damages[0])
    assert found.leaves[1].format.bits > 2
    with pytest.raises(ValueError, match=r"layer1/kernel: the outputs are not finite in any"):
        allocate(fragile, params, batches(), Budget(bits=9), [Format(2)])


def test_a_printed_allocation_says_all_of_it(found):
    text = str(found)
    for leaf in found.leaves:
        assert f"{leaf.path}  " in text
    assert f"sum {found.predicted:.4g} (the least there is)" in text
    assert f"measured together {found.measured:.4g}" in text
    assert f"{found.bits:.3f} bits a weight, {found.nbytes:,} bytes" in text
    assert "not measured" in str(found.at(Budget(bits=9)))
    lines = text.splitlines()
    alike = lines[next(i for i, line in enumerate(lines) if line.startswith("all leaves")) + 1 :]
    for bits, line in zip(BITS, alike, strict=True):
        at = BITS.index(bits)
        cost = found.other_nbytes + sum(leaf.nbytes[at] for leaf in found.sensitivity)
        damage = sum(leaf.damages[at] for leaf in found.sensitivity)
        best = found.at(Budget(bytes=cost)).predicted
        assert line.split() == [str(bits), "bits", f"{cost:,}", f"{damage:.3g}", f"{best:.3g}"]


# Where leaves lie, and what the tree is made of.


def test_leaves_on_a_mesh_are_given_the_same_bits(found):
    mesh = Mesh(np.array(jax.devices()[:4]), ("model",))
    split = NamedSharding(mesh, PartitionSpec(None, "model"))
    whole = NamedSharding(mesh, PartitionSpec())
    params = jax.tree.map(
        lambda x: jax.device_put(x, split if x.ndim == 2 and x.shape[1] % 4 == 0 else whole),
        network(),
    )
    given = [jax.device_put(x, whole) for x in batches()]
    sharded = allocate(model, params, given, Budget(bits=9.0), bits=BITS)
    assert sharded.rules == found.rules
    assert sharded.nbytes == found.nbytes
    assert sharded.measured == pytest.approx(found.measured, rel=1e-3)


# Interrupted, and gone on with.


def test_the_same_call_goes_on_where_it_was_broken_off(found, tmp_path):
    reads = 0

    def source(most):
        def read():
            nonlocal reads
            reads += 1
            if reads > most:
                raise KeyboardInterrupt
            return batches()

        return read

    def run(most):
        return allocate(
            model, network(), source(most), Budget(bits=9.0), bits=BITS, directory=tmp_path
        )

    # One look at the first batch, another for the file, and then one pass a leaf.
    with pytest.raises(KeyboardInterrupt):
        run(4)
    reads = 0
    again = run(100)
    assert reads == 2 + 1 + 1
    assert again == found
    reads = 0
    fewer = allocate(
        model, network(), source(100), Budget(bytes=400), bits=(2, 8), directory=tmp_path
    )
    assert reads == 2 + 1
    assert fewer.sensitivity[0].damages[0] == found.sensitivity[0].damages[0]


def test_a_file_of_another_call_or_a_damaged_one_is_refused(tmp_path):
    budget = Budget(bits=13)

    def run(given, **options):
        return allocate(model, network(), given, budget, bits=(8,), directory=tmp_path, **options)

    run(batches())
    with pytest.raises(ValueError, match="another first batch"):
        run(batches()[::-1])
    with pytest.raises(ValueError, match="another compare: kl_divergence, now mean_square"):
        run(batches(), compare=mean_square)
    (tmp_path / "bits.jxc").write_bytes(b"nothing")
    with pytest.raises(CheckpointError):
        run(batches())


# What is refused.


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"budget": 4.0}, TypeError, "budget must be a quantize.Budget"),
        ({"budget": Budget(bits=2)}, ValueError, "nothing fits 2 bits a weight.*take 6"),
        ({"budget": Budget(bytes=99)}, ValueError, "nothing fits 99 bytes.*quantized 84"),
        ({"batches": []}, ValueError, "batches is empty"),
        ({"batches": iter([])}, TypeError, "can be read only once"),
        ({"compare": lambda a, b: a}, TypeError, "compare must return one floating number"),
        ({"compare": None}, TypeError, "compare must be a function"),
        ({"rules": "int4"}, TypeError, "must be a format, formats to choose from, or None"),
        ({"rules": [None]}, ValueError, "has no format to choose"),
        ({"rules": {"*": None}}, ValueError, "every rule is None"),
        ({"rules": {}}, ValueError, "rules is empty"),
        ({"bits": 4}, TypeError, "bits must be widths to choose from"),
        ({"bits": ()}, ValueError, "bits is empty"),
        ({"rules": {"head/*": Format()}}, ValueError, "matches no leaf"),
        ({"rules": Format(granularity=PerGroup(5))}, ValueError, "layer0/kernel: groups of 5"),
        ({"apply_fn": lambda p, x: {"a": model(p, x)}}, TypeError, "one array of logits"),
        ({"apply_fn": lambda p, x: model(p, x) * jnp.nan}, ValueError, "in batch 0"),
    ],
)
def test_what_cannot_be_done_is_said(change, error, message):
    call = {"apply_fn": model, "params": network(), "batches": batches(), "budget": Budget(bits=9)}
    with pytest.raises(error, match=message):
        allocate(**{**call, "bits": BITS, **change})


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({}, TypeError),
        ({"bytes": 1, "bits": 1.0}, TypeError),
        ({"bytes": 1.5}, TypeError),
        ({"bytes": 0}, ValueError),
        ({"bits": "4"}, TypeError),
        ({"bits": math.nan}, ValueError),
        ({"bits": -1.0}, ValueError),
    ],
)
def test_budgets_that_are_none(given, error):
    with pytest.raises(error):
        Budget(**given)
