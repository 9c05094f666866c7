"""Train a ResNet to be small, on one CPU, one GPU or a mesh: pruned, in 4 bits, by a teacher.

python examples/train_resnet.py
python examples/train_resnet.py --size imagenet --data images.npz --batch 256 --mesh 8 2

First a dense ResNet is trained. Then the same network goes on from its weights and is guided by it,
while weights leave step by step and the rest learns to bear four bits. Killed at any step, the same
command goes on from the last checkpoint, with the numbers that it would have had.
"""

import argparse
import functools
import pathlib
import time
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax.training import train_state
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcomp
from jaxcomp import distill, prune, quantize
from jaxcomp.model.progress import watched


class Size(NamedTuple):
    """What tells ResNets apart."""

    pixels: int
    classes: int
    width: int
    blocks: tuple[int, ...]
    bottleneck: bool


SIZES = {
    "cifar": Size(32, 10, 16, (3, 3, 3), False),  # ResNet-20
    "imagenet": Size(224, 1000, 64, (3, 4, 6, 3), True),  # ResNet-50
}
Conv = functools.partial(nn.Conv, use_bias=False, dtype=jnp.bfloat16)
Norm = functools.partial(nn.BatchNorm, momentum=0.9, dtype=jnp.bfloat16)


class Block(nn.Module):
    """Two convolutions of 3 × 3, or one between two of 1 × 1, and a shortcut."""

    features: int
    stride: int
    bottleneck: bool

    @nn.compact
    def __call__(self, x, train):
        """Images (n, height, width, channels) to the same with other channels."""
        norm = functools.partial(Norm, not train)
        y, out = x, self.features
        if self.bottleneck:
            y, out = nn.relu(norm()(Conv(out, (1, 1))(y))), 4 * out
        # These names say how the channels between the two lie on a mesh.
        y = Conv(self.features, (3, 3), self.stride, name="split")(y)
        y = nn.relu(norm(name="split_norm")(y))
        y = norm()(Conv(out, (1, 1) if self.bottleneck else (3, 3), name="join")(y))
        if x.shape != y.shape:
            x = norm()(Conv(out, (1, 1), self.stride)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """The user's model: bfloat16 inside, parameters and logits in float32."""

    size: Size

    @nn.compact
    def __call__(self, x, train):
        """Images (n, height, width, 3) to logits (n, classes)."""
        large = self.size.pixels > 64
        x = x / 255 if x.dtype == jnp.uint8 else x
        x = Conv(self.size.width, (7, 7) if large else (3, 3), 2 if large else 1)(x)
        x = nn.relu(Norm(not train)(x))
        if large:
            x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for stage, count in enumerate(self.size.blocks):
            for block in range(count):
                stride = 2 if stage and not block else 1
                x = Block(self.size.width * 2**stage, stride, self.size.bottleneck)(x, train)
        return nn.Dense(self.size.classes)(x.mean((1, 2)).astype(jnp.float32))


class TrainState(train_state.TrainState):
    """The user's train state."""

    batch_stats: Any


def train_step(state: TrainState, teacher: Any, images: jax.Array, labels: jax.Array):
    """The user's train step; ``teacher`` holds variables of the same model, or is None."""

    def loss_fn(params):
        params = jaxcomp.compressed(params, state.opt_state)  # changed: 2
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, moved = state.apply_fn(variables, images, train=True, mutable=["batch_stats"])
        if teacher is None:
            losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
        else:
            wanted = state.apply_fn(teacher, images, train=False)
            losses = distill.hinton_loss(logits, wanted, labels, temperature=4.0, weight=0.7)
        return losses.mean(), moved["batch_stats"]

    (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, batch_stats=batch_stats), loss


def small(sparsity: float, steps: int) -> jaxcomp.Compression:
    """Stem and head in 8 bits; the rest pruned by one threshold, then rounded to 4 bits."""
    eight = quantize.train(quantize.Format(8))
    body = jaxcomp.chain(
        prune.gradual(
            prune.scores.magnitude,
            prune.cubic(sparsity, begin=steps // 10, end=steps // 2),
            prune.allocation.global_threshold,
        ),
        quantize.train(quantize.Format(4), begin=steps // 2),
    )
    return jaxcomp.partition({"Conv_0/kernel": eight, "Dense_0/kernel": eight, "*/kernel": body})


def optimizer(method: jaxcomp.Compression, rate: float, steps: int) -> Any:
    """AdamW with a warm-up and a cosine."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, max(1, steps // 20), steps)
    return jaxcomp.wrap_optimizer(optax.adamw(schedule, weight_decay=1e-4), method)  # changed: 1


def create(size: Size, tx: Any, teacher: Any = None) -> TrainState:
    """A fresh state, or one that begins with the teacher's weights."""
    model = ResNet(size)
    images = jnp.zeros((1, size.pixels, size.pixels, 3))
    # A copy: steps give their own state away, and the teacher stays.
    start = jax.tree.map(jnp.copy, teacher) or model.init(jax.random.key(0), images, train=False)
    return TrainState.create(apply_fn=model.apply, tx=tx, **start)


def shardings(mesh: Mesh, tree: Any) -> Any:
    """Each block's inner channels over "model"; moments, masks and averages as their weights."""

    def place(path: Any, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path)
        axis = leaf.ndim - 1 if "split" in name else leaf.ndim - 2
        inner = "split" in name or ("join" in name and leaf.ndim > 1)
        divides = inner and leaf.ndim and leaf.shape[axis] % mesh.shape["model"] == 0
        return NamedSharding(mesh, P(*[None] * axis, "model") if divides else P())

    return jax.tree_util.tree_map_with_path(place, tree)


def make_train_step(mesh: Mesh, state: TrainState) -> Any:
    """The train step for a mesh: images over "data", weights as they lie."""
    rows, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    placed = shardings(mesh, state)
    return jax.jit(
        train_step,
        in_shardings=(placed, None, rows, rows),
        out_shardings=(placed, whole),
        donate_argnums=0,
    )


def load_images(path: str | None, size: Size) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of an .npz file; without one, noisy copies of an image for each class."""
    if path is not None:
        with np.load(path) as file:
            images, labels = file["images"], file["labels"].astype(np.int32)
        wanted = (len(labels), size.pixels, size.pixels, 3)
        known = (labels >= 0) & (labels < size.classes)
        if len(labels) < 10 or images.shape != wanted or not known.all():
            raise SystemExit(
                f"{path}: images {images.shape} must be {wanted}, ten at least, and labels 0 to "
                f"{size.classes - 1}"
            )
        return images, labels
    rng = np.random.default_rng(0)
    classes = rng.normal(size=(size.classes, size.pixels, size.pixels, 3)).astype(np.float32)
    labels = rng.integers(0, size.classes, 2048 if size.pixels <= 64 else 256).astype(np.int32)
    noise = rng.normal(size=(len(labels), *classes.shape[1:])).astype(np.float32)
    return classes[labels] + noise, labels


def batch_of(mesh: Mesh, data: Any, rows: np.ndarray) -> list[jax.Array]:
    """Rows of the data, each read only by the hosts whose devices hold it."""

    def take(array: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            return array[rows[index[0]]]

        shape, placed = (len(rows), *array.shape[1:]), NamedSharding(mesh, P("data"))
        return jax.make_array_from_callback(shape, placed, part)

    return [take(array) for array in data]


def fit(name: str, state: TrainState, teacher: Any, data: Any, mesh: Mesh, flags: Any):
    """Train from the last checkpoint on; what a step sees depends on its number alone."""
    step_on_mesh = make_train_step(mesh, state)
    directory = pathlib.Path(flags.checkpoints).absolute() / name
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager(directory, options=options) as manager:
        if manager.latest_step() is not None:
            abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
            state = manager.restore(None, args=ocp.args.StandardRestore(abstract))
        begin, clock = int(state.step), (0, 0.0)
        for step in watched(range(begin, flags.steps), name, None):
            rows = np.random.default_rng((1, step)).integers(0, len(data[1]), flags.batch)
            state, loss = step_on_mesh(state, teacher, *batch_of(mesh, data, rows))
            done, last = step + 1, step + 1 == flags.steps
            if step == begin or done % flags.log == 0 or last:
                line, now = f"{name} {done}: loss {float(loss):.4f}", time.monotonic()
                # The first step is mostly compiling.
                speed = flags.batch * (done - clock[0]) / (now - clock[1])
                print(line + (f", {speed:,.0f} images/s" if step > begin else ""))
                clock = done, now
            if done % flags.every == 0 or last:
                manager.save(done, args=ocp.args.StandardSave(state))
    return state


def accuracy(apply_fn: Any, variables: Any, data: Any) -> float:
    """Fraction right, 256 images at a time."""
    predict = jax.jit(lambda variables, x: apply_fn(variables, x, train=False).argmax(-1))
    parts = range(0, len(data[1]), 256)
    right = [predict(variables, data[0][i : i + 256]) == data[1][i : i + 256] for i in parts]
    return float(np.mean(np.concatenate(right)))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="cifar")
    parser.add_argument("--data", help=".npz of images (n, height, width, 3) and labels (n)")
    parser.add_argument("--steps", type=int, default=200, help="of the teacher, and as many after")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--mesh", type=int, nargs=2, help="devices along data and model axes")
    parser.add_argument("--checkpoints", default="resnet_checkpoints")
    parser.add_argument("--every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--log", type=int, default=20, help="steps between lines")
    parser.add_argument("--out", default="resnet.jxc")
    parser.add_argument("--hosts", action="store_true", help="this is one of several hosts")
    flags = parser.parse_args(arguments)
    for name, least in {"steps": 2, "batch": 1, "every": 1, "log": 1}.items():
        if getattr(flags, name) < least:
            parser.error(f"--{name} must be at least {least}")
    return flags


def make_mesh(shape: list[int] | None, batch: int) -> Mesh:
    """The devices along "data" and "model"; all of them along "data" if nothing is asked for."""
    devices = jax.devices()
    data, model = shape or (len(devices), 1)
    if data < 1 or model < 1 or data * model > len(devices):
        raise SystemExit(f"--mesh {data} {model}: there are {len(devices)} devices")
    if batch % data:
        raise SystemExit(f"--batch {batch} must be a multiple of {data}, the devices along data")
    return Mesh(np.array(devices[: data * model]).reshape(data, model), ("data", "model"))


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Train a teacher, then a small network; pack it, save it, and compare what was loaded."""
    flags = parse(arguments)
    if flags.hosts:
        jax.distributed.initialize()
    size = SIZES[flags.size]
    mesh = make_mesh(flags.mesh, flags.batch)
    images, labels = load_images(flags.data, size)
    count = len(labels) * 9 // 10
    data, held_out = (images[:count], labels[:count]), (images[count:], labels[count:])

    def begin(method, *teacher):
        make = functools.partial(create, size, optimizer(method, flags.rate, flags.steps))
        placed = shardings(mesh, jax.eval_shape(make, *teacher))
        # Compiled as a whole, so that each device makes its own part.
        return jax.jit(make, out_shardings=placed)(*teacher)

    dense = fit("teacher", begin(jaxcomp.identity()), None, data, mesh, flags)
    teacher = {"params": dense.params, "batch_stats": dense.batch_stats}
    start = begin(small(flags.sparsity, flags.steps), teacher)
    state = fit("student", start, teacher, data, mesh, flags)

    # All of it on this host, from whichever devices it lay on.
    gather = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, P()))
    state, teacher = jax.tree.map(jnp.asarray, jax.device_get(gather((state, teacher))))
    if jax.process_index() > 0:
        return {}
    packed = {"params": jaxcomp.pack(state.params, state.opt_state)}
    packed["batch_stats"] = state.batch_stats
    trained = packed | {"params": jaxcomp.compressed(state.params, state.opt_state)}
    size_dense = jaxcomp.save(pathlib.Path(flags.out).with_suffix(".dense.jxc"), teacher)
    size_small = jaxcomp.save(flags.out, packed)
    rows = {"teacher": teacher, "trained": trained, "packed": jaxcomp.load(flags.out)}
    found = {name: accuracy(state.apply_fn, each, held_out) for name, each in rows.items()}
    print(f"teacher: {found['teacher']:.2%} of held-out images, {size_dense:,} bytes")
    print(f"small as trained: {found['trained']:.2%}; loaded: {found['packed']:.2%}, ", end="")
    print(f"{size_small:,} bytes, {size_dense / size_small:.1f}× less")
    return found | {"bytes": size_small, "dense bytes": size_dense, "state": state}


if __name__ == "__main__":
    main()
