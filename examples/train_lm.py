"""Train a transformer in 8 and 4 bits and 2:4 sparse, on one CPU, one GPU or a mesh of devices.

python examples/train_lm.py
python examples/train_lm.py --size large --data book.txt --batch 64 --mesh 4 4

A decoder of bytes, written in NNX: embeddings and attention in 8 bits, in the feed-forward layers
two of every four weights removed, and soon the others in 4 bits. Killed at any step, the same
command goes on from the last checkpoint, with the numbers that it would have had.
"""

import argparse
import functools
import pathlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcomp
from jaxcomp import prune, quantize
from jaxcomp.model.progress import watched

VOCABULARY = 256  # bytes


class Size(NamedTuple):
    """What tells transformers apart."""

    layers: int
    width: int
    heads: int
    context: int


SIZES = {"small": Size(4, 128, 4, 128), "large": Size(12, 768, 12, 1024)}


class Block(nnx.Module):
    """Causal attention, then two dense layers."""

    def __init__(self, size: Size, rngs: nnx.Rngs):
        dense = functools.partial(nnx.Linear, use_bias=False, dtype=jnp.bfloat16, rngs=rngs)
        norm = functools.partial(nnx.RMSNorm, size.width, dtype=jnp.bfloat16, rngs=rngs)
        self.heads = size.heads
        self.norms = nnx.List([norm(), norm()])
        self.query, self.key, self.value = (dense(size.width, size.width) for _ in range(3))
        self.out = dense(size.width, size.width)
        self.up, self.down = dense(size.width, 4 * size.width), dense(4 * size.width, size.width)

    def __call__(self, x):
        """Vectors (n, length, width) to the same."""
        split = lambda y: y.reshape(*y.shape[:2], self.heads, -1)
        y = self.norms[0](x)
        query, key, value = (split(each(y)) for each in (self.query, self.key, self.value))
        y = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(y.reshape(x.shape))
        return x + self.down(nnx.gelu(self.up(self.norms[1](x))))


class Transformer(nnx.Module):
    """The user's model: bfloat16 inside, parameters and logits in float32."""

    def __init__(self, size: Size, rngs: nnx.Rngs):
        embed = functools.partial(nnx.Embed, dtype=jnp.bfloat16, rngs=rngs)
        self.embed, self.places = embed(VOCABULARY, size.width), embed(size.context, size.width)
        self.blocks = nnx.List([Block(size, rngs) for _ in range(size.layers)])
        self.norm = nnx.RMSNorm(size.width, dtype=jnp.bfloat16, rngs=rngs)
        head = functools.partial(nnx.Linear, use_bias=False, dtype=jnp.bfloat16)
        self.head = head(size.width, VOCABULARY, rngs=rngs)

    def __call__(self, tokens):
        """Bytes (n, length) to logits (n, length, 256) of those that follow."""
        x = self.embed(tokens) + self.places(jnp.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)).astype(jnp.float32)


class State(NamedTuple):
    """All that training carries."""

    step: Any
    params: Any
    opt_state: Any


def graph_of(size: Size) -> Any:
    """The model without its parameters."""
    return nnx.graphdef(nnx.eval_shape(lambda: Transformer(size, nnx.Rngs(0))))


def loss_of(graph: Any, params: Any, text: jax.Array) -> jax.Array:
    """Mean loss in nats of each next byte; ``text`` (n, context + 1)."""
    logits = nnx.merge(graph, params)(text[:, :-1])
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:]).mean()


def train_step(graph: Any, tx: Any, state: State, text: jax.Array):
    """The user's train step."""

    def loss_fn(params):
        params = jaxcomp.compressed(params, state.opt_state)  # changed: 2
        return loss_of(graph, params, text)

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return State(state.step + 1, params, opt_state), loss


