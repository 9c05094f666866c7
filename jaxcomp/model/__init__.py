"""See a model through its jaxpr: what it costs, what its weights meet, which channels it ties."""

from jaxcomp.model import statistics
from jaxcomp.model.accelerated import Accelerated, accelerate
from jaxcomp.model.couple import ChannelGroup, Slice, couple
from jaxcomp.model.observe import Observed, observe
from jaxcomp.model.rewrite import rewrite
from jaxcomp.model.trace import ModelTrace, trace

__all__ = [
    "Accelerated",
    "ChannelGroup",
    "ModelTrace",
    "Observed",
    "Slice",
    "accelerate",
    "couple",
    "observe",
    "rewrite",
    "statistics",
    "trace",
]
