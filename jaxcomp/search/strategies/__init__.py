"""What proposes candidates: each strategy is three pure functions, see ``search.Strategy``."""

from jaxcomp.search.strategies.evolution import evolution
from jaxcomp.search.strategies.greedy import greedy
from jaxcomp.search.strategies.grid import grid
from jaxcomp.search.strategies.netadapt import netadapt
from jaxcomp.search.strategies.nsga2 import nsga2
from jaxcomp.search.strategies.optuna import optuna, optuna_trials
from jaxcomp.search.strategies.random import random

__all__ = ["evolution", "greedy", "grid", "netadapt", "nsga2", "optuna", "optuna_trials", "random"]