def small(steps: int) -> jaxcomp.Compression:
    """Feed-forward layers 2:4 and in 4 bits, a scale for every 32 inputs; the rest in 8 bits."""
    sparse = prune.straight_through(
        prune.scores.magnitude,
        prune.constant(0.5),
        structure=prune.NM(2, 4),
        every=10,
        end=steps * 3 // 4,
        decay=2e-4,
    )
    four = quantize.train(quantize.Format(4, granularity=quantize.PerGroup(32)), begin=steps // 4)
    both = jaxcomp.chain(sparse, four)
    return jaxcomp.partition(
        {"*/up/*": both, "*/down/*": both, "*": quantize.train(quantize.Format(8))}
    )


def optimizer(method: jaxcomp.Compression, rate: float, steps: int) -> Any:
    """AdamW with a warm-up, a cosine and clipped gradients."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, max(1, steps // 20), steps)
    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01))
    return jaxcomp.wrap_optimizer(adam, method)  # changed: 1


def create(size: Size, tx: Any) -> State:
    """A fresh state."""
    params = nnx.state(Transformer(size, nnx.Rngs(0)), nnx.Param)
    return State(jnp.zeros((), jnp.int32), params, tx.init(params))


def shardings(mesh: Mesh, tree: Any) -> Any:
    """Outputs over "model", then the inputs of what reads them; moments and masks as weights."""

    def place(path: Any, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path)
        axis = 0 if "out" in name or "down" in name else 1
        whole = leaf.ndim < 2 or "embedding" in name or leaf.shape[axis] % mesh.shape["model"]
        return NamedSharding(mesh, P() if whole else P(*[None] * axis, "model"))

    return jax.tree_util.tree_map_with_path(place, tree)


def make_train_step(mesh: Mesh, size: Size, tx: Any, state: State) -> Any:
    """The train step for a mesh: text over "data", weights as they lie."""
    placed = shardings(mesh, state)
    return jax.jit(
        functools.partial(train_step, graph_of(size), tx),
        in_shardings=(placed, NamedSharding(mesh, P("data"))),
        out_shardings=(placed, NamedSharding(mesh, P())),
        donate_argnums=0,
    )


def load_text(path: str | None, least: int) -> np.ndarray:
    """The bytes of a file; without one, bytes each of which has four that may follow it."""
    if path is not None:
        count = pathlib.Path(path).stat().st_size
        if count < least:
            raise SystemExit(f"{path}: {count:,} bytes are too few, {least:,} at least")
        return np.memmap(path, np.uint8, mode="r")
    rng = np.random.default_rng(0)
    following, choices = rng.integers(0, VOCABULARY, (VOCABULARY, 4)), rng.integers(0, 4, 300_000)
    text = [0]
    for choice in choices:
        text.append(following[text[-1], choice])
    return np.array(text, np.uint8)


def windows(mesh: Mesh, text: np.ndarray, size: Size, starts: np.ndarray) -> jax.Array:
    """Windows of the text, each read only by the hosts whose devices hold it."""

    def part(index: Any) -> np.ndarray:
        return text[starts[index[0], None] + np.arange(size.context + 1)].astype(np.int32)

    shape, placed = (len(starts), size.context + 1), NamedSharding(mesh, P("data"))
    return jax.make_array_from_callback(shape, placed, part)


def fit(state: State, step_on_mesh: Any, text: np.ndarray, mesh: Mesh, flags: Any) -> State:
    """Train from the last checkpoint on; what a step sees depends on its number alone."""
    size, directory = SIZES[flags.size], pathlib.Path(flags.checkpoints).absolute()
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager(directory, options=options) as manager:
        if manager.latest_step() is not None:
            abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
            state = State(*manager.restore(None, args=ocp.args.StandardRestore(abstract)))
        begin, clock = int(state.step), (0, 0.0)
        for step in watched(range(begin, flags.steps), "training", None):
            rng = np.random.default_rng((1, step))
            starts = rng.integers(0, len(text) - size.context, flags.batch)
            state, loss = step_on_mesh(state, windows(mesh, text, size, starts))
            done, last = step + 1, step + 1 == flags.steps
            if step == begin or done % flags.log == 0 or last:
                line, now = f"step {done}: loss {float(loss):.4f}", time.monotonic()
                # The first step is mostly compiling.
                speed = flags.batch * size.context * (done - clock[0]) / (now - clock[1])
                print(line + (f", {speed:,.0f} tokens/s" if step > begin else ""))
                clock = done, now
            if done % flags.every == 0 or last:
                manager.save(done, args=ocp.args.StandardSave(state))
    return state


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--data", help="any file; its bytes are the text")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--mesh", type=int, nargs=2, help="devices along data and model axes")
    parser.add_argument("--checkpoints", default="lm_checkpoints")
    parser.add_argument("--every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--log", type=int, default=20, help="steps between lines")
    parser.add_argument("--out", default="lm.jxc")
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
    """Train, pack and save; losses in bits a byte on text held out, and bytes."""
    flags = parse(arguments)
    if flags.hosts:
        jax.distributed.initialize()
    size = SIZES[flags.size]
    mesh = make_mesh(flags.mesh, flags.batch)
    everything = load_text(flags.data, 20 * size.context)
    text, held_out = np.split(everything, [len(everything) * 9 // 10])

    tx = optimizer(small(flags.steps), flags.rate, flags.steps)
    make = functools.partial(create, size, tx)
    placed = shardings(mesh, jax.eval_shape(make))
    # Compiled as a whole, so that each device makes its own part.
    state = jax.jit(make, out_shardings=placed)()
    state = fit(state, make_train_step(mesh, size, tx, state), text, mesh, flags)

    # All of it on this host, from whichever devices it lay on.
    gather = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, P()))
    state = jax.tree.map(jnp.asarray, jax.device_get(gather(state)))
    if jax.process_index() > 0:
        return {}
    trained = jaxcomp.compressed(state.params, state.opt_state)
    size_small = jaxcomp.save(flags.out, jaxcomp.pack(state.params, state.opt_state))
    size_dense = jaxcomp.nbytes(state.params)
    alone = Mesh(np.array(jax.local_devices()[:1]), ("data",))
    starts = np.linspace(0, len(held_out) - size.context - 1, 32).astype(int)
    seen = windows(alone, held_out, size, starts)
    measure = jax.jit(functools.partial(loss_of, graph_of(size)))
    rows = {"trained": trained, "packed": jaxcomp.load(flags.out)}
    bits = {name: float(measure(each, seen)) / np.log(2) for name, each in rows.items()}
    print(f"held-out text: {bits['trained']:.4f} bits a byte as trained, ", end="")
    print(f"{bits['packed']:.4f} of what was loaded; {size_dense:,} bytes of float32, ", end="")
    print(f"{size_small:,} in the file, {size_dense / size_small:.1f}× less")
    return bits | {"bytes": size_small, "dense bytes": size_dense, "state": state}


if __name__ == "__main__":
    main()
