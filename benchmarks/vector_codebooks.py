# pyright: reportMissingImports=false
"""Vector codebooks: error at equal bits a weight, and k-means against scikit-learn and faiss.

    python benchmarks/vector_codebooks.py errors
    python benchmarks/vector_codebooks.py kmeans --vectors 1000000

`errors` trains a perceptron on scikit-learn's digits (1,797 images of 8 x 8, one in five held out)
and shares the weights of its two large layers after training, without any more of it. Bits a
weight count indices and codebooks. `kmeans` fits 256 centroids of 8 dimensions from the same start
for the same number of steps; peak memory is what the process grew by. faiss is optional.
"""

import argparse
import resource
import time
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits

import jaxcomp
from jaxcomp import share
from jaxcomp.kernels.vector_kmeans import fit_vectors, nearest_vectors

WIDTH, STEPS, SHARED = 512, 600, ("first", "second")


def logits(params, x):
    """A perceptron of two hidden layers."""
    for name in SHARED:
        x = jax.nn.relu(x @ params[name]["kernel"] + params[name]["bias"])
    return x @ params["last"]["kernel"] + params["last"]["bias"]


def trained(seed):
    """Weights, held-out images and labels, and the second moments of the inputs of each layer."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(images))
    images, labels = images[order].astype(np.float32) / 16, labels[order]
    cut = len(images) // 5
    sizes = (64, WIDTH, WIDTH, 10)
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        name: {
            "kernel": jax.random.normal(key, (m, n)) * np.sqrt(2 / m),
            "bias": jnp.zeros(n),
        }
        for name, key, m, n in zip((*SHARED, "last"), keys, sizes[:-1], sizes[1:], strict=True)
    }
    tx = optax.adamw(1e-3, weight_decay=0.05)

    def loss(params, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y).mean()

    @jax.jit
    def step(params, state, x, y):
        updates, state = tx.update(jax.grad(loss)(params, x, y), state, params)
        return optax.apply_updates(params, updates), state

    state, rng = tx.init(params), np.random.default_rng(seed)
    for _ in range(STEPS):
        chosen = rng.integers(cut, len(images), 128)
        params, state = step(params, state, images[chosen], labels[chosen])
    x, moments = images[cut:], {}
    for name in SHARED:
        moments[name] = np.mean(np.square(x), 0)[:, None] + 1e-4
        x = np.maximum(x @ np.asarray(params[name]["kernel"]) + params[name]["bias"], 0)
    return params, images[:cut], labels[:cut], moments


def sharers(moments):
    """Ways to share, by name: each of a kernel and the name of its layer, at about equal bits."""
    key = jax.random.key(0)
    vectors = share.vector_codebook
    product2 = share.VectorFormat(16, 2)
    product4 = share.VectorFormat(256, 4)
    spaces = share.VectorFormat(16, 2, per_space=True)
    residual = share.VectorFormat(16, 4, stages=2)
    return {
        "scalar, K=4": lambda x, _: share.kmeans(x, 4),
        "product, K=16, d=2": lambda x, _: vectors(x, product2, key=key),
        "product, K=16, d=2, by inputs": lambda x, name: vectors(
            x, product2, key=key, importance=moments[name]
        ),
        "product, K=16, d=2, per space": lambda x, _: vectors(x, spaces, key=key),
        "product, K=256, d=4": lambda x, _: vectors(x, product4, key=key),
        "product, K=256, d=4, by inputs": lambda x, name: vectors(
            x, product4, key=key, importance=moments[name]
        ),
        "residual, 2 of K=16, d=4": lambda x, _: vectors(x, residual, key=key),
        "residual, 2 of K=16, d=4, greedy": lambda x, _: vectors(x, residual, key=key, sweeps=0),
        "hashed, 1 float in 16": lambda x, _: share.hashed(x, x.size // 16),
    }


def errors(seeds):
    """Bits, relative squared error and test error of each way, over seeds."""
    rows: dict[str, list[tuple[float, float, float]]] = {}
    for seed in range(seeds):
        params, x, y, moments = trained(seed)
        wrong = lambda params, x=x, y=y: 100 * np.mean(np.argmax(logits(params, x), 1) != y)
        rows.setdefault("dense", []).append((32, 0, wrong(params)))
        for name, sharer in sharers(moments).items():
            new, lost, total, size, weights = dict(params), 0.0, 0.0, 0, 0
            for layer in SHARED:
                kernel = params[layer]["kernel"]
                leaf = sharer(kernel, layer)
                dense = leaf.decode()
                lost += float(np.sum(np.square(np.asarray(dense - kernel, np.float64))))
                total += float(np.sum(np.square(np.asarray(kernel, np.float64))))
                size, weights = size + jaxcomp.nbytes(leaf), weights + kernel.size
                new[layer] = {**params[layer], "kernel": dense}
            rows.setdefault(name, []).append((8 * size / weights, lost / total, wrong(new)))
    lines = []
    for name, found in rows.items():
        bits, lost, wrong = np.mean(found, 0)
        spread = np.std([row[2] for row in found])
        lines.append((name, f"{bits:.2f}", f"{lost:.4f}", f"{wrong:.2f} ± {spread:.2f}"))
    print(table(("sharing", "bits a weight", "relative squared error", "test error %"), lines))


def measured(run):
    """What it gives, seconds, and MiB that the process's peak grew by."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    found = run()
    seconds = time.perf_counter() - begin
    return found, seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def kmeans(vectors, clusters=256, d=8, steps=20):
    """Seconds, memory and inertia of k-means from the same start, each once warmed up."""
    x = np.random.default_rng(0).normal(size=(vectors, d)).astype(np.float32)
    start, key = x[:clusters], jax.random.key(0)

    def ours(x):
        return np.asarray(
            fit_vectors(
                jnp.asarray(x), clusters, key=key, start=jnp.asarray(start), iterations=steps
            )
        )

    def theirs(x):
        options: Any = dict(init=start, n_init=1, max_iter=steps, tol=0, algorithm="lloyd")
        return KMeans(clusters, **options).fit(x).cluster_centers_

    def faiss_kmeans(x):
        import faiss

        model = faiss.Kmeans(d, clusters, niter=steps, max_points_per_centroid=len(x))
        model.train(x, init_centroids=start)
        return model.centroids

    lines = []
    for name, run in {"jaxcomp": ours, "scikit-learn": theirs, "faiss": faiss_kmeans}.items():
        try:
            run(x[: 4 * clusters])
        except ImportError:
            print(f"{name} is not installed: left out")
            continue
        first = measured(lambda run=run: run(x))
        again = measured(lambda run=run: run(x))
        book = np.asarray(first[0], np.float32)
        index = np.asarray(nearest_vectors(jnp.asarray(x), jnp.asarray(book)))
        inertia = np.sum(np.square(x - book[index]), dtype=np.float64)
        lines.append((name, f"{again[1]:.2f}", f"{first[2]:.0f}", f"{inertia:.6g}"))
    print(f"{vectors} vectors of {d}, K={clusters}, {steps} steps; a table of all distances would")
    print(f"be {vectors * clusters * 4 / 2**20:.0f} MiB")
    print(table(("k-means", "seconds", "peak MiB more", "inertia"), lines))


def table(head, rows):
    """Text of a table."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    line = lambda row: (
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
    )
    return "\n".join(
        [line(head), "|" + "|".join("-" * (w + 2) for w in widths) + "|", *map(line, rows)]
    )


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=["errors", "kmeans"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--vectors", type=int, default=1_000_000)
    given = parser.parse_args()
    with warnings.catch_warnings():
        # scikit-learn says that it has not converged, which was not asked of it.
        warnings.simplefilter("ignore")
        errors(given.seeds) if given.what == "errors" else kmeans(given.vectors)


if __name__ == "__main__":
    main()
