"""A study as a table."""

from typing import Any

from jaxcomp import columns


def rows(study: Any) -> list[list[str]]:
    """The front in words: a head, then a row for each trial, the best of the first objective first.

    Args:
        study: a :class:`jaxcomp.search.Study`.

    Returns:
        Numbers of trials, objectives, measures that have a limit, seconds, and candidates,
        floats in these to four digits.

    Example:
        >>> from jaxcomp.search import Integer, Study, Trial
        >>> trial = Trial(0, {"width": 8}, (0.9,), "finished", 1.5, {"bytes": 1200})
        >>> space = {"width": Integer(8, 64)}
        >>> study = Study(space, {"accuracy": "maximize"}, {"bytes": 2000.0}, (trial,), "seconds")
        >>> for row in rows(study):
        ...     print(row)
        ['trial', 'accuracy ↑', 'bytes ≤ 2,000', 'seconds', 'candidate']
        ['0', '0.9', '1,200', '1.5', "{'width': 8}"]
    """
    arrows = {"maximize": "↑", "minimize": "↓"}
    limits = {name: limit for name, limit in study.constraints.items()}
    head = ["trial"]
    for name, direction in study.objectives.items():
        limit = f" ≤ {number(limits[name])}" if name in limits else ""
        head.append(f"{name} {arrows[direction]}{limit}")
    others = [name for name in limits if name not in study.objectives]
    head += [f"{name} ≤ {number(limits[name])}" for name in others]
    sign = -1 if next(iter(study.objectives.values())) == "maximize" else 1
    front = sorted(study.front, key=lambda trial: sign * trial.values[0])
    return [[*head, "seconds", "candidate"]] + [
        [
            str(trial.number),
            *(number(value) for value in trial.values),
            *(number(trial.told[name]) for name in others),
            f"{trial.seconds:.3g}",
            str(_short(study.candidate(trial))),
        ]
        for trial in front
    ]


def table(study: Any) -> Any:
    """The front as a table for the terminal.

    Args:
        study: a :class:`jaxcomp.search.Study`.

    Returns:
        A ``rich.table.Table``.

    Example:
        >>> from jaxcomp.search import Integer, Study
        >>> table(Study(Integer(1, 2), {"loss": "minimize"}, {}, (), "evaluations")).row_count
        0
    """
    from rich.table import Table
    from rich.text import Text

    head, *body = rows(study)
    failed = sum(trial.status == "failed" for trial in study.trials)
    what = "best" if len(study.objectives) == 1 else "Pareto front"
    title = f"{what} of {len(study.trials)} trials" + (f", {failed} failed" if failed else "")
    result = Table(title=Text(title))
    for name in head:
        last = name == head[-1]
        result.add_column(
            Text(name), justify="left" if last else "right", overflow="fold", no_wrap=not last
        )
    for row in body:
        result.add_row(*map(Text, row))  # candidates hold brackets, which are no markup
    return result


def _short(candidate: Any) -> Any:
    """A candidate with its numbers to four digits."""
    if isinstance(candidate, float):
        return float(f"{candidate:.4g}")
    if isinstance(candidate, dict):
        return {name: _short(value) for name, value in candidate.items()}
    if isinstance(candidate, (list, tuple)):
        return [_short(value) for value in candidate]
    return candidate


def text(study: Any) -> str:
    """What :func:`rows` gives, in columns.

    Example:
        >>> from jaxcomp.search import Integer, Study, Trial
        >>> trial = Trial(0, {"": 8}, (0.5,), "finished", 1.5, {})
        >>> print(text(Study(Integer(8, 64), {"loss": "minimize"}, {}, (trial,), "seconds")))
        trial  loss ↓  seconds  candidate
            0     0.5      1.5  8
    """
    found = rows(study)
    # The last column is not padded to the width of the longest candidate.
    lines = columns.table([row[:-1] for row in found], left=0).split("\n")
    return "\n".join(f"{line}  {row[-1]}" for line, row in zip(lines, found, strict=True))


def number(value: Any) -> str:
    """A measure in words.

    Example:
        >>> number(1234567.0), number(0.98123), number(9999.7), number(2e-9)
        ('1,234,567', '0.9812', '10,000', '2e-09')
    """
    if isinstance(value, int) or (abs(value) < 1e15 and value == int(value)):
        return f"{int(value):,}"
    return f"{value:,.0f}" if 9999.5 <= abs(value) < 1e15 else f"{value:.4g}"
