"""Compile kernels for a chip that is not there; what became of each, as JSON on stdout.

Run as ``python kernel_programs.py tpu|cuda TARGET_CONFIG``, in a process of its own.
"""

import dataclasses
import json
import os
import pathlib
import re
import sys
import tempfile
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from jaxcomp.arrays import BlockSparseArray, CodebookArray
from jaxcomp.kernels import (
    Rounding,
    block_sparse_matmul,
    codebook_matmul,
    fake_quant_matmul,
    masked_matmul,
    pack_mask,
    quantized_matmul,
)
from jaxcomp.quantize import Format, PerChannel, PerGroup, encode, mxfp4, nvfp4


def shapes_on(chip: Any, tree: Any) -> Any:
    """The same shapes on a device that is described only."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=chip), tree
    )


def gradients(product: Any) -> Any:
    """The gradient of a loss of a product, for activations and weight."""
    loss = lambda x, w, *rest: (product(x, w, *rest).astype(jnp.float32) ** 2).sum()
    return jax.grad(loss, (0, 1))


class Case(NamedTuple):
    """A program: its function, the shapes of its arguments, and how many kernels it should hold."""

    function: Any
    arguments: tuple[Any, ...]
    kernels: int


FORMATS = {
    "int8": Format(8),
    "int4": Format(4),
    "int8-groups": Format(8, symmetric=False, granularity=PerGroup(128)),
    "int4-groups": Format(4, symmetric=False, granularity=PerGroup(32)),
    "mxfp4": mxfp4(),
    "nvfp4": nvfp4(),
}
ROUNDINGS = {"rounded": Rounding(8), "rounded-groups": Rounding(4, blocks=((32, -2),))}


def cases(platform: str) -> dict[str, Case]:
    """The programs by name; the matrix of each has 4096 inputs."""
    found: dict[str, Case] = {}
    for rows in (16, 2048):
        for outputs in (4096, 14336):
            x = jax.ShapeDtypeStruct((rows, 4096), jnp.bfloat16)
            w = jax.ShapeDtypeStruct((4096, outputs), jnp.bfloat16)
            mask = jax.eval_shape(pack_mask, jax.ShapeDtypeStruct(w.shape, bool))
            size = f"{rows}x{outputs}"
            found[f"masked {size}"] = Case(masked_matmul, (x, w, mask), 1)
            found[f"masked gradients {size}"] = Case(gradients(masked_matmul), (x, w, mask), 3)
            if (rows == 16) == (outputs == 4096):
                continue
            for name, rounding in ROUNDINGS.items():
                run = lambda x, w, rounding=rounding: fake_quant_matmul(x, w, rounding)
                found[f"{name} {size}"] = Case(run, (x, w), 1)
                found[f"{name} gradients {size}"] = Case(gradients(run), (x, w), 2)
            # As trained in mixed precision: rounded in float32, multiplied in bfloat16.
            wide = jax.ShapeDtypeStruct(w.shape, jnp.float32)
            mixed = lambda x, w: fake_quant_matmul(x, w, Rounding(4), dtype=jnp.bfloat16)
            found[f"mixed fake {size}"] = Case(mixed, (x, wide), 1)
            for name, format in FORMATS.items():
                leaf = jax.eval_shape(lambda w, format=format: encode(w, format), w)
                found[f"{name} {size}"] = Case(quantized_matmul, (x, leaf), 1)
            head = jax.eval_shape(lambda w: encode(w.T, Format(8, granularity=PerChannel(0))), w)
            found[f"head {size}"] = Case(partial(quantized_matmul, transposed=True), (x, head), 1)
            indices = jax.ShapeDtypeStruct((4096, outputs // 2), jnp.uint8)
            codebook = jax.ShapeDtypeStruct((16,), jnp.bfloat16)
            shared = CodebookArray(indices, codebook, outputs, jnp.bfloat16)
            found[f"shared {size}"] = Case(codebook_matmul, (x, shared), 1)
            blocks = (4096 // 128, outputs // 128)
            bits = jax.ShapeDtypeStruct((blocks[0], -(-blocks[1] // 8)), jnp.uint8)
            values = jax.ShapeDtypeStruct((blocks[0] * blocks[1] // 10, 128, 128), jnp.bfloat16)
            sparse = BlockSparseArray(bits, values, (128, 128), blocks[1])
            found[f"blocks {size}"] = Case(block_sparse_matmul, (x, sparse), 1)
            if platform == "cuda":
                hopper = partial(block_sparse_matmul, implementation="mosaic_gpu")
                found[f"blocks-hopper {size}"] = Case(hopper, (x, sparse), 1)
                trained = lambda x, values, bits, run=hopper, leaf=sparse: run(
                    x, dataclasses.replace(leaf, values=values, mask=bits)
                )
                arguments = (x, values, bits)
                found[f"blocks-hopper gradients {size}"] = Case(gradients(trained), arguments, 3)
    return found


# What makes nothing new; a TPU's compiler copies arguments into fast memory ahead of time.
_NOTHING = (
    "parameter",
    "get-tuple-element",
    "bitcast",
    "constant",
    "copy-start",
    "copy-done",
    "ConcatBitcast",
)


def facts(function: Any, arguments: Any, compiled: Any) -> dict[str, Any]:
    """What to know of a program: memory beside its arguments and results, and what it makes."""
    text = compiled.as_text()
    body = text[text.index("ENTRY") :].replace(
        'custom_call_target="ConcatBitcast"', "ConcatBitcast"
    )
    body = re.sub(r"custom-call\((.*?ConcatBitcast)", r"ConcatBitcast(\1", body)
    made = re.findall(r"= (\w+)\[([\d,]*)\][^=]*? ([\w-]+)\(", body)
    results = jax.tree.leaves(jax.eval_shape(function, *arguments))
    counted, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
    ours = r"tpu_custom_call|__gpu\$xla.gpu.triton|mosaic_gpu_v2"
    return {
        "flops": counted.get("flops"),
        "bytes": counted.get("bytes accessed"),
        "temporary": memory.temp_size_in_bytes,
        # What is read and written at least.
        "least": memory.argument_size_in_bytes + memory.output_size_in_bytes,
        "kernels": len(re.findall(f'custom_call_target="(?:{ours})"', text)),
        "results": [list(leaf.shape) for leaf in results],
        "made": [
            [dtype, [int(size) for size in shape.split(",") if size], operation]
            for dtype, shape, operation in made
            if operation not in _NOTHING
        ],
    }


def products_of_warps(folder: pathlib.Path) -> tuple[int, int]:
    """How many of the GPU's kernels multiply a warpgroup at a time, and how many a warp at a time.

    Hopper's tensor cores reach their rate only with the first.
    """
    texts = [path.read_text() for path in folder.glob("*.ptx")]
    for path in folder.iterdir():
        path.unlink()
    return sum("wgmma.mma_async" in text for text in texts), sum("mma.sync" in t for t in texts)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        if sys.argv[1] == "cuda":
            os.environ["XLA_FLAGS"] = f"--xla_dump_to={folder} --xla_dump_hlo_as_text=false"
        print(json.dumps(told(pathlib.Path(folder))))


def told(folder: pathlib.Path) -> dict[str, Any]:
    if sys.argv[1] == "tpu":
        topology = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[2])
    else:
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name="1x1x1", topology="1x1x1", target_config=sys.argv[2]
        )
    chip = jax.sharding.SingleDeviceSharding(topology.devices[0])
    found = {}
    for name, (function, arguments, kernels) in cases(sys.argv[1]).items():
        compiled = jax.jit(function).lower(*shapes_on(chip, arguments)).compile()
        found[name] = facts(function, arguments, compiled) | {"expected": kernels}
        found[name]["warpgroups"], found[name]["warps"] = products_of_warps(folder)
    return found


if __name__ == "__main__":
    main()
