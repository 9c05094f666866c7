"""The parts of a space: what is chosen, and from what."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from jaxcomp import checks

_LARGEST = 2**53  # whole numbers beyond it are not exact as floats, which logarithms go through


@dataclass(frozen=True)
class Choice:
    """One of several options.

    Args:
        options: a sequence of constants or spaces, whose value is the chosen one's; or a mapping of
            names to spaces, whose value is ``{name: candidate of the space}``, and the name alone
            where the space is None.

    Raises:
        TypeError: the options are no sequence or mapping, or a name is not a string.
        ValueError: there are none, a name is empty, or two constants are equal.

    Example:
        >>> from jaxcomp.search import spaces
        >>> space = Choice({"relu": None, "leaky": {"slope": Continuous(0.0, 0.5)}})
        >>> spaces.decode(space, {"": 1, "leaky/slope": 0.1}), spaces.decode(space, {"": 0})
        ({'leaky': {'slope': 0.1}}, 'relu')
    """

    options: Any

    def __post_init__(self) -> None:
        """Check the options; keep a copy that nobody changes."""
        options = self.options
        if isinstance(options, Mapping):
            for name in options:
                if not isinstance(name, str):
                    raise TypeError(f"Choice: the option {name!r:.60} must be named by a string")
                if not name:
                    raise ValueError("Choice: an option's name is empty: name it")
            options = dict(options)
        elif isinstance(options, Sequence) and not isinstance(options, (str, bytes)):
            options = tuple(plain(option) for option in options)
        elif isinstance(options, np.ndarray) and options.ndim == 1:
            options = tuple(options.tolist())
        else:
            raise TypeError(
                "Choice: options must be a sequence of options or a mapping of names to spaces, "
                f"not {options!r:.60}"
            )
        if not options:
            raise ValueError("Choice: there are no options: give at least one")
        for i, option in enumerate(options if isinstance(options, tuple) else ()):
            for other in options[:i]:
                if is_constant(option) and same(option, other):
                    raise ValueError(f"Choice: {option!r} is among the options twice: take one out")
        object.__setattr__(self, "options", options)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Of the options, in their order; positions where they have none."""
        return tuple(self.options if self.is_named else map(str, range(len(self.options))))

    @cached_property
    def spaces(self) -> tuple[Any, ...]:
        """The options themselves, in their order."""
        return tuple(self.options.values() if self.is_named else self.options)

    @property
    def is_named(self) -> bool:
        """Whether the options are a mapping of names."""
        return isinstance(self.options, dict)


@dataclass(frozen=True)
class Integer:
    """A whole number from ``low`` to ``high``, both included.

    Args:
        low: the smallest.
        high: the largest.
        step: between neighbours; ``high`` must be reached.
        log: whether to draw evenly in the logarithm: as often from 8 to 16 as from 64 to 128.

    Raises:
        TypeError: a bound or the step is no whole number, or ``log`` no bool.
        ValueError: ``low`` is above ``high``, the step is below 1 or misses ``high``, ``low`` is
            below 1 though ``log``, or a bound is beyond 2**53.

    Example:
        >>> Integer(8, 64, step=8)
        Integer(low=8, high=64, step=8, log=False)
        >>> Integer(1, 10, step=4)
        Traceback (most recent call last):
        ...
        ValueError: Integer: steps of 4 from 1 miss 10: make high 9 or 13
    """

    low: Any
    high: Any
    step: Any = 1
    log: Any = False

    def __post_init__(self) -> None:
        """Check the numbers and make them plain."""
        checks.check_count("Integer: low", self.low, -_LARGEST)
        checks.check_count("Integer: high", self.high, -_LARGEST)
        checks.check_count("Integer: step", self.step)
        _check_log("Integer", self.log)
        low, high, step = int(self.low), int(self.high), int(self.step)
        if low > high:
            raise ValueError(f"Integer: low is {low}, above high, which is {high}: swap them")
        if high > _LARGEST:
            raise ValueError(f"Integer: high is {high}, beyond 2**53: choose its logarithm instead")
        if rest := (high - low) % step:
            ends = f"{high - rest} or {high - rest + step}"
            raise ValueError(f"Integer: steps of {step} from {low} miss {high}: make high {ends}")
        if self.log and low < 1:
            raise ValueError(f"Integer: low is {low}, but log needs at least 1: leave log out")
        for name, value in (("low", low), ("high", high), ("step", step)):
            object.__setattr__(self, name, value)


