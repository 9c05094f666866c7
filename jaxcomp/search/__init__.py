"""Search for architectures and for the choices around them."""

from jaxcomp.search import differentiable, objectives, pareto, proxies, ready, spaces, strategies
from jaxcomp.search.evaluators import evaluator, halving_evaluator
from jaxcomp.search.halving import Halved, successive_halving
from jaxcomp.search.population import Population, population
from jaxcomp.search.spaces import Choice, Continuous, Integer, Repeat
from jaxcomp.search.stacking import groups, stack
from jaxcomp.search.stop import Stop
from jaxcomp.search.strategies.optuna_pruners import optuna_pruner
from jaxcomp.search.study import Study, load, run
from jaxcomp.search.supernets import Subnetwork, Supernet, recalibrate, sandwich, supernet
from jaxcomp.search.trials import Strategy, Trial

__all__ = [
    "Choice",
    "Continuous",
    "Halved",
    "Integer",
    "Population",
    "Repeat",
    "Stop",
    "Strategy",
    "Study",
    "Subnetwork",
    "Supernet",
    "Trial",
    "differentiable",
    "evaluator",
    "groups",
    "halving_evaluator",
    "load",
    "objectives",
    "optuna_pruner",
    "pareto",
    "population",
    "proxies",
    "ready",
    "recalibrate",
    "run",
    "sandwich",
    "spaces",
    "stack",
    "strategies",
    "successive_halving",
    "supernet",
]
