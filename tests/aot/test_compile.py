"""The hot paths compiled for a TPU v5e and an H100 on a machine that has neither."""

import textwrap

import pytest
from compilers import H100, TARGETS, compiled

PROGRAM = """
    import re, sys
    import jax, jax.numpy as jnp, numpy as np
    from jax.experimental import topologies
    from jaxcomp import model, quantize, share
    from jaxcomp.kernels.int8 import Int8Weight, int8_linear
    from jaxcomp.kernels.int8_conv import Window, int8_conv
    from jaxcomp.kernels.kmeans import fit_codebook, nearest
    from jaxcomp.kernels.threshold import magnitude_bits, smallest_masks
    from jaxcomp.quantize import Format

    if sys.argv[1] == "tpu":
        topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    else:
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name="1x1x1", topology="1x1x1", target_config=sys.argv[2]
        )
    chip = jax.sharding.SingleDeviceSharding(topology.devices[0])
    spec = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=chip)
    weights, x = spec(1024, 2048), spec(256, 1024)

    def compile(function, *arguments):
        return jax.jit(function).lower(*arguments).compile()

    def masks(w):
        return smallest_masks([w], 1_000_000, key=magnitude_bits)[0]

    def train(w, x):
        return jnp.sum((x @ quantize.fake_quant(w, Format(4))) ** 2)

    programs = {
        "masks": compile(masks, weights),
        "kmeans": compile(lambda w: fit_codebook(w, 16), weights),
        "nearest": compile(nearest, weights, spec(16)),
        "fake_quant": compile(jax.grad(train), weights, x),
    }
    packed = jax.eval_shape(lambda w: quantize.encode(w, Format(4)), spec(1024, 2048))
    packed = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=chip), packed)
    programs["decode"] = compile(lambda w, x: x @ w.decode(), packed, x)

    def network(p, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        h = jax.lax.conv_general_dilated(x, p["k"], (1, 1), "SAME", dimension_numbers=numbers)
        return jax.nn.relu(h).mean((1, 2)) @ p["w"]

    stay = np.arange(0, 128, 2)
    full = {"k": spec(3, 3, 64, 128), "w": spec(128, 10)}
    smaller = model.rewrite(network, full, {"k": (None, None, None, stay), "w": (stay, None)})
    small = {"k": spec(3, 3, 64, 64), "w": spec(64, 10)}
    loss = lambda p, x: (smaller(p, x) ** 2).sum()
    programs["smaller"] = compile(jax.grad(loss), small, spec(8, 32, 32, 64))
    def integers(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.int8, sharding=chip)

    def weight(codes):
        sums = jax.ShapeDtypeStruct(codes.shape[:1], jnp.int32, sharding=chip)
        return Int8Weight(codes, spec(codes.shape[0]), None, sums)

    window = Window((1, 1), ((1, 1), (1, 1)), (1, 1), (1, 1))
    conv = lambda x, scale, kernel: int8_conv(x, scale, kernel, window)
    matrix, kernel = weight(integers(2048, 1024)), weight(integers(128, 3, 3, 64))
    programs["int8_row"] = compile(int8_linear, integers(1, 1024), spec(), matrix)
    programs["int8_dot"] = compile(int8_linear, integers(512, 1024), spec(), matrix)
    programs["int8_conv"] = compile(conv, integers(8, 32, 32, 64), spec(), kernel)
    for name in ("int8_dot", "int8_conv"):
        text = programs[name].as_text()
        sums = set(re.findall(r"= (.32)[^=]* (?:convolution|dot)[(]", text))
        codes = set(re.findall(r"([a-z]+[0-9]+).(?:2048,1024|128,576|128,3,3,64).", text))
        print("types_of_" + name, *sums, *codes)
    for name, compiled in programs.items():
        memory = compiled.memory_analysis()
        print(name, -1 if memory is None else memory.temp_size_in_bytes, len(compiled.as_text()))
"""


@pytest.mark.parametrize("target", TARGETS)
def test_hot_paths_compile(target):
    text = compiled(target, ["-c", textwrap.dedent(PROGRAM), target, H100])
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line}
    assert set(rows) >= {"masks", "kmeans", "nearest", "fake_quant", "decode", "smaller"}
    # The products stay products of 8-bit integers with 32-bit sums: no operand is made wider.
    for name in ("types_of_int8_dot", "types_of_int8_conv"):
        assert set(rows.pop(name)) == {"s32", "s8"}
    assert "int8_row" in rows
    assert all(int(length) > 0 for _, length in rows.values())
    # The threshold search keeps no copy of the weights (8 MiB) beside them.
    assert int(rows["masks"][0]) < 1024 * 2048 * 4
