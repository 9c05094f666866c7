"""Losses between layers of transformers, and which layer learns from which."""

from jaxcomp.distill.transformers.attention_maps import attention_map_loss
from jaxcomp.distill.transformers.hidden_states import hidden_state_loss
from jaxcomp.distill.transformers.layer_maps import layer_map
from jaxcomp.distill.transformers.relations import relation_loss, self_attention_relation

__all__ = [
    "attention_map_loss",
    "hidden_state_loss",
    "layer_map",
    "relation_loss",
    "self_attention_relation",
]
