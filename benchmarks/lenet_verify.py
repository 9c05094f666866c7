"""Load files of lenet.py in this process and print the test error of each, in percent.

    python benchmarks/lenet_verify.py --data-dir DIR FILE ...

Nothing but the file tells what the network is: how many layers, how wide, with which weights.
"""

import argparse

import lenet_models as models

import jaxcomp
from jaxcomp.demo import data as images_lib


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("files", nargs="+")
    parser.add_argument("--data-dir", required=True)
    options = parser.parse_args()
    data = images_lib.load("mnist", options.data_dir)
    for file in options.files:
        print(f"{models.error(models.from_file(jaxcomp.load(file)), data):.2f}")


if __name__ == "__main__":
    main()
