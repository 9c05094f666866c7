"""Compile the train steps of two examples for 16 chips that are not there; their collectives.

Run as ``python mesh_programs.py TARGET``, in a process of its own; JSON on stdout.
"""

import functools
import importlib
import json
import math
import pathlib
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcomp

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples"))
train_resnet: Any = importlib.import_module("train_resnet")
train_lm: Any = importlib.import_module("train_lm")

STEPS = 1000
RESNET = train_resnet.Size(pixels=16, classes=16, width=64, blocks=(1,), bottleneck=True)
TRANSFORMER = train_lm.Size(layers=1, width=256, heads=4, context=64)


def lying(shardings: Any, tree: Any) -> Any:
    """The same shapes on devices that are described only."""
    place = lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s)
    return jax.tree.map(place, tree, shardings)


def resnet(mesh: Mesh, method: jaxcomp.Compression) -> Any:
    """The step with a teacher, compiled."""
    tx = train_resnet.optimizer(method, 1e-3, STEPS)
    state = jax.eval_shape(functools.partial(train_resnet.create, RESNET, tx))
    state = lying(train_resnet.shardings(mesh, state), state)
    teacher = {"params": state.params, "batch_stats": state.batch_stats}
    rows = NamedSharding(mesh, P("data"))
    images = jax.ShapeDtypeStruct((256, 16, 16, 3), jnp.float32, sharding=rows)
    labels = jax.ShapeDtypeStruct((256,), jnp.int32, sharding=rows)
    step = train_resnet.make_train_step(mesh, state)
    return step.lower(state, teacher, images, labels).compile()


def transformer(mesh: Mesh, method: jaxcomp.Compression) -> Any:
    """The step, compiled."""
    tx = train_lm.optimizer(method, 1e-3, STEPS)
    state = jax.eval_shape(functools.partial(train_lm.create, TRANSFORMER, tx))
    state = lying(train_lm.shardings(mesh, state), state)
    rows = NamedSharding(mesh, P("data"))
    text = jax.ShapeDtypeStruct((64, TRANSFORMER.context + 1), jnp.int32, sharding=rows)
    return train_lm.make_train_step(mesh, TRANSFORMER, tx, state).lower(state, text).compile()


KINDS = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
_COLLECTIVE = re.compile(rf"= (.*?) ((?:ragged-)?(?:{KINDS}))(?:-start)?\(")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}


def collectives(text: str) -> list[tuple[str, str, int]]:
    """Each that a program holds: its kind, what holds it (ENTRY, or a loop) and bytes."""
    found, inside = [], ""
    for line in text.splitlines():
        if line and not line[0].isspace():
            inside = line.split(" ")[0]
        match = _COLLECTIVE.search(line)
        if match is not None:
            shapes = re.findall(r"(\w+)\[([\d,]*)\]", match[1])
            sizes = (math.prod(int(n) for n in each.split(",") if n) for _, each in shapes)
            bytes_each = (_BYTES[dtype] for dtype, _ in shapes)
            size = sum(math.prod(pair) for pair in zip(sizes, bytes_each, strict=True))
            found.append((match[2], "ENTRY" if inside == "ENTRY" else "loop", size))
    return found


def main() -> None:
    # The compiler may spend little on how fast programs are: one sixth of the time, and the
    # collectives are the same as with all its effort (jax 0.10.2, libtpu 0.0.42).
    jax.config.update("jax_exec_time_optimization_effort", -1.0)
    topology = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1])
    programs = {
        "resnet": (resnet, train_resnet.small(0.8, STEPS)),
        "transformer": (transformer, train_lm.small(STEPS)),
    }
    told = {}
    for shape in ((4, 4), (16, 1)):
        mesh = Mesh(np.array(topology.devices).reshape(shape), ("data", "model"))
        for name, (compiled, small) in programs.items():
            for kind, method in (("plain", jaxcomp.identity()), ("small", small)):
                text = compiled(mesh, method).as_text()
                told[f"{name} {shape[0]}x{shape[1]} {kind}"] = collectives(text)
    print(json.dumps(told))


if __name__ == "__main__":
    main()
