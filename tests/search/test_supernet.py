"""A sub-network masked, extracted and costed is one and the same."""

import itertools
from types import SimpleNamespace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcomp
from jaxcomp import tree as tree_lib
from jaxcomp.model import trace
from jaxcomp.search.spaces import Choice, decode, mutate, sample
from jaxcomp.search.stacking import stack
from jaxcomp.search.supernets import supernet
from jaxcomp.search.supernets.masks import by_kind
from tests.model.cutting import difference
from tests.model.zoo import ZOO

ALL = {"*": (0.3, 0.6, 1.0)}
RESIDUAL = {"depth": {"blocks": ["params/a2_bn/*", "params/b2_bn/*"]}}
CASES = {
    "mlp": {"width": ALL},
    "glu": {"width": ALL},
    "vgg": {"width": ALL, "kernel": {"params/conv*/kernel": (1, 3)}},
    "resnet": {
        "width": ALL,
        "kernel": {"params/[ab]*/kernel": (1, 3)},
        "connections": {"shortcut": ["params/shortcut_bn/scale", "params/shortcut_bn/bias"]},
        **RESIDUAL,
    },
    "mobilenet v2": {
        "width": ALL,
        "kernel": {"params/stem/kernel": (1, 3), "params/[ab]2/kernel": (1, 3)},
        "connections": {"a": "params/a3_bn/*"},
    },
    "densenet": {"width": ALL, "connections": {"b": "params/b/*"}},
    "vit": {
        "width": ALL,
        "depth": {"layers": ["params/attention/out/*", ["params/up/*", "params/down/*"]]},
    },
    "scanned remat": {"width": ALL},
    "nnx cnn": {"width": ALL, "kernel": {"conv/kernel": (1, 3)}},
}


def net_of(name, **kwargs):
    case = ZOO[name]()
    kwargs = {**CASES[name], **kwargs}
    return case, supernet(case.apply_fn, case.params, *case.inputs, **kwargs)


def less(net):
    """A candidate with less of everything than the largest."""
    options = [part.options[i % (len(part.options) - 1)] for i, part in enumerate(net.parts)]
    return by_kind(net.parts, dict(zip(net.parts, options, strict=True)))


@pytest.mark.parametrize("name", CASES)
def test_masked_and_extracted_give_the_same_outputs(name):
    case, net = net_of(name)
    candidate = less(net) | ({"depth": dict.fromkeys(net.space["depth"], 1)} if "depth" in net.space
                             else {})  # fmt: skip
    run = jax.jit(lambda p, c, *x: case.apply_fn(net.masked(p, c), *x))
    small = net.extract(case.params, candidate)
    found = jax.jit(small.apply)(small.params, *case.inputs)
    assert difference(run(case.params, candidate, *case.inputs), found) < 2 * case.tolerance
    assert difference(run(case.params, net.largest, *case.inputs), found) > 1e-3
    leaves = tree_lib.flatten(small.params).values()
    assert small.after.parameters == sum(np.size(leaf) for leaf in leaves)
    assert small.after == net.cost(candidate)
    for path, leaf in tree_lib.flatten(small.params).items():
        before, after = small.shapes.get(path, (np.shape(leaf), np.shape(leaf)))
        assert after == np.shape(leaf)
        assert before == np.shape(tree_lib.flatten(case.params)[path])


def test_costs_are_those_of_the_extracted_programs_and_their_mean():
    case, net = net_of("resnet", width={"params/a1/kernel": (2, 5), "params/b2*": (5, 12)},
                       kernel={"params/a1/kernel": (1, 3)})  # fmt: skip
    grid = [dict(zip(("a", "b", "k", "d", "s"), each, strict=True)) for each in
            itertools.product((2, 5), (5, 12), (1, 3), (0, 1, 2), (False, True))]  # fmt: skip
    wide = {name for name in net.space["width"] if not name.startswith("params/a1")}

    def candidate(v):
        widths = {name: v["b"] if name in wide else v["a"] for name in net.space["width"]}
        return {
            "width": widths,
            "kernel": {"params/a1/kernel": v["k"]},
            "depth": {"blocks": v["d"]},
            "connections": {"shortcut": v["s"]},
        }

    costs = {tuple(v.values()): net.cost(candidate(v)) for v in grid}
    for v in (grid[0], grid[9], grid[22], grid[-1]):
        small = net.extract(case.params, candidate(v))
        read = trace(small.apply, small.params, *case.inputs)
        # A constant of zeros is spread where nothing is left of a stage; it costs nothing here.
        assert (read.total.flops, read.total.macs) == costs[tuple(v.values())][1::-1]
        assert read.parameters == costs[tuple(v.values())].parameters
        assert read.parameter_bytes == costs[tuple(v.values())].bytes
    assert costs[tuple(grid[-1].values())] == net.extract(case.params, net.largest).before
    odds = {
        "a": (0.2, 0.8),
        "b": (0.7, 0.3),
        "k": (0.4, 0.6),
        "d": (0.5, 0.2, 0.3),
        "s": (0.1, 0.9),
    }
    options = {"a": (2, 5), "b": (5, 12), "k": (1, 3), "d": (0, 1, 2), "s": (False, True)}
    share = lambda v: np.prod([odds[n][options[n].index(v[n])] for n in odds])
    mean = np.sum([share(v) * np.array(costs[tuple(v.values())]) for v in grid], 0)
    rows = {name: np.array(row, np.float32) for name, row in odds.items()}
    assert len(net.space["width"]) == 2
    weights = candidate(rows)
    np.testing.assert_allclose(np.array(net.expected_cost(weights)), mean, rtol=1e-5)


