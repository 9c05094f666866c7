"""The losses alone, value and gradient, beside PyTorch's and torchdistill's."""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from prune import by_turns, ratio
from rich.table import Table

from jaxcomp import distill

LOGITS = (4096, 1000)
MAPS = (64, 16, 16, 64)
VECTORS = (256, 512)


class Duel(NamedTuple):
    """One loss.

    Attributes:
        name: ours.
        shape: of student and teacher.
        loss: ours, of (student, teacher), a number an example.
        peers: by library: for ``"optax"`` the same function, for the others a function that makes
            it of ``(torch, torchdistill.losses.mid_level)``.
    """

    name: str
    shape: tuple[int, ...]
    loss: Callable[..., Any]
    peers: dict[str, Callable[..., Any]]


def _optax_kl(student: Any, teacher: Any) -> Any:
    log_student, log_teacher = (jax.nn.log_softmax(x / 4.0) for x in (student, teacher))
    return optax.losses.kl_divergence_with_log_targets(log_student, log_teacher)


def _torch_kl(torch: Any, _: Any) -> Any:
    f = torch.nn.functional

    def loss(student: Any, teacher: Any) -> Any:
        log_student, log_teacher = (f.log_softmax(x / 4.0, -1) for x in (student, teacher))
        return f.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)

    return loss


def _torch_mse(torch: Any, _: Any) -> Any:
    return torch.nn.functional.mse_loss


def _module(make: Callable[[Any], Any]) -> Any:
    """A loss of torchdistill: it takes dictionaries of what its hooks have caught."""

    def build(_: Any, losses: Any) -> Any:
        module = make(losses)
        return lambda s, t: module({"at": {"output": s}}, {"at": {"output": t}})

    return build


_AT = {"pair": {side: {"path": "at", "io": "output"} for side in ("student", "teacher")}}
_GAUSSIAN = {"type": "gaussian", "gamma": 0.4, "max_p": 2}
attention = _module(lambda m: m.ATLoss(_AT, mode="paper"))
similarity = _module(lambda m: m.SPKDLoss("at", "at", "batchmean"))
distance = _module(lambda m: m.RKDLoss("at", "at", dist_factor=1, angle_factor=0, reduction="mean"))
angle = _module(lambda m: m.RKDLoss("at", "at", dist_factor=0, angle_factor=1, reduction="mean"))
probabilistic = _module(lambda m: m.PKTLoss("at", "output", "at", "output"))
congruence = _module(lambda m: m.CCKDLoss("at", "at", _GAUSSIAN, "batchmean"))
dist = _module(lambda m: m.DISTLoss("at", "output", "at", "output"))


DUELS = (
    Duel(
        "kl_divergence",
        LOGITS,
        lambda s, t: distill.kl_divergence(s, t, 4.0),
        {"optax": _optax_kl, "torch": _torch_kl},
    ),
    Duel(
        "reverse_kl_divergence", LOGITS, lambda s, t: distill.reverse_kl_divergence(s, t, 4.0), {}
    ),
    Duel(
        "jensen_shannon_divergence",
        LOGITS,
        lambda s, t: distill.jensen_shannon_divergence(s, t, 4.0),
        {},
    ),
    Duel("logit_mse", LOGITS, distill.logit_mse, {"torch": _torch_mse}),
    Duel("dist_loss", LOGITS, distill.dist_loss, {"torchdistill": dist}),
    Duel("hint_loss", MAPS, distill.hint_loss, {"torch": _torch_mse}),
    Duel(
        "attention_transfer_loss",
        MAPS,
        distill.attention_transfer_loss,
        {"torchdistill": attention},
    ),
    Duel("neuron_selectivity_loss", MAPS, distill.neuron_selectivity_loss, {}),
    Duel(
        "similarity_preserving_loss",
        MAPS,
        distill.similarity_preserving_loss,
        {"torchdistill": similarity},
    ),
    Duel(
        "relational_distance_loss",
        VECTORS,
        distill.relational_distance_loss,
        {"torchdistill": distance},
    ),
    Duel("relational_angle_loss", VECTORS, distill.relational_angle_loss, {"torchdistill": angle}),
    Duel(
        "probabilistic_transfer_loss",
        VECTORS,
        distill.probabilistic_transfer_loss,
        {"torchdistill": probabilistic},
    ),
    Duel(
        "correlation_congruence_loss",
        VECTORS,
        distill.correlation_congruence_loss,
        {"torchdistill": congruence},
    ),
)


def alone(rounds: int, bandwidth: float) -> Table:
    """Value and gradient of the mean over examples, in the student."""
    torch, losses = _torch()
    calls: dict[str, Callable[[], Any]] = {}
    rows: list[tuple[str, str, Duel]] = []
    for duel in DUELS:
        rng = np.random.default_rng(0)
        student, teacher = rng.normal(size=(2, *duel.shape)).astype(np.float32)
        ways = {"jaxcomp": duel.loss}
        ways |= {name: peer for name, peer in duel.peers.items() if name == "optax"}
        for library, loss in ways.items():
            step = jax.jit(jax.value_and_grad(lambda s, t, loss=loss: loss(s, t).mean()))
            inputs = jnp.asarray(student), jnp.asarray(teacher)
            calls[f"{duel.name} {library}"] = lambda step=step, inputs=inputs: step(*inputs)
            rows.append((duel.name, library, duel))
        for library in ("torch", "torchdistill"):
            have = torch is not None if library == "torch" else losses is not None
            if library in duel.peers and have:
                loss = duel.peers[library](torch, losses)
                calls[f"{duel.name} {library}"] = _torch_call(torch, loss, student, teacher)
                rows.append((duel.name, library, duel))
    times = by_turns(calls, rounds)
    table = Table(title="The losses alone: value and gradient in the student")
    for heading in ("loss", "shape", "library", "ms", "× ours", "× limit"):
        table.add_column(heading, justify="left" if len(table.columns) < 3 else "right")
    for name, library, duel in rows:
        own = times[f"{name} {library}"]
        limit = 3 * 4 * float(np.prod(duel.shape)) / bandwidth
        table.add_row(
            name if library == "jaxcomp" else "",
            " × ".join(map(str, duel.shape)) if library == "jaxcomp" else "",
            library,
            f"{1e3 * own.wall:.2f}",
            f"{ratio(own, times[f'{name} jaxcomp']):.2f}",
            f"{own.wall / limit:.1f}",
        )
    return table


def _torch() -> tuple[Any, Any]:
    """PyTorch and torchdistill's losses, or None for what is not installed."""
    try:
        torch: Any = importlib.import_module("torch")
    except ImportError:
        return None, None
    try:
        return torch, importlib.import_module("torchdistill.losses.mid_level")
    except ImportError:
        return torch, None


def _torch_call(torch: Any, loss: Any, student: np.ndarray, teacher: np.ndarray) -> Any:
    if student.ndim == 4:  # Channels first there.
        student, teacher = (np.moveaxis(x, -1, 1).copy() for x in (student, teacher))
    own: Any = torch.tensor(student, requires_grad=True)
    wise: Any = torch.tensor(teacher)

    def call() -> Any:
        own.grad = None
        loss(own, wise).backward()
        gradient: Any = own.grad
        return gradient.numpy()

    return call
