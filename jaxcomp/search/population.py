"""Evaluate a whole population of candidates in one program, in the form that is fastest here."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxcomp import checks
from jaxcomp import tree as tree_lib
from jaxcomp.search.forms import (
    FORMS,
    Form,
    Program,
    check_form,
    fastest,
    mesh_axis,
    program,
    seconds_of,
)
from jaxcomp.search.memory import default_bytes, fitting
from jaxcomp.search.stacking import as_key, count, data_of


class Population(NamedTuple):
    """A function of one candidate, ready for any number of them; call it as :meth:`evaluate`.

    Attributes:
        form: ``"vmap"``, ``"map"`` or ``"loop"``.
        chunk: candidates that are computed at once on each device.
        size: candidates of one call of the program; a population is brought to a multiple of it.
        devices: that they are spread over.
        seconds: median for a candidate in each form that was timed; empty if the form was given.
        program: what is called.
        kind: shapes and dtypes of a candidate.
    """

    form: Form
    chunk: int
    size: int
    devices: int
    seconds: dict[Form, float]
    program: Program
    kind: Any

    def evaluate(self, stacked: Any, *shared: Any) -> Any:
        """Results of candidates.

        Args:
            stacked: any number of them, see :func:`jaxcomp.search.stack`; none will do.
            *shared: what all share, with the shapes of the example's, or it is compiled anew; JAX
                arrays, unless they are to be copied to the device every time.

        Returns:
            What the function returns, with a leading axis, as NumPy arrays (PRNG keys stay keys):
            results of many chunks are more than a device may hold.

        Raises:
            ValueError: the candidates are not of the example's structure, shapes and dtypes.
        """
        total = count(stacked)
        stacked = jax.device_put(stacked)
        _check_kind(stacked, self.kind)
        if total == 0:
            return self._nothing(shared)
        pieces: list[Any] = []
        waiting = None
        # The next chunk is under way while the results of the one before are fetched.
        for piece in _pieces(stacked, total, self.size):
            started = self.program(piece, *shared)
            if waiting is not None:
                pieces.append(jax.tree.map(data_of, waiting))
            waiting = started
        pieces.append(jax.tree.map(data_of, waiting))
        return jax.tree.map(lambda like, *rows: _joined(like, rows, total), waiting, *pieces)

    def _nothing(self, shared: tuple[Any, ...]) -> Any:
        many = jax.tree.map(
            lambda one: jax.ShapeDtypeStruct((self.size, *one.shape), one.dtype), self.kind
        )
        found = jax.eval_shape(self.program.run, many, *shared)
        blank = lambda like: jax.lax.full((0, *like.shape[1:]), 0, like.dtype)
        return jax.tree.map(lambda like: _joined(blank(like), [], 0), found)

    def __call__(self, stacked: Any, *shared: Any) -> Any:
        """As :meth:`evaluate`."""
        return self.evaluate(stacked, *shared)

    def __str__(self) -> str:
        where = f" on {self.devices} devices" if self.devices > 1 else ""
        times = ", ".join(f"{form} {1000 * took:.3g} ms" for form, took in self.seconds.items())
        how = f"; a candidate takes: {times}" if times else ""
        return f"{self.form}, {self.chunk} at once of {self.size} a call{where}{how}"


def population(
    function: Any,
    example: Any,
    *shared: Any,
    form: Any = None,
    chunk: Any = None,
    max_bytes: Any = None,
    mesh: Any = None,
    axis: str | None = None,
) -> Population:
    """Make a function of one candidate one of many, that runs as is fastest on this device.

    It is compiled once for each form that is tried, and then for no population's size again: what
    is no multiple of ``size`` is filled up with copies of its last candidate, which are cut off.
    Candidates do not touch each other: a NaN stays where it is.

    Batched products may sum in another order than single ones: forms agree to rounding, ``"map"``
    with ``chunk=1`` and ``"loop"`` most closely. Which is fastest is measured and may differ from
    run to run: give the form where last bits have to be the same.

    Args:
        function: ``(candidate, *shared) -> results``, trees of arrays; pure. Train in it, if you
            like.
        example: candidates, see :func:`jaxcomp.search.stack`: as many as are evaluated in one go
            as a rule.
        *shared: what all candidates share, such as data; as arguments, so that it is no constant of
            the program.
        form: ``"vmap"``: all at once, batched; ``"map"``: in one program, ``chunk`` at once, as
            ``jax.lax.map`` does it; ``"loop"``: compiled calls one by one; None: each is timed on
            the example, and the fastest is taken.
        chunk: candidates at once on each device. None: for ``"map"`` one, for ``"vmap"`` as many as
            the example has and memory can hold.
        max_bytes: of each device's memory for a program: its inputs, results and what lies between,
            as the compiler counts them. None: half of what is free.
        mesh: devices to spread candidates over.
        axis: of the mesh, along which they are spread; may be left out if it has one alone.

    Returns:
        The population.

    Raises:
        TypeError: ``function`` is none; a candidate has a leaf that is no array.
        ValueError: the example is empty; an argument is out of range; a single candidate does not
            fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxcomp import search
        >>> def error(candidate, x, y):
        ...     return {"error": jnp.abs(candidate["slope"] * x - y).max()}
        >>> candidates = search.stack([{"slope": 1.0}, {"slope": 2.0}, {"slope": jnp.nan}])
        >>> x = jnp.arange(3.0)
        >>> evaluate = population(error, candidates, x, 2 * x, form="vmap")
        >>> evaluate(candidates, x, 2 * x)
        {'error': array([ 2.,  0., nan], dtype=float32)}
    """
    checks.check_function("function", function, "a candidate that returns arrays")
    check_form(form, mesh)
    axis, devices = mesh_axis(mesh, axis)
    check_limits(chunk, max_bytes)
    total = count(example)
    example = jax.device_put(example)
    if total == 0:
        raise ValueError("example is empty: give at least one candidate")
    if max_bytes is None:
        max_bytes = default_bytes(list(mesh.devices.flat) if mesh is not None else _used(example))

    def made(form: Form) -> Population:
        here = -(-total // devices)
        width = min(chunk or (1 if form == "map" else here), here)
        found = program(function, form, width, mesh, axis)
        unit = devices * (width if form == "map" else 1)
        calls = -(-total // unit) if form == "map" else width
        if form != "loop":
            # ``calls`` units a call: chunks one after the other, or candidates side by side.
            calls = fitting(lambda n: found.bytes_at(n * unit, example, shared), calls, max_bytes)
        size = total if form == "loop" else calls * unit
        at_once = {"vmap": calls, "map": width, "loop": 1}[form]
        return Population(form, at_once, size, devices, {}, found, _kind_of(example))

    if form is not None or total == 1:
        return made(form or "vmap")
    tried = {name: made(name) for name in FORMS if name != "loop" or mesh is None}
    seconds = seconds_of({name: lambda p=p: p(example, *shared) for name, p in tried.items()})
    each = {name: took / total for name, took in seconds.items()}
    return tried[fastest(each)]._replace(seconds=each)


def check_limits(chunk: Any, max_bytes: Any) -> None:
    """Raise unless both are None or at least 1.

    Raises:
        TypeError: one is no whole number.
        ValueError: one is too small.
    """
    for name, value in (("chunk", chunk), ("max_bytes", max_bytes)):
        if value is not None:
            checks.check_count(name, value)


def _kind_of(stacked: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), stacked)


def _check_kind(stacked: Any, kind: Any) -> None:
    given, wanted = (tree_lib.flatten(tree) for tree in (_kind_of(stacked), kind))
    if jax.tree.structure(stacked) != jax.tree.structure(kind):
        paths = sorted(given.keys() ^ wanted.keys()) or ["their nesting"]
        raise ValueError(f"candidates are not like the example: they differ in {paths[0]}")
    for path, one in given.items():
        if (one.shape, one.dtype) != (wanted[path].shape, wanted[path].dtype):
            raise ValueError(
                f"{path or 'candidates'}: {one.dtype} {one.shape} for each candidate, but the "
                f"example had {wanted[path].dtype} {wanted[path].shape}"
            )


def _used(example: Any) -> list[Any]:
    """The device that candidates are on, which is where JAX computes with them."""
    leaf = jax.tree.leaves(example)[0]
    return sorted(leaf.devices(), key=lambda device: device.id)[:1]


def _pieces(stacked: Any, total: int, size: int) -> Iterator[Any]:
    """Programs' inputs, of the same size; the last is filled up with copies of its last row."""
    if total == size:
        yield stacked
        return
    # Through NumPy: each other size would be a program for JAX.
    held = jax.tree.map(data_of, stacked)
    for start in range(0, total, size):
        rows = np.minimum(np.arange(start, start + size), total - 1)
        yield jax.tree.map(lambda like, x, rows=rows: as_key(like, x[rows]), stacked, held)


def _joined(like: Any, pieces: Any, total: int) -> Any:
    rows = np.concatenate(pieces)[:total] if pieces else data_of(like)
    return as_key(like, rows)