def plain_convolutions(p, x):
    conv = jax.lax.conv_general_dilated
    numbers = ("NHWC", "HWIO", "NHWC")
    # Even sizes, strides, dilation, no padding, a flipped and a transposed kernel, a line.
    return (
        conv(x, p["strided"], (2, 2), "SAME", dimension_numbers=numbers),
        conv(x, p["valid"], (1, 2), "VALID", dimension_numbers=numbers),
        conv(x, p["dilated"], (1, 1), ((4, 3), (2, 4)), None, (2, 1), dimension_numbers=numbers),
        conv(x, p["even"], (2, 1), "SAME", dimension_numbers=numbers),
        conv(x, jnp.flip(0.5 * p["line"], 1), (1, 1), "SAME", dimension_numbers=numbers),
        conv(x, p["turned"].transpose(2, 3, 1, 0), (1, 1), "SAME", dimension_numbers=numbers),
        jax.lax.conv_transpose(x, p["up"], (2, 2), "SAME", transpose_kernel=True),
    )


def test_kernels_lose_their_borders_under_any_stride_dilation_and_padding():
    rng = np.random.default_rng(0)
    shapes = {"strided": (5, 5, 2, 3), "valid": (5, 3, 2, 3), "dilated": (3, 5, 2, 3),
              "even": (4, 4, 2, 3), "line": (1, 7, 2, 3), "turned": (3, 2, 5, 5),
              "up": (3, 3, 3, 2)}  # fmt: skip
    params = {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
    x = rng.normal(size=(2, 9, 8, 2)).astype(np.float32)
    sizes = {name: (1, 3) for name in params} | {"even": (2, 4), "line": (1, 3, 5)}
    net = supernet(plain_convolutions, params, x, kernel=sizes)
    candidate = {"kernel": {name: each[-2] for name, each in sizes.items()}}
    small = net.extract(params, candidate)
    assert {k: leaf.shape for k, leaf in small.params.items()} == {
        "strided": (1, 1, 2, 3), "valid": (1, 1, 2, 3), "dilated": (1, 1, 2, 3),
        "even": (2, 2, 2, 3), "line": (1, 3, 2, 3), "turned": (3, 2, 1, 1), "up": (1, 1, 3, 2),
    }  # fmt: skip
    masked = jax.jit(lambda p, c: plain_convolutions(net.masked(p, c), x))(params, candidate)
    assert difference(masked, jax.jit(small.apply)(small.params, x)) < 1e-5
    # The reader counts what its convolutions do, with their padding.
    assert trace(small.apply, small.params, x).total.macs == small.after.macs
    assert small.after.macs < 0.5 * small.before.macs


def test_one_program_serves_all_candidates_one_by_one_mapped_and_scanned():
    case, net = net_of("mlp")
    traced = []

    @jax.jit
    def run(params, candidate):
        traced.append(1)
        return case.apply_fn(net.masked(params, candidate), *case.inputs)

    point = sample(net.space, jax.random.key(0))
    candidates = [decode(net.space, mutate(net.space, point, jax.random.key(i))) for i in range(4)]
    each = np.stack([run(case.params, candidate) for candidate in candidates])
    assert len(traced) == 1
    together = stack(candidates)
    mapped = jax.jit(jax.vmap(run, (None, 0)))(case.params, together)
    np.testing.assert_allclose(mapped, each, rtol=1e-5, atol=1e-6)
    scanned = jax.lax.scan(lambda c, each: (c, run(case.params, each)), 0, together)[1]
    np.testing.assert_allclose(scanned, each, rtol=1e-5, atol=1e-6)


def test_gradients_flow_to_what_is_there_alone():
    case, net = net_of("resnet")
    candidate = net.smallest | {"depth": {"blocks": 1}, "connections": {"shortcut": True}}
    loss = lambda p, c: jnp.sum(case.apply_fn(net.masked(p, c), *case.inputs) ** 2)
    grads = tree_lib.flatten(jax.jit(jax.grad(loss))(case.params, candidate))
    ones = jax.tree.map(jnp.ones_like, case.params)
    there = tree_lib.flatten(jax.jit(net.masked)(ones, candidate))
    small = net.extract(case.params, candidate)
    for path, grad in grads.items():
        assert np.isfinite(grad).all()
        assert not np.asarray(grad)[np.asarray(there[path]) == 0].any()
        live = path.endswith("kernel") and path not in small.removal.gone
        assert (np.count_nonzero(grad) > 0) == live or not path.endswith("kernel")


def test_random_candidates_are_of_the_space_and_even():
    _, net = net_of("mlp")
    many = jax.jit(jax.vmap(net.random))(jax.random.split(jax.random.key(0), 600))
    for part in net.parts:
        values, counts = np.unique(np.asarray(part.of(many)), return_counts=True)
        assert tuple(values) == part.options
        assert (abs(counts / 600 - 1 / len(part.options)) < 0.08).all()
    one = net.random(jax.random.key(1))
    assert net.cost(one) == net.cost(net.extract(ZOO["mlp"]().params, one).candidate)


def test_units_go_in_by_size():
    rng = np.random.default_rng(0)
    params = {"up": rng.normal(size=(3, 6)).astype(np.float32),
              "bias": 100 * np.arange(6, dtype=np.float32),
              "down": rng.normal(size=(6, 2)).astype(np.float32)}  # fmt: skip
    mlp = lambda p, x: jax.nn.relu(x @ p["up"] + p["bias"]) @ p["down"]
    net = supernet(mlp, params, np.ones((1, 3), np.float32), width={"up": (2, 6)}, order="l1")
    small = net.extract(params, net.smallest)
    norms = abs(params["up"]).sum(0) + abs(params["down"]).sum(1)
    best = np.sort(np.argsort(-norms)[:2])
    np.testing.assert_array_equal(small.params["up"], params["up"][:, best])
    masked = net.masked(params, net.smallest)
    np.testing.assert_array_equal(np.flatnonzero(np.asarray(masked["bias"])), best[best > 0])


def test_extracted_networks_are_trees_like_others(tmp_path):
    case, net = net_of("resnet")
    small = net.extract(case.params, net.smallest | {"connections": {"shortcut": True}})
    assert small.params["params"]["a2"]["kernel"] is None
    assert "params/a2/kernel gone" in str(small)
    assert "FLOPs:" in str(small)
    jaxcomp.save(str(tmp_path / "small.jxc"), small.params)
    loaded = tree_lib.flatten(jaxcomp.load(str(tmp_path / "small.jxc")))
    assert {path: leaf.shape for path, leaf in loaded.items()} == {
        path: leaf.shape for path, leaf in tree_lib.flatten(small.params).items()
    }


def matrices(params):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


OPTIMIZERS = {
    "adamw": optax.adamw(1e-3),
    "masked and accumulated": optax.MultiSteps(optax.masked(optax.trace(0.9), matrices), 2),
}


@pytest.mark.parametrize("tx", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("pick", [lambda tree: tree, lambda tree: tree["params"]])
def test_the_state_of_an_optimizer_is_cut_as_the_parameters(tx, pick):
    case, net = net_of("resnet")
    small = net.extract(case.params, net.smallest | {"connections": {"shortcut": True}})
    rng = np.random.default_rng(0)
    slopes = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), case.params)
    # One step taken before the cut, and the same after it.
    after = lambda params, slopes: tx.update(slopes, tx.init(params), params)[1]
    state = jax.jit(after)(pick(case.params), pick(slopes))
    own = jax.jit(after)(pick(small.params), pick(small.shrink(slopes)))
    found = small.shrink(state)
    assert jax.tree.structure(found) == jax.tree.structure(own)
    jax.tree.map(np.testing.assert_array_equal, found, own)


