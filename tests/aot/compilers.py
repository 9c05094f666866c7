"""Compilers for chips that are not there: which are installed, and a process for each to run in.

They come with `pip install -e '.[aot]'` on Linux, and for the GPU with
`pip install --no-deps jax-cuda13-plugin==VERSION jax-cuda13-pjrt==VERSION` of the installed jax.
"""

import importlib.util
import os
import subprocess
import sys

import pytest

TARGETS = {"tpu": "libtpu", "cuda": "jax_plugins.xla_cuda13"}
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def compiled(platform: str, arguments: list[str]) -> str:
    """What a program prints that compiles for a platform; skips the test without its compiler."""
    if not installed(TARGETS[platform]):
        pytest.skip(f"{TARGETS[platform]} is not installed: see tests/aot/compilers.py")
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        # Other tests compile beside this one.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "XLA_FLAGS": "",
    }
    # A process of its own: a compiler of another platform cannot be unloaded.
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
