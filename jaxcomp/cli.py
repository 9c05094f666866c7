"""The shell's door: ``jaxcomp demo`` and ``jaxcomp inspect``."""

import argparse
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; those of the process by default.

    Returns:
        Exit status: 0, 1 where something failed, 130 where it was interrupted. Bad arguments exit
        with 2.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help()
        return 0
    try:
        return arguments.command(arguments, parser)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    import jaxcomp

    parser = argparse.ArgumentParser(
        prog="jaxcomp", description="Make JAX neural networks smaller and faster."
    )
    parser.add_argument("--version", action="version", version=f"jaxcomp {jaxcomp.__version__}")
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="compress a real model and print what it cost",
        description="Train a teacher and a student on real images; distil, prune, share and "
        "quantize the student; write the smallest file and check it in a new process.",
    )
    demo.add_argument("--data", choices=("digits", "mnist"), default="digits")
    demo.add_argument("--data-dir", metavar="DIR", help="where MNIST's IDX files are")
    demo.add_argument(
        "--model",
        choices=("cnn", "lenet-300-100", "lenet-5"),
        help="network (default: cnn for digits, lenet-300-100 for mnist)",
    )
    demo.add_argument(
        "--seeds", type=_at_least(1), default=None, metavar="N", help="default 5; 1 for mnist"
    )
    demo.add_argument(
        "--epochs", type=_at_least(1), metavar="N", help="passes over the data in each stage"
    )
    demo.add_argument(
        "--sparsity",
        type=_fraction,
        default=0.9,
        metavar="S",
        help="fraction removed (default 0.9)",
    )
    demo.add_argument(
        "--output",
        type=pathlib.Path,
        default=pathlib.Path("jaxcomp-demo.jxc"),
        metavar="FILE",
        help="the compressed file (default jaxcomp-demo.jxc)",
    )
    demo.set_defaults(command=_demo)
    inspect = commands.add_parser(
        "inspect", help="print what a .jxc file holds", description="Print a table of the leaves."
    )
    inspect.add_argument("file", type=pathlib.Path, metavar="FILE")
    inspect.set_defaults(command=_inspect)
    return parser


def _at_least(least: int) -> Any:
    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is below {least}")
        return value

    return number


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a fraction in [0, 1): 0.9 removes 90%")
    return value


def _inspect(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    del parser
    from rich.console import Console

    from jaxcomp import checkpoint, report

    try:
        inspection = checkpoint.inspect(arguments.file)
    except (checkpoint.CheckpointError, OSError) as error:
        print(f"jaxcomp inspect: {error}", file=sys.stderr)
        return 1
    console = Console()
    console.print(report.leaf_table(inspection))
    for name, value in inspection.metadata.items():
        console.print(f"{name}: {value}", markup=False)
    return 0


def _demo(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from rich.console import Console

    from jaxcomp import report
    from jaxcomp.demo import data as demo_data
    from jaxcomp.demo import stages

    digits = arguments.data == "digits"
    model = arguments.model or ("cnn" if digits else "lenet-300-100")
    if digits and model == "lenet-5":
        parser.error("--model lenet-5 takes 28×28 images: use --data mnist --data-dir DIR")
    if digits and arguments.data_dir is not None:
        parser.error("--data-dir goes with --data mnist; the digits come with scikit-learn")
    if not arguments.output.parent.is_dir():
        parser.error(f"--output: {arguments.output.parent} is not a directory")
    try:
        data = demo_data.load(arguments.data, arguments.data_dir)
    except demo_data.DataError as error:
        print(f"jaxcomp demo: {error}", file=sys.stderr)
        return 1
    defaults = stages.Plan()
    plan = stages.Plan(
        model=model,
        epochs=arguments.epochs or (defaults.epochs if digits else 10),
        sparsity=arguments.sparsity,
    )
    seeds = arguments.seeds or (5 if digits else 1)
    start = time.perf_counter()
    results = _with_progress(plan, data, seeds, arguments.output)
    console = Console()
    rows = [
        report.Row(
            name,
            [result.accuracy for result in found],
            [result.file_bytes for result in found],
            found[0].parameters,
            sum(result.sparsity for result in found) / len(found),
        )
        for name, found in results.items()
    ]
    title = (
        f"{arguments.data}, {model}, {len(data.test_labels)} test images, mean of {seeds} seed(s)"
    )
    console.print(report.stage_table(rows, title))
    expected = results["all together"][0].correct
    reloaded = stages.verify(arguments.output, arguments.data_dir)
    console.print(
        f"{arguments.output}: {arguments.output.stat().st_size:,} bytes. A new process loads it "
        f"and gets {reloaded} of {len(data.test_labels)} right (here {expected}).",
        highlight=False,
    )
    console.print(f"{time.perf_counter() - start:.0f} s in all.", highlight=False)
    if reloaded != expected:
        print("jaxcomp demo: the reloaded file computes something else", file=sys.stderr)
        return 1
    return 0


def _with_progress(plan: Any, data: Any, seeds: int, output: pathlib.Path) -> Any:
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from jaxcomp.demo import stages

    columns = (TextColumn("{task.description:<24}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task("compiling", total=stages.total_steps(plan, data, seeds))

        def tick(words: str) -> None:
            progress.update(task, advance=1, description=words)

        return stages.run(plan, data, seeds, output, tick)


if __name__ == "__main__":
    sys.exit(main())