def test_what_cannot_be_cut_as_the_parameters_is_refused_by_name():
    net = supernet(*CALL, width={"up": (2, 4)})
    small = net.extract(PARAMS, net.smallest)
    kept = {"count": np.int32(3), "key": jax.random.key(0), "old": np.zeros(2, np.uint32)}
    assert all(small.shrink(kept)[name] is leaf for name, leaf in kept.items())
    with pytest.raises(ValueError, match=r"table: shape \(7,\) mirrors no parameter: make a new"):
        small.shrink({"table": np.ones(7)})
    with pytest.raises(ValueError, match=r"v_row/up: shape \(3,\), but up is \(3, 4\) and is cut"):
        small.shrink({"v_row": {"up": np.ones(3)}})
    method = jaxcomp.quantize.train(jaxcomp.quantize.Format(8))
    wrapped = jaxcomp.wrap_optimizer(optax.sgd(0.1), method)
    with pytest.raises(ValueError, match="wrap_optimizer is learned by a method"):
        small.shrink(wrapped.init(PARAMS))
    # Layers alike, of which one alone is narrower: whose momenta?
    params = {"a": PARAMS, "b": PARAMS}
    both = lambda p, x: dense(p["a"], x) + dense(p["b"], x)
    net = supernet(both, params, CALL[2], width={"a/up": (2, 4)})
    small = net.extract(params, net.smallest)
    assert small.shrink({"mu": params})["mu"]["b"]["up"].shape == (3, 4)
    with pytest.raises(ValueError, match="mu/up: a/up and b/up fit alike and are cut differently"):
        small.shrink({"mu": {"up": PARAMS["up"]}})


