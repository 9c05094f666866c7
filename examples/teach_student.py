"""A teacher guides a student that is pruned and quantized while it learns, in your own train step.

python examples/teach_student.py
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import jaxcomp
from jaxcomp import distill, prune, quantize

STEPS = 400
LABELLED = 200  # images whose labels the student may see; its teacher speaks of all
HINT = "Classifier/Dense_0"  # what leaves this module; print(distill.list_features(...)) for more


class Classifier(nn.Module):
    """The user's model, of teacher and student alike: nothing in it knows of distillation."""

    width: int

    @nn.compact
    def __call__(self, x):
        """Images (n, 64) to logits (n, 10)."""
        x = nn.relu(nn.Dense(self.width)(x))
        x = nn.relu(nn.Dense(self.width)(x))
        return nn.Dense(10)(x)


def make_data() -> tuple[jax.Array, ...]:
    """Real digits: images and labels to train on, then to test on."""
    digits: Any = load_digits()
    images, labels = jnp.asarray(digits.data / 16, jnp.float32), jnp.asarray(digits.target)
    return images[:1400], labels[:1400], images[1400:], labels[1400:]


def train_teacher(model: Classifier, images: jax.Array, labels: jax.Array) -> Any:
    """The user's teacher: any trained model."""
    params = model.init(jax.random.key(0), images[:1])
    tx = optax.adamw(2e-3, weight_decay=1e-2)
    opt_state = tx.init(params)

    @jax.jit
    def step(params, opt_state, x, y):
        def loss_fn(params):
            logits: Any = model.apply(params, x)
            return optax.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        updates, opt_state = tx.update(jax.grad(loss_fn)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for batch in batches(len(images), STEPS, seed=0):
        params, opt_state = step(params, opt_state, images[batch], labels[batch])
    return params


def batches(count: int, steps: int, seed: int) -> jax.Array:
    """Indices of random batches, (steps, 64)."""
    return jax.random.randint(jax.random.key(seed), (steps, 64), 0, count)


def train_student(
    model: Classifier,
    images: jax.Array,
    labels: jax.Array,
    teacher: tuple[Classifier, Any] | None,
) -> Any:
    """Four fifths of the weights removed, the rest in 3 bits; by labels or by a teacher."""
    student = model.init(jax.random.key(1), images[:1])
    params = {"student": student}
    if teacher is not None:
        # The teacher's layer is wider: a learned projection, trained beside the student.
        own = distill.list_features(model.apply, student, images[:1], at=HINT)
        wanted = distill.list_features(teacher[0].apply, teacher[1], images[:1], at=HINT)
        key = jax.random.key(2)
        params["projection"] = distill.init_projection(key, own.shapes[HINT], wanted.shapes[HINT])

    method = jaxcomp.chain(
        prune.gradual(prune.scores.magnitude, prune.cubic(0.8, begin=50, end=250)),
        quantize.train(quantize.Format(3), begin=250),
    )
    tx = jaxcomp.wrap_optimizer(optax.adam(2e-3), jaxcomp.partition({"student/*/kernel": method}))
    opt_state = tx.init(params)

    def loss_fn(params, opt_state, x, y):
        effective = jaxcomp.compressed(params, opt_state)
        logits, own = distill.features(model.apply, effective["student"], x, at=HINT)
        if teacher is None:
            return optax.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        teacher_model, teacher_params = teacher
        soft, wanted = distill.features(teacher_model.apply, teacher_params, x, at=HINT)
        hint = distill.hint_loss(distill.project(effective["projection"], own[HINT]), wanted[HINT])
        # hinton_loss takes labels too; here the teacher is all there is.
        return 16 * distill.kl_divergence(logits, soft, temperature=4.0).mean() + 0.1 * hint.mean()

    @jax.jit
    def step(params, opt_state, x, y):
        grads = jax.grad(loss_fn)(params, opt_state, x, y)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    known = LABELLED if teacher is None else len(images)
    for batch in batches(known, STEPS, seed=3):
        params, opt_state = step(params, opt_state, images[batch], labels[batch])
    return jaxcomp.pack(params, opt_state)["student"]  # the projection stays behind


def main() -> dict[str, float]:
    """Train, ship and load; accuracies by name."""
    images, labels, test_images, test_labels = make_data()
    wide, narrow = Classifier(256), Classifier(32)
    teacher = train_teacher(wide, images, labels)

    def accuracy(model: Classifier, params: Any) -> float:
        logits = jax.jit(model.apply)(params, test_images)
        return float(jnp.mean(jnp.argmax(logits, -1) == test_labels))

    accuracies = {"teacher": accuracy(wide, teacher)}
    for name, guide in (("by 200 labels", None), ("by the teacher", (wide, teacher))):
        packed = train_student(narrow, images, labels, guide)
        size = jaxcomp.save("student.jxc", packed)
        accuracies[name] = accuracy(narrow, jaxcomp.load("student.jxc"))
        print(f"{name:20} {accuracies[name]:.1%}, {size:,} bytes")
    print(f"{'teacher':20} {accuracies['teacher']:.1%}, {jaxcomp.nbytes(teacher):,} bytes")
    return accuracies


if __name__ == "__main__":
    main()
