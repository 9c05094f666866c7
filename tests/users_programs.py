"""Programs as users get them, where the suite's compiler flags make others."""

import functools
from importlib.metadata import version

import jax

# The defaults of what conftest.py sets for speed.
_OPTIONS = {"xla_backend_optimization_level": 3} | (
    {"xla_cpu_use_fusion_emitters": True} if version("jaxlib") < "0.11" else {}
)
users_jit = functools.partial(jax.jit, compiler_options=_OPTIONS)