def test_equinox_models_and_lists_of_arrays():
    mlp = eqx.nn.MLP(3, 2, 8, 2, key=jax.random.key(0))
    arrays, rest = eqx.partition(mlp, eqx.is_array)
    apply = lambda p, x: jax.vmap(eqx.combine(p, rest))(x)
    x = np.ones((2, 3), np.float32)
    net = supernet(apply, arrays, x, width={"*": (3, 8)})
    small = net.extract(arrays, net.smallest)
    masked = jax.jit(apply)(net.masked(arrays, net.smallest), x)
    assert difference(masked, jax.jit(small.apply)(small.params, x)) < 1e-5
    assert sorted(leaf.shape for leaf in jax.tree.leaves(small.params)) == [
        (2,), (2, 3), (3,), (3,), (3, 3), (3, 3),
    ]  # fmt: skip


def dense(p, x):
    return jax.nn.relu(x @ p["up"]) @ p["down"]


PARAMS = {"up": np.ones((3, 4), np.float32), "down": np.ones((4, 2), np.float32)}
CALL = (dense, PARAMS, np.ones((1, 3), np.float32))


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({}, ValueError, "nothing is elastic"),
        ({"width": {"sideways": (0.5, 1.0)}}, ValueError, r"names no group.*nearest: up\[1\]"),
        (
            {"width": {"down": (1, 2)}},
            ValueError,
            r"be cut: down\[1\] is an axis of .*: name some of up",
        ),
        ({"width": {"up": (0.0, 1.0)}}, ValueError, "0.0 is no fraction"),
        ({"width": {"up": (2, 5)}}, ValueError, r"up\[1\] has 4 units, not 5"),
        ({"width": {"up": ()}}, ValueError, "'up': there are no options"),
        ({"width": {"up": 0.5}}, TypeError, "'up': options must be a sequence"),
        ({"width": {"up": ("half",)}}, TypeError, "width: 'up'"),
        ({"width": [0.5]}, TypeError, "width must be a mapping"),
        ({"kernel": {"up": (1, 3)}}, ValueError, "up: its kernel cannot be cut to its centre: dot"),
        ({"kernel": {"conv": (1, 3)}}, ValueError, "kernel: pattern 'conv' matches no leaf"),
        ({"depth": {"stage": "up"}}, TypeError, "'stage' must be a list of its branches"),
        ({"depth": {"stage": ["sideways"]}}, ValueError, "depth: stage, branch 0: pattern"),
        ({"connections": {"all": "up"}}, ValueError, "with up zero, every output is"),
        ({"width": {"up": (1,)}, "order": "last"}, ValueError, "order must be 'first' or 'l1'"),
        ({"width": {"up": (1,)}, "also": [dense]}, TypeError, r"also must be \[\(function, "),
    ],
)
def test_what_cannot_be_elastic_is_refused_by_name(kwargs, error, words):
    with pytest.raises(error, match=words):
        supernet(*CALL, **kwargs)


