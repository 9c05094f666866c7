"""Spaces of what is often searched for, and what makes the real thing of their candidates.

Plural names make spaces, singular ones the thing that a candidate of theirs stands for. What ends
in ``_numbers`` makes arrays of a candidate and what ends in ``_of`` the thing of such arrays, so
that one vmapped program trains candidates of different kinds side by side.
"""

from jaxcomp.search.ready.compressing import compressions, setting
from jaxcomp.search.ready.descent import (
    OptimizerState,
    optimizer,
    optimizer_numbers,
    optimizer_of,
    optimizers,
)
from jaxcomp.search.ready.menu import Numbers, stack
from jaxcomp.search.ready.networks import Network, cnn, cnns, mlp, mlps
from jaxcomp.search.ready.nonlinearities import (
    activation,
    activation_numbers,
    activation_of,
    activations,
)
from jaxcomp.search.ready.rates import (
    ScheduleNumbers,
    schedule,
    schedule_numbers,
    schedule_of,
    schedules,
)

__all__ = [
    "Network",
    "Numbers",
    "OptimizerState",
    "ScheduleNumbers",
    "activation",
    "activation_numbers",
    "activation_of",
    "activations",
    "cnn",
    "cnns",
    "compressions",
    "mlp",
    "mlps",
    "optimizer",
    "optimizer_numbers",
    "optimizer_of",
    "optimizers",
    "schedule",
    "schedule_numbers",
    "schedule_of",
    "schedules",
    "setting",
    "stack",
]
