"""A study as a picture: an SVG file, which browsers open and papers include."""

import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

import numpy as np

from jaxcomp.search import pareto
from jaxcomp.search.ranking import Leaders, follow, violation
from jaxcomp.search.shown import number

_WIDTH, _HEIGHT = 640, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 90, 20, 40, 60
_FRONT, _OTHER, _BEYOND = "#c1272d", "#7f96b2", "#c8c8c8"


class Axis(NamedTuple):
    """One axis of a plot.

    Attributes:
        name: under or beside it.
        ticks: values with a mark.
        place: from a value to a fraction of the axis.
    """

    name: str
    ticks: tuple[float, ...]
    place: Callable[[float], float]


def plot(study: Any, file: str | os.PathLike, *names: str) -> None:
    """Draw the trials: two objectives against each other, or one as the search went on.

    The front, or the best so far, is red; grey are trials beyond the constraints. Where there are
    more objectives than two, the line goes around those that lead in the two that are drawn.
    Failed trials are not drawn, but the title says how many there are. An axis is logarithmic where
    all of its values are above 0 and the largest is over a hundred times the smallest.

    Args:
        study: a :class:`jaxcomp.search.Study`.
        file: to write, by custom ``.svg``.
        names: one objective, drawn over the trials, or two, along and up; by default the first or
            the first two.

    Raises:
        ValueError: a name is no objective; no trial has values.
        OSError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> from jaxcomp.search import Integer, Study
        >>> from jaxcomp.search.trials import Trial
        >>> trials = tuple(Trial(i, {"": i}, (1.0 / i,), "finished", 0.1, {}) for i in (1, 2, 3))
        >>> file = os.path.join(tempfile.mkdtemp(), "study.svg")
        >>> plot(Study(Integer(1, 3), {"loss": "minimize"}, {}, trials, "evaluations"), file)
        >>> open(file).read(4)
        '<svg'
    """
    objectives = list(study.objectives)
    chosen = list(names) or objectives[:2]
    for name in chosen:
        if name not in objectives:
            raise ValueError(f"{name!r} is no objective: {', '.join(objectives)} are")
    if len(chosen) > 2:
        raise ValueError(f"{', '.join(chosen)} are {len(chosen)} objectives: name one or two")
    drawn = [trial for trial in study.trials if trial.values is not None]
    if not drawn:
        raise ValueError("there is nothing to draw: no trial has values")
    columns = [[trial.values[objectives.index(name)] for trial in drawn] for name in chosen]
    if len(chosen) == 1:
        columns.insert(0, [float(trial.number) for trial in drawn])
        axes = [axis("trial", columns[0], False), axis(chosen[0], columns[1])]
        red = {trial.number for trial in _records(study, objectives.index(chosen[0]))}
    else:
        axes = [axis(name, column) for name, column in zip(chosen, columns, strict=True)]
        red = {trial.number for trial in study.front}
    marks = [
        (x, y, _FRONT if trial.number in red else _BEYOND if violation(trial) else _OTHER)
        for trial, x, y in zip(drawn, *columns, strict=True)
    ]
    failed = sum(trial.status == "failed" for trial in study.trials)
    title = f"{len(study.trials)} trials" + (f", {failed} failed" if failed else "")
    ways = study.objectives[chosen[0]], study.objectives[chosen[-1]]
    with open(file, "w", encoding="utf-8") as out:
        out.write(_svg(title, axes, marks, _stairs(marks, ways, len(chosen) == 1)))


def _records(study: Any, index: int) -> list[Any]:
    """Trials that were the best so far when they came, in one objective."""
    way = (list(study.objectives.values())[index],)
    leaders, found = Leaders(), []
    for trial in study.trials:
        only = trial._replace(values=trial.values and (trial.values[index],))
        leaders = follow(leaders, only, way)
        if not leaders.since and not violation(trial):
            found.append(trial)
    return found


