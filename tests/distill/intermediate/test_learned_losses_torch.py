"""Losses with learned parts beside torchdistill's: values and gradients."""

import functools

import jax
import numpy as np
import pytest

from jaxcomp.distill.intermediate.contrastive import contrastive_loss, init_memory
from jaxcomp.distill.intermediate.factor import (
    factor_transfer_loss,
    init_paraphraser,
    paraphrase,
    paraphrase_loss,
)
from jaxcomp.distill.intermediate.review import (
    hierarchical_context_loss,
    init_review,
    review_loss,
)
from jaxcomp.distill.intermediate.variational import init_variational, variational_loss

pytestmark = pytest.mark.slow
torch = pytest.importorskip("torch")
losses = pytest.importorskip("torchdistill.losses.mid_level")


def arrays(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def theirs(x, channels_first=True):
    x = np.moveaxis(x, -1, 1) if channels_first else x
    return torch.tensor(np.ascontiguousarray(x), requires_grad=True)


def ours(x, channels_first=True):
    x = x.detach().numpy()
    return np.moveaxis(x, 1, -1) if channels_first else x


def outputs(**modules):
    return {path: {"output": value} for path, value in modules.items()}


def close(actual, expected, rtol=1e-4, atol=1e-5):
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol)


def mean_and_gradients(loss, *args):
    return jax.jit(jax.value_and_grad(lambda *args: loss(*args).mean(), tuple(range(len(args)))))(
        *args
    )


def test_variational():
    student, teacher = arrays((2, 4, 4, 3), (2, 4, 4, 5))
    params = init_variational(jax.random.key(0), student, teacher)
    params["raw_variance"] = params["raw_variance"] + arrays((5,))[0]
    s, t = theirs(student), theirs(teacher)
    kernel = torch.tensor(np.asarray(params["projection"]["kernel"]), requires_grad=True)
    raw = torch.tensor(np.asarray(params["raw_variance"]), requires_grad=True)
    mean = torch.einsum("bchw,cd->bdhw", s, kernel)
    variance = (torch.nn.functional.softplus(raw) + 1e-5).view(1, -1, 1, 1)
    pair = {"student": {"io": "output", "path": "s"}, "teacher": {"io": "output", "path": "t"}}
    loss = losses.VIDLoss({"pair": pair})
    value = loss({"s": {"output": (mean, variance)}}, outputs(t=t))
    value.backward()
    actual, (of_params, of_student, of_teacher) = mean_and_gradients(
        variational_loss, params, student, teacher
    )
    close(actual, value.item())
    close(of_student, ours(s.grad))
    close(of_teacher, ours(t.grad))
    close(of_params["projection"]["kernel"], kernel.grad.numpy())
    close(of_params["raw_variance"], raw.grad.numpy())


@pytest.mark.parametrize("order", [1, 2])
def test_factor_transfer(order):
    student, teacher = arrays((3, 4, 4, 2), (3, 4, 4, 2))
    s, t = theirs(student), theirs(teacher)
    value = losses.FTLoss(p=order)(outputs(translator=s), outputs(paraphraser=t))
    value.backward()
    loss = functools.partial(factor_transfer_loss, order=order)
    actual, gradients = mean_and_gradients(loss, student, teacher)
    constant = 32 if order == 1 else 1  # theirs is the mean of the absolute differences
    close(actual / constant, value.item())
    for gradient, x in zip(gradients, (s, t), strict=True):
        close(gradient / constant, ours(x.grad))


def test_paraphraser():
    wrapper = pytest.importorskip("torchdistill.models.wrapper", exc_type=ImportError)
    (teacher,) = arrays((2, 5, 5, 4))
    params = init_paraphraser(jax.random.key(0), teacher)
    module = wrapper.Paraphraser4FactorTransfer(0.5, 4, uses_bn=False)
    with torch.no_grad():
        for layers, part in ((module.encoder, "encoder"), (module.decoder, "decoder")):
            convolutions = [layer for layer in layers if hasattr(layer, "weight")]
            for layer, made in zip(convolutions, params[part], strict=True):
                weight = torch.tensor(np.asarray(made["kernel"])).permute(3, 2, 0, 1)
                if part == "decoder":  # transposed: turned around, from outputs to inputs
                    weight = weight.transpose(0, 1).flip(2, 3)
                layer.weight.copy_(weight)
                layer.bias.zero_()
    t = theirs(teacher)
    close(paraphrase(params, teacher), ours(module.encoder(t)))
    value = torch.nn.functional.mse_loss(module(t), t)
    value.backward()
    actual, (_, gradient) = mean_and_gradients(paraphrase_loss, params, teacher)
    close(actual, value.item())
    close(gradient, ours(t.grad))


