"""The losses that distill.py measures, each on the layers that it is meant for."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from distill_models import HEADS, IMAGE_LAYERS, Setting

from jaxcomp import distill

KEY = jax.random.key(3)
LAST = IMAGE_LAYERS[-1]


class Guide(NamedTuple):
    """One loss beside the labels'.

    Attributes:
        name: as in the table.
        loss: ``loss(learned, logits, own, setting arrays) -> scalar``.
        learned: parameters that it trains beside the student.
        reads: what of the model it reads.
    """

    name: str
    loss: Callable[..., Any]
    learned: Any = ()
    reads: str = "logits"


class Wisdom(NamedTuple):
    """What is known of the teacher and the labels in a step."""

    logits: Any
    values: dict[str, Any]
    labels: Any


def logit_guides() -> list[Guide]:
    def on_logits(name: str, loss: Callable[..., Any]) -> Guide:
        return Guide(name, lambda _, logits, own, wise: loss(logits, wise).mean())

    return [
        on_logits("kl_divergence", lambda s, w: distill.kl_divergence(s, w.logits, 4.0)),
        on_logits("hinton_loss", lambda s, w: distill.hinton_loss(s, w.logits, w.labels, 4.0, 0.9)),
        on_logits("soft_cross_entropy", lambda s, w: distill.soft_cross_entropy(s, w.logits, 4.0)),
        on_logits("logit_mse", lambda s, w: distill.logit_mse(s, w.logits)),
        on_logits(
            "decoupled_loss", lambda s, w: distill.decoupled_loss(s, w.logits, w.labels, 4.0)
        ),
        on_logits("dist_loss", lambda s, w: distill.dist_loss(s, w.logits, 4.0)),
        on_logits(
            "standardized, KL",
            lambda s, w: distill.kl_divergence(
                distill.standardize_logits(s), distill.standardize_logits(w.logits)
            ),
        ),
    ]


def image_guides(setting: Setting, own: dict[str, Any]) -> list[Guide]:
    """Losses between feature maps; ``own`` has the student's shapes."""
    wise = setting.teacher
    students, teachers = ([values[layer] for layer in IMAGE_LAYERS] for values in (own, wise))

    def on_maps(name: str, loss: Callable[..., Any], learned: Any = ()) -> Guide:
        def all_layers(learned: Any, logits: Any, own: Any, wisdom: Wisdom) -> Any:
            losses = [
                loss(learned[i] if learned else None, own[layer], wisdom.values[layer]).mean()
                for i, layer in enumerate(IMAGE_LAYERS)
            ]
            return sum(losses)

        return Guide(name, all_layers, learned, "3 maps")

    def on_last(name: str, loss: Callable[..., Any], learned: Any = ()) -> Guide:
        def last(learned: Any, logits: Any, own: Any, wisdom: Wisdom) -> Any:
            return loss(learned, own[LAST].mean((1, 2)), wisdom.values[LAST].mean((1, 2))).mean()

        return Guide(name, last, learned, "pooled")

    pairs = list(zip(students, teachers, strict=True))
    projections = [distill.init_projection(KEY, s, t) for s, t in pairs]
    variational = [distill.init_variational(KEY, s, t) for s, t in pairs]
    paraphrasers = [distill.init_paraphraser(KEY, t) for t in teachers]
    factors = [
        jax.eval_shape(distill.paraphrase, p, t)
        for p, t in zip(paraphrasers, teachers, strict=True)
    ]
    translators = [
        distill.init_translator(KEY, s, f) for s, f in zip(students, factors, strict=True)
    ]

    def flow(learned: Any, logits: Any, own: Any, wisdom: Wisdom) -> Any:
        wide = [
            distill.project(projection, own[layer])
            for projection, layer in zip(learned, IMAGE_LAYERS, strict=True)
        ]
        wise = [wisdom.values[layer] for layer in IMAGE_LAYERS]
        return sum(
            distill.flow_loss(
                (_pooled_to(wide[i], wide[i + 1]), wide[i + 1]),
                (_pooled_to(wise[i], wise[i + 1]), wise[i + 1]),
            ).mean()
            for i in range(len(IMAGE_LAYERS) - 1)
        )

    def factor(learned: Any, logits: Any, own: Any, wisdom: Wisdom) -> Any:
        return sum(
            distill.factor_transfer_loss(
                distill.translate(translator, own[layer]),
                distill.paraphrase(paraphraser, wisdom.values[layer]),
            ).mean()
            for translator, paraphraser, layer in zip(
                learned, paraphrasers, IMAGE_LAYERS, strict=True
            )
        )

    def review(learned: Any, logits: Any, own: Any, wisdom: Wisdom) -> Any:
        return distill.review_loss(
            learned,
            [own[layer] for layer in IMAGE_LAYERS],
            [wisdom.values[layer] for layer in IMAGE_LAYERS],
        ).mean()

    pooled = (jnp.ones((1, students[-1].shape[-1])), jnp.ones((1, teachers[-1].shape[-1])))
    return [
        on_maps(
            "hint_loss", lambda p, s, t: distill.hint_loss(distill.project(p, s), t), projections
        ),
        on_maps("attention_transfer_loss", lambda _, s, t: distill.attention_transfer_loss(s, t)),
        on_maps(
            "gram_loss", lambda p, s, t: distill.gram_loss(distill.project(p, s), t), projections
        ),
        Guide("flow_loss", flow, projections, "3 maps"),
        on_maps("neuron_selectivity_loss", lambda _, s, t: distill.neuron_selectivity_loss(s, t)),
        on_maps(
            "similarity_preserving_loss", lambda _, s, t: distill.similarity_preserving_loss(s, t)
        ),
        on_maps("variational_loss", distill.variational_loss, variational),
        Guide("factor_transfer_loss", factor, translators, "3 maps"),
        Guide("review_loss", review, distill.init_review(KEY, students, teachers, 32), "3 maps"),
        on_last("relational_distance_loss", lambda _, s, t: distill.relational_distance_loss(s, t)),
        on_last("relational_angle_loss", lambda _, s, t: distill.relational_angle_loss(s, t)),
        on_last(
            "probabilistic_transfer_loss", lambda _, s, t: distill.probabilistic_transfer_loss(s, t)
        ),
        on_last(
            "correlation_congruence_loss", lambda _, s, t: distill.correlation_congruence_loss(s, t)
        ),
        on_last(
            "in_batch_contrastive_loss",
            distill.in_batch_contrastive_loss,
            distill.init_contrastive(KEY, *pooled),
        ),
    ]