@dataclass(frozen=True)
class Continuous:
    """A real number from ``low`` to ``high``, both included.

    Args:
        low: the smallest.
        high: the largest.
        log: whether to draw evenly in the logarithm, as for learning rates.

    Raises:
        TypeError: a bound is no number, or ``log`` no bool.
        ValueError: a bound is not finite, ``low`` is above ``high``, or not above 0 though ``log``.

    Example:
        >>> Continuous(1e-4, 1e-1, log=True)
        Continuous(low=0.0001, high=0.1, log=True)
        >>> Continuous(0, 1, log=True)
        Traceback (most recent call last):
        ...
        ValueError: Continuous: low is 0.0, but log needs a number above 0: leave log out
    """

    low: Any
    high: Any
    log: Any = False

    def __post_init__(self) -> None:
        """Check the numbers and make them plain."""
        for name in ("low", "high"):
            value = getattr(self, name)
            if not checks.is_number(value):
                raise TypeError(f"Continuous: {name} must be a number, not {value!r:.60}")
            if not is_finite(value):
                raise ValueError(f"Continuous: {name} is {value!s:.40}: give a finite number")
            object.__setattr__(self, name, float(value))
        _check_log("Continuous", self.log)
        if self.low > self.high:
            raise ValueError(
                f"Continuous: low is {self.low}, above high, which is {self.high}: swap them"
            )
        if self.log and self.low <= 0:
            raise ValueError(
                f"Continuous: low is {self.low}, but log needs a number above 0: leave log out"
            )


@dataclass(frozen=True)
class Repeat:
    """A list, each item of which is chosen by itself, as the layers of a network are.

    Args:
        count: how many items: a whole number, or an :class:`Integer` where that is chosen too.
        item: the space of each; of item ``i`` only what exists where the count is above ``i``.

    Raises:
        TypeError: the count is neither.
        ValueError: the count is, or may become, negative.

    Example:
        >>> from jaxcomp.search import spaces
        >>> space = Repeat(Integer(1, 3), Choice((16, 32)))
        >>> spaces.decode(space, {"#count": 2, "0": 1, "1": 0})
        [32, 16]
    """

    count: Any
    item: Any

    def __post_init__(self) -> None:
        """Check the count."""
        if isinstance(self.count, Integer):
            if self.count.low < 0:
                raise ValueError(f"Repeat: the count may become {self.count.low}: begin at 0")
            return
        try:
            checks.check_count("Repeat: count", self.count, 0)
        except TypeError as error:
            raise TypeError(f"{error}: give an int, or an Integer to choose it") from None
        object.__setattr__(self, "count", int(self.count))


Part = Choice | Integer | Continuous


def plain(value: Any) -> Any:
    """A number of NumPy's as Python's; anything else as it is.

    Example:
        >>> import numpy as np
        >>> plain(np.float32(0.5)), plain("relu")
        (0.5, 'relu')
    """
    is_scalar = hasattr(value, "dtype") and getattr(value, "shape", None) == ()
    return value.item() if is_scalar else value


def is_finite(value: Any) -> bool:
    """Whether a number is finite as a float; whole numbers of Python's may be beyond them.

    Example:
        >>> is_finite(3), is_finite(math.nan), is_finite(10**400)
        (True, False, False)
    """
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def is_constant(value: Any) -> bool:
    """Whether a leaf of a space is a plain value.

    Example:
        >>> is_constant(3), is_constant(None), is_constant(Integer(1, 3)), is_constant(print)
        (True, True, False, False)
    """
    return value is None or isinstance(value, (bool, int, float, str))


def same(a: Any, b: Any) -> bool:
    """Whether two constants are equal; a bool is no number, but 1 is 1.0.

    Example:
        >>> same(1, 1.0), same(1, True), same("1", 1), same(None, None)
        (True, False, False, True)
    """
    if not (is_constant(a) and is_constant(b)) or isinstance(a, bool) is not isinstance(b, bool):
        return False
    return a is b or a == b


def _check_log(name: str, log: Any) -> None:
    if not isinstance(log, (bool, np.bool_)):
        raise TypeError(f"{name}: log must be True or False, not {log!r:.60}")