def axis(name: str, values: Sequence[float], may_log: bool = True) -> Axis:
    """An axis that holds all values.

    Args:
        name: of the axis.
        values: at least one, finite.
        may_log: whether it may be logarithmic.

    Returns:
        The axis.

    Example:
        >>> axis("loss", [0.0, 9.0]).ticks
        (0.0, 2.0, 4.0, 6.0, 8.0)
        >>> axis("flops", [1e3, 2e6]).ticks
        (1000.0, 10000.0, 100000.0, 1000000.0)
    """
    low, high = min(values), max(values)
    if may_log and low > 0 and high / low > 100:
        first, last = math.log10(low), math.log10(high)
        every = range(math.ceil(first - 1e-9), math.floor(last + 1e-9) + 1)
        ticks = tuple(10.0**power for power in every[:: max(1, len(every) // 5)])
        return Axis(name, ticks, lambda value: (math.log10(value) - first) / (last - first))
    # Halves, since the difference of the two largest numbers is none.
    extent = (high / 2 - low / 2) * 2 or abs(high) or 1.0
    if not math.isfinite(extent):
        return Axis(name, (low, high), lambda value: (value / high - low / high) / (1 - low / high))
    if high == low:
        low, high = low - extent / 2, high + extent / 2
    step = _step(extent)
    ticks = tuple(
        float(f"{i * step:.12g}")
        for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    )
    return Axis(name, ticks, lambda value: (value - low) / (high - low))


def _step(extent: float) -> float:
    """One, two or five times a power of ten: about five of them make the extent."""
    unit = 10.0 ** math.floor(math.log10(extent / 4))
    return next(unit * times for times in (1, 2, 5, 10) if extent / (unit * times) <= 5)


def _stairs(
    marks: Sequence[tuple[float, float, str]], ways: tuple[str, str], over_trials: bool
) -> list[tuple[float, float]]:
    """The border of what the red marks dominate; over the trials, the best so far."""
    red = sorted({(x, y) for x, y, color in marks if color == _FRONT})
    if red and not over_trials:
        # Of a front in more objectives than are drawn, some may be dominated in these two.
        signs = [-1.0 if way == "maximize" else 1.0 for way in ways]
        on_border = pareto.front(np.array(red) * signs)
        red = [corner for corner, kept in zip(red, on_border, strict=True) if kept]
    corners = red[:1]
    for x, y in red[1:]:
        before = corners[-1]
        up_first = not over_trials and ways[0] == "maximize"
        corners += [(before[0], y) if up_first else (x, before[1]), (x, y)]
    if over_trials and corners:
        corners.append((max(x for x, _, _ in marks), corners[-1][1]))
    return corners


def _svg(
    title: str,
    axes: Sequence[Axis],
    marks: Sequence[tuple[float, float, str]],
    line: Sequence[tuple[float, float]],
) -> str:
    along, up = axes
    wide, high = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    x_of = lambda value: f"{_LEFT + 8 + (wide - 16) * along.place(value):.1f}"
    y_of = lambda value: f"{_TOP + high - 8 - (high - 16) * up.place(value):.1f}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'width="{_WIDTH}" height="{_HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<rect x="{_LEFT}" y="{_TOP}" width="{wide}" height="{high}" fill="none" stroke="#444"/>',
        f'<text x="{_WIDTH / 2}" y="{_TOP - 16}" text-anchor="middle">{escape(title)}</text>',
        f'<text x="{_LEFT + wide / 2}" y="{_HEIGHT - 16}" text-anchor="middle">'
        f"{escape(along.name)}</text>",
        f'<text transform="translate(16 {_TOP + high / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(up.name)}</text>",
    ]
    for tick in along.ticks:
        x, y = x_of(tick), _TOP + high
        parts.append(f'<path d="M{x} {y}v5" stroke="#444"/>')
        parts.append(f'<text x="{x}" y="{y + 18}" text-anchor="middle">{number(tick)}</text>')
    for tick in up.ticks:
        y = y_of(tick)
        parts.append(f'<path d="M{_LEFT} {y}h-5" stroke="#444"/>')
        parts.append(
            f'<text x="{_LEFT - 9}" y="{y}" dy="4" text-anchor="end">{number(tick)}</text>'
        )
    if line:
        corners = " ".join(f"{x_of(x)},{y_of(y)}" for x, y in line)
        parts.append(f'<polyline points="{corners}" fill="none" stroke="{_FRONT}"/>')
    for x, y, color in sorted(marks, key=lambda mark: mark[2] == _FRONT):
        parts.append(f'<circle cx="{x_of(x)}" cy="{y_of(y)}" r="3.5" fill="{color}"/>')
    return "\n".join([*parts, "</svg>", ""])
