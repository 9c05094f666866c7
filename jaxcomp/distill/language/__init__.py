"""Losses for language models, teachers kept in files, and text that students write themselves."""

from jaxcomp.distill.language.beams import Beams, beam_search
from jaxcomp.distill.language.cached import TeacherFile, open_teacher, write_teacher
from jaxcomp.distill.language.divergences import jensen_shannon_divergence, reverse_kl_divergence
from jaxcomp.distill.language.sampling import Written, decode_tokens, sample_tokens
from jaxcomp.distill.language.top_logits import TopLogits, top_divergence, top_logits

__all__ = [
    "Beams",
    "TeacherFile",
    "TopLogits",
    "Written",
    "beam_search",
    "decode_tokens",
    "jensen_shannon_divergence",
    "open_teacher",
    "reverse_kl_divergence",
    "sample_tokens",
    "top_divergence",
    "top_logits",
    "write_teacher",
]
