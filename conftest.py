"""Set up before anything imports jax: fake devices, and run-time checks of every signature."""

import os
from importlib.metadata import version

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the suite's time is the compiler's, on programs that run once: so it may be quick rather
# than good. Whoever sets XLA_FLAGS, even to nothing, gets the programs that users get. Compilers
# from 0.11 on have one emitter of fused loops, and do not know the second flag.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0"
    + (" --xla_cpu_use_fusion_emitters=false" if version("jaxlib") < "0.11" else ""),
)
os.environ["XLA_FLAGS"] = (
    os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8"
).strip()
# The suite compiles many small programs more than once: its workers share what each has compiled.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", os.path.join(os.path.dirname(__file__), ".pytest_cache", "xla")
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
# Otherwise where the cache lies is part of every key in it, and a moved or copied one is never hit.
os.environ["JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES"] = "none"

from tests import typechecker

typechecker.install("jaxcomp")

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

settings.register_profile("default", deadline=None, max_examples=30)
settings.load_profile("default")

# JAX keeps the last 2,048 programs it lowered, each in a compiler context of 3 MB, and each one
# kept makes the next slower to compile: by half after 1,000. What is forgotten here and met again
# is traced again, and read back from the cache on disk.
KEPT_PROGRAMS = 1000
_programs: list[float] = []


def _count_program(event: str, seconds: float, **_: object) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _programs.append(seconds)


jax.monitoring.register_event_duration_secs_listener(_count_program)


def pytest_runtest_logfinish() -> None:
    """Between two tests, forget the programs of those before."""
    if len(_programs) > KEPT_PROGRAMS:
        _programs.clear()
        jax.clear_caches()


@pytest.fixture
def unchecked():
    """Without the run-time type checks that only the test suite has: users meet our own."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
