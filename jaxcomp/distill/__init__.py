"""Distillation: losses that let a student learn from a teacher, as functions on arrays."""

from jaxcomp.distill.features import FeatureList, Features, features, frozen, list_features
from jaxcomp.distill.intermediate.attention_transfer import attention_transfer_loss
from jaxcomp.distill.intermediate.contrastive import (
    ContrastiveMemory,
    contrastive_loss,
    in_batch_contrastive_loss,
    init_contrastive,
    init_memory,
)
from jaxcomp.distill.intermediate.correlation import correlation_congruence_loss
from jaxcomp.distill.intermediate.factor import (
    factor_transfer_loss,
    init_paraphraser,
    init_translator,
    paraphrase,
    paraphrase_loss,
    translate,
)
from jaxcomp.distill.intermediate.flow import flow_loss, flow_matrix
from jaxcomp.distill.intermediate.gram import gram_loss, gram_matrix
from jaxcomp.distill.intermediate.hint import hint_loss
from jaxcomp.distill.intermediate.neuron_selectivity import neuron_selectivity_loss
from jaxcomp.distill.intermediate.probabilistic import probabilistic_transfer_loss
from jaxcomp.distill.intermediate.projection import init_projection, project, resize
from jaxcomp.distill.intermediate.relational import relational_angle_loss, relational_distance_loss
from jaxcomp.distill.intermediate.review import hierarchical_context_loss, init_review, review_loss
from jaxcomp.distill.intermediate.similarity import similarity_preserving_loss
from jaxcomp.distill.intermediate.variational import init_variational, variational_loss
from jaxcomp.distill.language.beams import Beams, beam_search
from jaxcomp.distill.language.cached import TeacherFile, open_teacher, write_teacher
from jaxcomp.distill.language.divergences import jensen_shannon_divergence, reverse_kl_divergence
from jaxcomp.distill.language.sampling import Written, decode_tokens, sample_tokens
from jaxcomp.distill.language.top_logits import TopLogits, top_divergence, top_logits
from jaxcomp.distill.logits.cross_entropy import additive_hinton_loss, entropy, soft_cross_entropy
from jaxcomp.distill.logits.decoupled import decoupled_loss
from jaxcomp.distill.logits.dist import dist_loss
from jaxcomp.distill.logits.ensemble import ensemble_logits, mean_logits
from jaxcomp.distill.logits.hinton import hinton_loss, kl_divergence
from jaxcomp.distill.logits.logit_mse import logit_mse
from jaxcomp.distill.logits.multi_label import binary_kl_divergence, multi_label_loss
from jaxcomp.distill.logits.standardize import standardize_logits
from jaxcomp.distill.transformers.attention_maps import attention_map_loss
from jaxcomp.distill.transformers.hidden_states import hidden_state_loss
from jaxcomp.distill.transformers.layer_maps import layer_map
from jaxcomp.distill.transformers.relations import relation_loss, self_attention_relation

__all__ = [
    "Beams",
    "ContrastiveMemory",
    "FeatureList",
    "Features",
    "TeacherFile",
    "TopLogits",
    "Written",
    "additive_hinton_loss",
    "attention_map_loss",
    "attention_transfer_loss",
    "beam_search",
    "binary_kl_divergence",
    "contrastive_loss",
    "correlation_congruence_loss",
    "decode_tokens",
    "decoupled_loss",
    "dist_loss",
    "ensemble_logits",
    "entropy",
    "factor_transfer_loss",
    "features",
    "flow_loss",
    "flow_matrix",
    "frozen",
    "gram_loss",
    "gram_matrix",
    "hidden_state_loss",
    "hierarchical_context_loss",
    "hint_loss",
    "hinton_loss",
    "in_batch_contrastive_loss",
    "init_contrastive",
    "init_memory",
    "init_paraphraser",
    "init_projection",
    "init_review",
    "init_translator",
    "init_variational",
    "jensen_shannon_divergence",
    "kl_divergence",
    "layer_map",
    "list_features",
    "logit_mse",
    "mean_logits",
    "multi_label_loss",
    "neuron_selectivity_loss",
    "open_teacher",
    "paraphrase",
    "paraphrase_loss",
    "probabilistic_transfer_loss",
    "project",
    "relation_loss",
    "relational_angle_loss",
    "relational_distance_loss",
    "resize",
    "reverse_kl_divergence",
    "review_loss",
    "sample_tokens",
    "self_attention_relation",
    "similarity_preserving_loss",
    "soft_cross_entropy",
    "standardize_logits",
    "top_divergence",
    "top_logits",
    "translate",
    "variational_loss",
    "write_teacher",
]
