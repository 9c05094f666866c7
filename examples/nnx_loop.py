"""An NNX loop that prunes and shares weights: two lines differ from the plain loop.

python examples/nnx_loop.py
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import jaxcomp
from jaxcomp import prune, share

STEPS = 300


class Classifier(nnx.Module):
    """The user's model, as it was; batch norm and dropout work as ever."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(16, 64, rngs=rngs)
        self.norm = nnx.BatchNorm(64, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.second = nnx.Linear(64, 4, rngs=rngs)

    def __call__(self, x):
        """Features (n, 16) to logits (n, 4)."""
        return self.second(self.dropout(nnx.relu(self.norm(self.first(x)))))


def make_data(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Points around four centres."""
    keys = jax.random.split(key, 3)
    labels = jax.random.randint(keys[0], (1024,), 0, 4)
    centres = jax.random.normal(jax.random.key(7), (4, 16))
    return centres[labels] + 0.7 * jax.random.normal(keys[1], (1024, 16)), labels


@nnx.jit
def train_step(model: Classifier, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array):
    """The user's train step; the second changed line is marked."""

    def loss_fn(model):
        model = jaxcomp.compressed(model, optimizer.opt_state)  # changed: 2
        return optax.losses.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    return loss


def main() -> float:
    """Train, pack, and evaluate the packed module."""
    x, y = make_data(jax.random.key(0))
    model = Classifier(nnx.Rngs(1))

    method = jaxcomp.chain(
        prune.gradual(
            prune.scores.magnitude,
            prune.cubic(0.8, begin=50, end=200),
            prune.allocation.global_threshold,
        ),
        share.train(clusters=8, begin=220),
    )
    tx = jaxcomp.wrap_optimizer(optax.adam(1e-2), method)  # changed: 1
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for step in range(STEPS):
        loss = train_step(model, optimizer, x, y)
        if step % 50 == 49:
            print(f"step {step + 1}: loss {loss:.4f}")

    packed = jaxcomp.pack(model, optimizer.opt_state)
    packed.eval()
    accuracy = float(jnp.mean(jnp.argmax(packed(x), -1) == y))
    before, after = (jaxcomp.nbytes(nnx.state(m, nnx.Param)) for m in (model, packed))
    print(packed.first.kernel)
    print(f"{before:,} bytes of float32, {after:,} packed in memory; {accuracy:.1%} right")
    return accuracy


if __name__ == "__main__":
    main()