def test_contrastive_over_two_calls():
    batch, count, features = 4, 12, 3
    memory = init_memory(jax.random.key(0), count, features)
    loss = losses.CRDLoss("s", "empty", "t", features, count, 6, count, 0.3, 0.5)
    loss.memory_v1.copy_(torch.tensor(np.asarray(memory.student)))
    loss.memory_v2.copy_(torch.tensor(np.asarray(memory.teacher)))
    rng = np.random.default_rng(0)
    eye = {"kernel": np.eye(features, dtype=np.float32)}
    heads = {"student": eye, "teacher": eye}
    for seed in range(2):
        student, teacher = arrays((batch, features), (batch, features), seed=seed)
        indices, others = rng.permutation(count)[:batch], rng.integers(0, count, (batch, 6))
        s, t = theirs(student, False), theirs(teacher, False)
        unit = [x / x.norm(dim=1, keepdim=True) for x in (s, t)]
        chosen = torch.tensor(np.concatenate([indices[:, None], others], 1))
        sample = {"pos_idx": torch.tensor(indices), "contrast_idx": chosen}
        value = loss({"s": {"output": unit[0]}, "empty": {"input": sample}}, outputs(t=unit[1]))
        value.backward()

        def mean(student, teacher, memory=memory, indices=indices, others=others):
            options = {"negatives": others, "temperature": 0.3}
            made, memory = contrastive_loss(
                heads, memory, student, teacher, indices, None, **options
            )
            return made.mean(), memory

        made = jax.value_and_grad(mean, (0, 1), has_aux=True)(student, teacher)
        (actual, memory), gradients = made
        close(actual, value.item())
        for gradient, x in zip(gradients, (s, t), strict=True):
            close(gradient, x.grad.numpy())
        close(memory.student, loss.memory_v1.numpy())
        close(memory.teacher, loss.memory_v2.numpy())
        constants = count * np.exp(np.asarray(memory.log_means))
        close(constants, loss.params[2:4].detach().numpy())


@pytest.mark.parametrize("size", [1, 2, 4, 7, 8])
def test_hierarchical_context(size):
    student, teacher = arrays((2, size, size, 3), (2, size, size, 3))
    s, t = theirs(student), theirs(teacher)
    value = losses.HierarchicalContextLoss("s", "output", "t", "output")(
        {"s": {"output": (s, None)}}, outputs(t=t)
    )
    value.backward()
    actual, gradients = mean_and_gradients(hierarchical_context_loss, student, teacher)
    close(actual, value.item())
    for gradient, x in zip(gradients, (s, t), strict=True):
        close(gradient, ours(x.grad))


def test_review():
    wrapper = pytest.importorskip("torchdistill.models.wrapper", exc_type=ImportError)
    sizes, narrow, wide, width = (8, 4, 2), (2, 3, 4), (3, 4, 5), 4
    students = arrays(*[(2, n, n, c) for n, c in zip(sizes, narrow, strict=True)])
    teachers = arrays(*[(2, n, n, c) for n, c in zip(sizes, wide, strict=True)], seed=1)
    params = init_review(jax.random.key(0), students, teachers, width)
    inputs, deeper, total = [theirs(x) for x in students], None, 0
    for i in reversed(range(3)):
        fusion = wrapper.AttentionBasedFusion(narrow[i], width, wide[i], uses_attention=i < 2)
        parts = {"narrow": fusion.conv1, "widen": fusion.conv2, "attention": fusion.attention_conv}
        for name, made in params[i].items():
            kernel = torch.tensor(np.asarray(made["kernel"])).permute(3, 2, 0, 1)
            parts[name][0].weight.data.copy_(kernel)
            if parts[name][0].bias is not None:
                parts[name][0].bias.data.zero_()
        fusion.conv1[1] = fusion.conv2[1] = torch.nn.Identity()  # no batch normalisation here
        fused, deeper = fusion(inputs[i], deeper, sizes[i])
        context = losses.HierarchicalContextLoss("s", "output", "t", "output")
        teacher = theirs(teachers[i])
        total = total + context({"s": {"output": (fused, deeper)}}, outputs(t=teacher))
    total.backward()
    actual, (_, gradients, _) = mean_and_gradients(review_loss, params, students, teachers)
    close(actual, total.item())
    for gradient, x in zip(gradients, inputs, strict=True):
        close(gradient, ours(x.grad))
