"""The losses between layers beside torchdistill's: values and gradients, constants apart."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.distill.intermediate.attention_transfer import attention_transfer_loss
from jaxcomp.distill.intermediate.correlation import correlation_congruence_loss
from jaxcomp.distill.intermediate.flow import flow_loss, flow_matrix
from jaxcomp.distill.intermediate.hint import hint_loss
from jaxcomp.distill.intermediate.probabilistic import probabilistic_transfer_loss
from jaxcomp.distill.intermediate.relational import (
    relational_angle_loss,
    relational_distance_loss,
)
from jaxcomp.distill.intermediate.similarity import similarity_preserving_loss

pytestmark = pytest.mark.slow
torch = pytest.importorskip("torch")
theirs = pytest.importorskip("torchdistill.losses.mid_level")

BATCH = 6
NAMES = {"io": "output", "path": "layer"}


def arrays(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def layer(x):
    return {"layer": {"output": x}}


def check(ours, other, student, teacher, teacher_gradient=True, rtol=1e-6):
    """Values and gradients in float64; ``other`` takes channels first, as torch does."""
    with jax.enable_x64(True):
        value, gradients = jax.value_and_grad(ours, (0, 1))(student, teacher)
        value, gradients = jax.device_get((value, gradients))
    inputs = [torch.tensor(x, requires_grad=True) for x in (student, teacher)]
    expected = other(*(x.movedim(-1, 1) for x in inputs))
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=rtol)
    for x, gradient in list(zip(inputs, gradients, strict=True))[: 1 + teacher_gradient]:
        wanted = x.grad.numpy()
        np.testing.assert_allclose(
            gradient, wanted, rtol=10 * rtol, atol=rtol * np.abs(wanted).max()
        )


MAPS = arrays(BATCH, 4, 3, 5), arrays(BATCH, 4, 3, 7, seed=1)
ROWS = arrays(BATCH, 5), arrays(BATCH, 7, seed=1)


def test_hint_is_the_mean_squared_error():
    student, teacher = MAPS[0], MAPS[1][..., :5]
    check(lambda *pair: hint_loss(*pair).mean(), torch.nn.functional.mse_loss, student, teacher)


@pytest.mark.parametrize(("mode", "squared"), [("paper", False), ("code", True)])
def test_attention_transfer(mode, squared):
    loss = theirs.ATLoss({"pair": {"student": NAMES, "teacher": NAMES}}, mode=mode)
    check(
        lambda *pair: attention_transfer_loss(*pair, squared=squared).mean(),
        lambda s, t: loss(layer(s), layer(t)),
        *MAPS,
    )


def test_flow_matrix_and_loss():
    student, teacher = MAPS[0], MAPS[1][..., :5]
    matrix = theirs.FSPLoss.compute_fsp_matrix
    check(
        lambda s, t: (flow_matrix(s, t) ** 3).sum(), lambda s, t: (matrix(s, t) ** 3).sum(), *MAPS
    )
    # Theirs adds up Euclidean norms of columns, the paper squares: the sum of matrices' squares.
    check(
        lambda s, t: flow_loss((s[..., :2], s[..., 2:]), (t[..., :2], t[..., 2:])).mean(),
        lambda s, t: ((matrix(s[:, :2], s[:, 2:]) - matrix(t[:, :2], t[:, 2:])) ** 2).sum() / BATCH,
        student,
        teacher,
    )


def test_similarity_preserving(monkeypatch):
    # Theirs takes its 1, meant for the axis, for the order of the norm: the paper's is 2.
    monkeypatch.setattr(theirs, "normalize", lambda x, _: torch.nn.functional.normalize(x))
    loss = theirs.SPKDLoss("layer", "layer", "batchmean")
    check(
        lambda *pair: similarity_preserving_loss(*pair).mean(),
        lambda s, t: loss(layer(s), layer(t)),
        *ROWS,
    )


@pytest.mark.parametrize("chunk", [None, 4])
def test_relational(chunk):
    # Theirs also counts pairs and triplets that hold an example twice, whose loss is 0.
    distance = theirs.RKDLoss("layer", "layer", 1.0, 0.0, "mean")
    check(
        lambda *pair: relational_distance_loss(*pair, chunk=chunk).mean() * (BATCH - 1) / BATCH,
        lambda s, t: distance(layer(s), layer(t)),
        *ROWS,
        teacher_gradient=False,
    )
    angle = theirs.RKDLoss("layer", "layer", 0.0, 1.0, "mean")
    share = (BATCH - 1) * (BATCH - 2) / BATCH**2
    check(
        lambda *pair: relational_angle_loss(*pair, chunk=chunk).mean() * share,
        lambda s, t: angle(layer(s), layer(t)),
        *ROWS,
        teacher_gradient=False,
    )


def test_probabilistic_transfer():
    loss = theirs.PKTLoss("layer", "output", "layer", "output", eps=0.0)

    def other(student, teacher):
        """Theirs is a mean over pairs, of neighbourhoods that an example is part of itself."""
        return loss(layer(student), layer(teacher)) * BATCH

    def with_itself(student, teacher):
        """Ours, of each example and a twin of it, which takes the part of itself in theirs."""
        shares = []
        for i in range(BATCH):
            twins = [jnp.concatenate([x, x[i : i + 1]]) for x in (student, teacher)]
            shares.append(probabilistic_transfer_loss(*twins)[i])
        return sum(shares) / BATCH

    check(with_itself, other, *ROWS)


@pytest.mark.parametrize("kernel", ["gaussian", "bilinear"])
def test_correlation_congruence(kernel):
    config = {"type": kernel, "gamma": 0.3, "max_p": 3}
    loss = theirs.CCKDLoss("layer", "layer", config, "sum")
    student, teacher = ROWS
    ours = functools.partial(correlation_congruence_loss, gamma=0.3, order=3)
    if kernel == "bilinear":
        ours = functools.partial(correlation_congruence_loss, kernel="linear")
    unit = functools.partial(torch.nn.functional.normalize, dim=1)
    # Theirs is the norm where the paper squares it.
    check(
        lambda *pair: ours(*pair).mean(),
        lambda s, t: loss(layer(unit(s)), layer(unit(t))) ** 2 / BATCH**2,
        student,
        teacher,
    )