def test_kernel_sizes_need_a_centre():
    conv = lambda p, x: jax.lax.conv(x, p["k"], (1, 1), "SAME")
    params, x = {"k": np.ones((2, 2, 5, 5), np.float32)}, np.ones((1, 2, 8, 8), np.float32)
    with pytest.raises(ValueError, match="k: 2 positions have no centre among 5: give odd sizes"):
        supernet(conv, params, x, kernel={"k": (2, 5)})
    with pytest.raises(ValueError, match="k has a kernel of size 5, not 7"):
        supernet(conv, params, x, kernel={"k": (7,)})
    standardized = lambda p, x: conv({"k": p["k"] - p["k"].mean((2, 3), keepdims=True)}, x)
    with pytest.raises(ValueError, match="k: its kernel cannot be cut to its centre: reduce_sum"):
        supernet(standardized, params, x, kernel={"k": (3, 5)})


def test_a_pattern_of_a_whole_layer_means_its_kernel():
    def conv(p, x):
        made = jax.lax.conv(x, p["layer/kernel"], (1, 1), "SAME")
        return made + p["layer/bias"].reshape(-1, 1, 1)

    params = {"layer/kernel": np.ones((2, 2, 5, 5), np.float32), "layer/bias": np.ones(2)}
    x = np.ones((1, 2, 8, 8), np.float32)
    net = supernet(conv, params, x, kernel={"*layer*": (3, 5)})
    assert net.space == {"kernel": {"layer/kernel": Choice((3, 5))}}
    with pytest.raises(ValueError, match="layer/bias: its kernel cannot be cut to its centre"):
        supernet(conv, params, x, kernel={"*bias": (3, 5)})


def test_candidates_that_do_not_fit_are_refused_by_name():
    net = supernet(*CALL, width={"up": (2, 4)})
    good = {"width": {"up[1]": 2}}
    with pytest.raises(ValueError, match=r"width/up\[1\]"):
        net.masked(PARAMS, {"width": {"up[1]": 3}})
    with pytest.raises(ValueError, match="width"):
        net.extract(PARAMS, {})
    with pytest.raises(ValueError, match=r"not of the supernet's space.*kernel/up"):
        net.masked(PARAMS, good | {"kernel": {"up": jnp.ones((), int)}})
    for wrong in (np.int64(3), jnp.int32(3), jnp.float32(2.7)):
        with pytest.raises(ValueError, match=r"width/up\[1\]: .* is none of the options 2, 4"):
            net.masked(PARAMS, {"width": {"up[1]": wrong}})
    small = net.extract(PARAMS, good)
    with pytest.raises(ValueError, match=r"down: shape \(2, 2\), but the largest model has"):
        net.extract(small.params, good)
    with pytest.raises(ValueError, match="not those of the largest model, which differs in down"):
        net.extract({"up": PARAMS["up"]}, good)
    with pytest.raises(ValueError, match=r"up: shape \(1, 4\), but the largest model has \(3, 4\)"):
        net.masked({**PARAMS, "up": PARAMS["up"][:1]}, good)
    for weights in (good, {}, {"width": {"up[1]": np.ones(3)}}):
        for take in (net.expected_cost, lambda w: net.mixed(PARAMS, w)):
            with pytest.raises(
                ValueError, match=r"width/up\[1\]: a weight is needed for each of 2"
            ):
                take(weights)
    with pytest.raises(ValueError, match=r"shape \(3,\): a candidate has one number"):
        net.masked(PARAMS, {"width": {"up[1]": np.ones(3, int)}})
    with pytest.raises(TypeError, match="traced number"):
        jax.eval_shape(lambda c: net.extract(PARAMS, c).params, good)
    with pytest.raises(ValueError, match="'down' is not in these parameters"):
        net.masked({"up": PARAMS["up"]}, good)
    shapes = jax.eval_shape(lambda: PARAMS)
    with pytest.raises(TypeError, match="down: order='l1' looks at its numbers: give arrays"):
        supernet(dense, shapes, CALL[2], width={"up": (2, 4)}, order="l1")
    nan = {**PARAMS, "up": np.nan * PARAMS["up"]}
    with pytest.raises(ValueError, match="up: is not finite: its units have no order"):
        supernet(dense, nan, CALL[2], width={"up": (2, 4)}, order="l1")
    packed = {**PARAMS, "up": SimpleNamespace()}
    with pytest.raises(TypeError, match="up"):
        supernet(dense, packed, CALL[2], width={"up": (2, 4)})
