"""Load a file of the demo in this process and print how many test images it gets right."""

import argparse

from jaxcomp import checkpoint
from jaxcomp.demo import data, models, training


def main() -> None:
    """``python -m jaxcomp.demo.verify FILE [--data-dir DIR]``."""
    parser = argparse.ArgumentParser(prog="python -m jaxcomp.demo.verify", description=__doc__)
    parser.add_argument("file")
    parser.add_argument("--data-dir")
    arguments = parser.parse_args()
    metadata = checkpoint.inspect(arguments.file).metadata
    model = models.STUDENTS[metadata["model"]]
    images = data.load(metadata["data"], arguments.data_dir)
    # The unmodified model runs on the compressed leaves as they were loaded.
    print(training.correct(model, checkpoint.load(arguments.file), images))


if __name__ == "__main__":
    main()
