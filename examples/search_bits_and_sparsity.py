"""Search how sparse each layer shall be and in how many bits, for a budget of bytes; ship the best.

python examples/search_bits_and_sparsity.py

The less there is to spend, the more it matters where. With 2,200 bytes the same settings in all
layers are as good, once the network is trained on with them.
"""

import os
import tempfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

import jaxcomp
from jaxcomp import prune, quantize, search, tree
from jaxcomp.search import ready, spaces

BUDGET = 1_400  # bytes of the whole file
SPARSITIES, BITS = (0.0, 0.5, 0.7, 0.8, 0.9), (2, 3, 4, 6)
WIDTHS = (64, 32)
STEPS, FINE_TUNING_STEPS, BATCH = 600, 300, 64
EVALUATIONS, POPULATION = 640, 32
Params = Any


class Classifier(nn.Module):
    """The user's model: nothing in it knows of zeros or bits."""

    @nn.compact
    def __call__(self, x):
        """Images (n, 64) to logits (n, 10)."""
        for width in WIDTHS:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(10)(x)


class Data(NamedTuple):
    """Images and labels: to train on, to choose by, and to test the choice on."""

    train: tuple[jax.Array, jax.Array]
    held_out: tuple[jax.Array, jax.Array]
    test: tuple[jax.Array, jax.Array]


def make_data() -> Data:
    """Real digits."""
    digits: Any = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = jnp.asarray(digits.data[order] / 16, jnp.float32)
    labels = jnp.asarray(digits.target[order])
    at = slice(900), slice(900, 1350), slice(1350, None)
    return Data(*((images[part], labels[part]) for part in at))