def _pooled_to(features: Any, like: Any) -> Any:
    return distill.resize(features, like.shape[1:3])


def text_guides(setting: Setting, own: dict[str, Any]) -> list[Guide]:
    """Losses for language models."""
    layers = dict(zip((0, 1), distill.layer_map(2, 4), strict=True))
    projections = [
        distill.init_projection(KEY, own[f"Decoder/block{a}"], setting.teacher[f"Decoder/block{b}"])
        for a, b in layers.items()
    ]

    def hidden(learned: Any, logits: Any, own: Any, wisdom: Wisdom) -> Any:
        return sum(
            distill.hidden_state_loss(
                distill.project(projection, own[f"Decoder/block{a}"]),
                wisdom.values[f"Decoder/block{b}"],
            ).mean()
            for projection, (a, b) in zip(learned, layers.items(), strict=True)
        )

    def relations(_: Any, logits: Any, own: Any, wisdom: Wisdom) -> Any:
        return sum(
            distill.relation_loss(
                own[f"params/block1/{name}/bias"],
                wisdom.values[f"params/block3/{name}/bias"],
                HEADS,
            ).mean()
            for name in ("query", "key")
        )

    def tokens(name: str, loss: Callable[..., Any]) -> Guide:
        return Guide(name, lambda _, logits, own, wise: loss(logits, wise.logits).mean())

    return [
        tokens("reverse_kl_divergence", distill.reverse_kl_divergence),
        tokens("jensen_shannon_divergence", distill.jensen_shannon_divergence),
        Guide("hidden_state_loss", hidden, projections, "2 layers"),
        Guide("relation_loss", relations, (), "queries, keys"),
    ]
