"""A Flax `TrainState` loop that prunes and quantizes: two lines differ from the plain loop.

python examples/linen_train_state.py
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState

import jaxcomp
from jaxcomp import prune, quantize

STEPS = 300


class Classifier(nn.Module):
    """The user's model, as it was."""

    @nn.compact
    def __call__(self, x):
        """Features (n, 16) to logits (n, 4)."""
        x = nn.relu(nn.Dense(64)(x))
        return nn.Dense(4)(x)


def make_data(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Points around four centres."""
    keys = jax.random.split(key, 3)
    labels = jax.random.randint(keys[0], (1024,), 0, 4)
    centres = jax.random.normal(jax.random.key(7), (4, 16))
    return centres[labels] + 0.7 * jax.random.normal(keys[1], (1024, 16)), labels


@jax.jit
def train_step(state: TrainState, images: jax.Array, labels: jax.Array):
    """The user's train step; the second changed line is marked."""

    def loss_fn(params):
        params = jaxcomp.compressed(params, state.opt_state)  # changed: 2
        logits = state.apply_fn({"params": params}, images)
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), loss


def main() -> float:
    """Train, pack, save, load, and evaluate what was loaded."""
    model = Classifier()
    x, y = make_data(jax.random.key(0))
    params = model.init(jax.random.key(1), x)["params"]

    method = jaxcomp.chain(
        prune.gradual(prune.scores.magnitude, prune.cubic(0.8, begin=50, end=200)),
        quantize.train(quantize.Format(bits=4), begin=200),
    )
    tx = jaxcomp.wrap_optimizer(optax.adam(1e-2), method)  # changed: 1
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    for step in range(STEPS):
        state, loss = train_step(state, x, y)
        if step % 50 == 49:
            print(f"step {step + 1}: loss {loss:.4f}")

    packed = jaxcomp.pack(state.params, state.opt_state)
    size = jaxcomp.save("classifier.jxc", packed)
    loaded = jaxcomp.load("classifier.jxc")
    predict = jax.jit(lambda p: model.apply({"params": p}, x))  # the model, as it was
    accuracy = float(jnp.mean(jnp.argmax(predict(loaded), -1) == y))
    print(packed["Dense_0"]["kernel"])
    print(
        f"{jaxcomp.nbytes(params):,} bytes of float32, {size:,} in the file; {accuracy:.1%} right"
    )
    return accuracy


if __name__ == "__main__":
    main()
