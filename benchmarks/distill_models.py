"""Students, teachers and the layers that distill.py compares."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from qat_models import ResNet20
from sparsity_models import Decoder

from jaxcomp import distill

IMAGE_LAYERS = tuple(f"ResNet20/Block_{i}" for i in (2, 5, 8))
HEADS = 4


class Setting(NamedTuple):
    """A student, what it is trained on, and what its teacher says.

    Attributes:
        name: of the student, in words.
        run: ``run(params, x) -> (logits, features by name)``, through ``distill.features``.
        plain: ``plain(params, x) -> logits``, the model as it is.
        teach: ``teach(x) -> (logits, features by name)`` of the teacher, to be jitted.
        params: the student's.
        x: inputs.
        y: labels.
        teacher_logits: of ``x``.
        teacher: features of ``x`` by name.
        teacher_size: parameters of the teacher.
    """

    name: str
    run: Callable[..., Any]
    plain: Callable[..., Any]
    teach: Callable[..., Any]
    params: Any
    x: Any
    y: Any
    teacher_logits: Any
    teacher: dict[str, Any]
    teacher_size: int


def setting(
    name: str, student: Any, teacher: Any, x: Any, y: Any, at: Any, **options: Any
) -> Setting:
    own = student.init(jax.random.key(0), x[:1], **options)
    wise = teacher.init(jax.random.key(1), x[:1], **options)

    def plain(params: Any, x: Any) -> Any:
        return student.apply(params, x, **options)

    def wise_plain(params: Any, x: Any) -> Any:
        return teacher.apply(params, x, **options)

    def teach(x: Any) -> Any:
        return distill.features(wise_plain, distill.frozen(wise), x, at=at)

    logits, values = jax.jit(teach)(x)
    return Setting(
        name,
        lambda params, x: distill.features(plain, params, x, at=at),
        plain,
        teach,
        own,
        x,
        y,
        logits,
        values,
        sum(leaf.size for leaf in jax.tree.leaves(wise)),
    )


def images(batch: int) -> Setting:
    """ResNet-20 and one twice as wide, on CIFAR's shapes; BatchNorm as when evaluated."""
    x = jax.random.normal(jax.random.key(2), (batch, 32, 32, 3))
    student, teacher = ResNet20(), ResNet20(widths=(32, 64, 128))
    labels = jnp.arange(batch) % 10
    return setting("ResNet-20", student, teacher, x, labels, IMAGE_LAYERS, train=False)


def text(batch: int, length: int, symbols: int) -> Setting:
    """A language model and one twice as wide and deep."""
    tokens = np.random.default_rng(0).integers(0, symbols, (batch, length + 1))
    x, y = jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:])
    student = Decoder(symbols, width=128, heads=HEADS, depth=2, length=length)
    teacher = Decoder(symbols, width=256, heads=HEADS, depth=4, length=length)
    at = ("Decoder/block?", "*/query/bias", "*/key/bias")
    return setting("language model", student, teacher, x, y, at)