def train(params: Params, method: jaxcomp.Compression, data: Data, steps: int) -> Any:
    """The user's training; what is to be shipped."""
    schedule = optax.cosine_decay_schedule(3e-3, steps, 0.05)
    tx = jaxcomp.wrap_optimizer(optax.adam(schedule), method)  # changed: 1
    images, labels = data.train

    def step(carry, index):
        params, opt_state = carry

        def loss_fn(params):
            params = jaxcomp.compressed(params, opt_state)  # changed: 2
            logits = Classifier().apply({"params": params}, images[index])
            return search.objectives.cross_entropy(logits, labels[index])

        updates, opt_state = tx.update(jax.grad(loss_fn)(params), opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    batches = jax.random.randint(jax.random.key(1), (steps, BATCH), 0, len(labels))
    run = jax.jit(lambda *carry: jax.lax.scan(step, carry, batches)[0])
    return jaxcomp.pack(*run(params, tx.init(params)))


def accuracy(params: Params, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Of the model; it runs on compressed leaves as they are."""
    return search.objectives.accuracy(Classifier().apply({"params": params}, images), labels)


def format_of(bits: int) -> quantize.Format:
    """A scale of two bytes for each output."""
    return quantize.Format(bits, scale_dtype="bfloat16")


def size_of(packed: Any) -> tuple[int, dict[str, int]]:
    """Bytes of the file, and of each leaf in it."""
    with tempfile.TemporaryDirectory() as directory:
        file = os.path.join(directory, "measured.jxc")
        size = jaxcomp.save(file, packed)
        return size, {leaf.path: leaf.bytes for leaf in jaxcomp.inspect(file).leaves}


class Settings(NamedTuple):
    """The network at all settings, each the same in all layers.

    Attributes:
        pruned: by sparsity; in float32.
        packed: by sparsity and bits.
        sizes: by sparsity and bits, see :func:`size_of`.
    """

    pruned: dict[float, Params]
    packed: dict[tuple[float, int], Any]
    sizes: dict[tuple[float, int], tuple[int, dict[str, int]]]


def all_settings(params: Params) -> Settings:
    """What a layer comes to at each setting, which does not depend on the other layers."""
    scores = jax.tree.map(prune.scores.magnitude, params)
    pruned, packed = {}, {}
    for sparsity in SPARSITIES:
        pruned[sparsity] = prune.apply_masks(params, prune.masks(scores, sparsity))
        kernels = tree.select(pruned[sparsity])
        for bits in BITS:
            codes = {path: quantize.encode(x, format_of(bits)) for path, x in kernels.items()}
            packed[sparsity, bits] = tree.replace(pruned[sparsity], codes)
    return Settings(pruned, packed, {key: size_of(found) for key, found in packed.items()})


def assembled(trees: Mapping[Any, Params], chosen: Mapping[str, Any]) -> Params:
    """Each kernel from the tree of its own setting."""
    leaves = {path: tree.flatten(trees[setting])[path] for path, setting in chosen.items()}
    return tree.replace(next(iter(trees.values())), leaves)


def make_evaluate(space: Any, settings: Settings, data: Data) -> Any:
    """A function of a list of candidates: accuracies by one program, and bytes by leaf added up."""
    decoded = {key: tree.flatten(jaxcomp.decode(each)) for key, each in settings.packed.items()}
    first = jaxcomp.decode(next(iter(settings.packed.values())))
    # (sparsities, bits, inputs, outputs) by path.
    kernels = {
        path: jnp.array([[decoded[s, bits][path] for bits in BITS] for s in SPARSITIES])
        for path in space
    }

    def measure(point, kernels, first, images, labels):
        chosen = {
            path: kernel[point[f"{path}/sparsity"], point[f"{path}/bits"]]
            for path, kernel in kernels.items()
        }
        return accuracy(tree.replace(first, chosen), images, labels)

    measured = search.evaluator(measure, kernels, first, *data.held_out, form="vmap")
    size, shares = next(iter(settings.sizes.values()))

    def bytes_of(candidate: Any) -> int:
        chosen = ready.setting(candidate, "sparsity", "bits").items()
        return size + sum(settings.sizes[pair][1][path] - shares[path] for path, pair in chosen)

    def evaluate(candidates: list[Any]) -> list[dict[str, float]]:
        found = measured([spaces.encode(space, candidate) for candidate in candidates])
        return [
            {"accuracy": right, "bytes": bytes_of(candidate)}
            for right, candidate in zip(found, candidates, strict=True)
        ]

    return evaluate


class Found(NamedTuple):
    """Settings before the network is trained on.

    Attributes:
        candidate: the settings.
        accuracy: on held-out images.
        bytes: of the file.
    """

    candidate: Any
    accuracy: float
    bytes: int


def searched(space: Any, settings: Settings, data: Data) -> list[Found]:
    """The front of a search: none is more accurate and smaller; the most accurate first."""
    study = search.run(
        space,
        make_evaluate(space, settings, data),
        search.strategies.nsga2(POPULATION),
        objectives={"accuracy": "maximize", "bytes": "minimize"},
        constraints={"bytes": BUDGET},
        key=jax.random.key(0),
        stop=EVALUATIONS,
        batch=POPULATION,
    )
    print(f"{len(study.trials):,} of {spaces.count(space):,} candidates evaluated, one program")
    found = []
    for trial in study.front:
        candidate = study.candidate(trial)
        # The leaves' bytes add up to those of the file but for some of what describes them.
        packed = assembled(settings.packed, ready.setting(candidate, "sparsity", "bits"))
        right = dict(zip(study.objectives, trial.values or (), strict=True))["accuracy"]
        found.append(Found(candidate, right, size_of(packed)[0]))
    found.sort(key=lambda each: -each.accuracy)
    return [each for each in found if each.bytes <= BUDGET]


def alike(space: Any, settings: Settings, data: Data) -> list[Found]:
    """The same setting in each layer, where that keeps to the budget; the most accurate first."""
    found = [
        Found(
            {path: {"sparsity": sparsity, "bits": bits} for path in space},
            float(accuracy(packed, *data.held_out)),
            settings.sizes[sparsity, bits][0],
        )
        for (sparsity, bits), packed in settings.packed.items()
    ]
    return sorted((each for each in found if each.bytes <= BUDGET), key=lambda x: -x.accuracy)


class Shipped(NamedTuple):
    """A network that was trained on, as it is read from its file.

    Attributes:
        found: its settings.
        bytes: of the file.
        held_out: accuracy.
        test: likewise, on images that nothing was chosen by.
    """

    found: Found
    bytes: int
    held_out: float
    test: float


def ship(ordered: list[Found], settings: Settings, data: Data, file: str) -> Shipped:
    """Train on what is most accurate, and what follows if its codes then take too many bytes."""
    for found in ordered:
        params = assembled(settings.pruned, ready.setting(found.candidate, "sparsity"))
        bits = ready.setting(found.candidate, "bits")
        rules: Any = {path: quantize.train(format_of(count)) for path, count in bits.items()}
        method = jaxcomp.chain(prune.keep_zeros(), jaxcomp.partition(rules))
        size = jaxcomp.save(file, train(params, method, data, FINE_TUNING_STEPS))
        if size <= BUDGET:
            loaded = jaxcomp.load(file)
            right = (float(accuracy(loaded, *part)) for part in (data.held_out, data.test))
            return Shipped(found, size, *right)
    raise ValueError(f"nothing fits into {BUDGET} bytes")


def shown(candidate: Any) -> str:
    """Zeros and bits of each kernel, in the network's order."""
    chosen = ready.setting(candidate, "sparsity", "bits").values()
    return "; ".join(f"{sparsity:.0%}, {bits}" for sparsity, bits in chosen)


def show(front: list[Found], uniform: list[Found]) -> None:
    """The front, each beside the most accurate uniform setting in no more bytes."""
    table = Table(title="zeros and bits of each layer; accuracy on held-out images, one shot")
    for heading in ("searched", "bytes", "%", "uniform", "bytes", "%"):
        table.add_column(heading)
    for each in sorted(front, key=lambda each: each.bytes):
        best = next((found for found in uniform if found.bytes <= each.bytes), None)
        cells: list[str] = []
        for found in (each,) if best is None else (each, best):
            cells += [shown(found.candidate), f"{found.bytes:,}", f"{found.accuracy:.1%}"]
        table.add_row(*cells)
    Console(width=100).print(table)


def main() -> tuple[Settings, list[Found], list[Found], dict[str, Shipped]]:
    """Train, search, compare, train on, save: settings, the front, uniform ones, the shipped."""
    data = make_data()
    params = Classifier().init(jax.random.key(0), data.train[0][:1])["params"]
    dense = train(params, jaxcomp.identity(), data, STEPS)
    print(f"dense: {jaxcomp.nbytes(dense):,} bytes, test {accuracy(dense, *data.test):.1%}")
    settings = all_settings(dense)
    space = ready.compressions(params, sparsities=SPARSITIES, bits=BITS)
    front, uniform = searched(space, settings, data), alike(space, settings, data)
    show(front, uniform)
    shipped = {
        "searched": ship(front, settings, data, "searched.jxc"),
        "uniform": ship(uniform, settings, data, "uniform.jxc"),
    }
    for name, each in shipped.items():
        print(
            f"{name}, trained on: {shown(each.found.candidate)}; {each.bytes:,} bytes of "
            f"{BUDGET:,}; held out {each.held_out:.1%}, test {each.test:.1%}"
        )
    return settings, front, uniform, shipped


if __name__ == "__main__":
    main()
