"""How much `import jaxcomp` adds to `import jax, flax, optax`, in fresh processes.

python benchmarks/import_time.py
"""

import argparse
import platform
import statistics
import subprocess
import sys

BASE = "import jax, flax, optax"
PROGRAM = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"


def seconds(statement: str) -> float:
    """Import once in a new process."""
    command = [sys.executable, "-c", PROGRAM.format(statement)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    """Print medians, in turn so that a drifting machine does not favour one of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    seconds(BASE + ", jaxcomp")  # byte-compile and warm the disk cache
    runs = [(seconds(BASE), seconds(BASE + ", jaxcomp")) for _ in range(repeats)]
    base, with_jaxcomp = (statistics.median(column) for column in zip(*runs, strict=True))
    added = statistics.median(b - a for a, b in runs)
    print(f"Python {platform.python_version()}, {repeats} fresh processes each, medians")
    print(f"  {BASE:<32} {base:.3f} s")
    print(f"  {BASE + ', jaxcomp':<32} {with_jaxcomp:.3f} s")
    print(f"  added by jaxcomp (paired)        {added:.3f} s   (target: below 0.2 s)")


if __name__ == "__main__":
    main()
