"""See a model through its jaxpr: what it costs, what its weights meet, which channels it ties."""

from jaxcomp.model import statistics
from jaxcomp.model.couple import ChannelGroup, Slice, couple
from jaxcomp.model.observe import Observed, observe
from jaxcomp.model.rewrite import rewrite
from jaxcomp.model.trace import ModelTrace, trace

__all__ = [
    "ChannelGroup",
    "ModelTrace",
    "Observed",
    "Slice",
    "couple",
    "observe",
    "rewrite",
    "statistics",
    "trace",
]
