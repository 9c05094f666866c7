"""The protocol: a compression method is four pure functions, as an optimizer is two.

``init(params) -> state``, ``apply(params, state) -> params`` (what the forward pass sees),
``update(params, state, grads) -> state`` (once a step) and ``pack(params, state) -> tree`` (what is
shipped). A method never sees the model, the loss or the optimizer.

Learned or not
--------------
A state has two halves. ``learned`` holds what gradients train beside the weights (step sizes,
centroids, factors), as a dict from the path of a leaf to a small pytree; what several leaves share
lives under the first of them. ``buffers`` holds everything else (masks, indices, counters). An
optimizer is shown ``learned`` and never ``buffers``, so it cannot train, decay or average a mask.

The user takes one ``jax.grad`` with respect to the weights and gets the gradient with respect to
the *effective* weights, those that the model really multiplied with. Nothing more is needed:
:func:`jaxcomp.wrap_optimizer` pulls it back through ``apply`` to the stored weights and to what is
learned, and hands both to the user's optax transformation in one call. Nothing learned appears in
the user's parameter tree or loss.

Zero for nothing
----------------
Where ``apply`` merely sets weights to zero it need not run in the forward pass: the optimizer can
write the zeros into the stored weights, inside its own element-wise kernel. A method that allows it
also gives ``project`` (the part of ``apply`` that may be written into the weights) and
``apply_projected`` (the rest). For every method ``apply = apply_projected ∘ project``.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax

from jaxcomp import tree as tree_lib

Params = Any


class State(NamedTuple):
    """What a method carries from step to step.

    Attributes:
        learned: what gradients train, by the path of the leaf that it belongs to.
        buffers: what they do not: masks, indices, counters; any pytree.
    """

    learned: dict[str, Any]
    buffers: Any


class Compression(NamedTuple):
    """A compression method. All functions are pure and work inside ``jit``, except ``pack``.

    Attributes:
        init: ``init(params) -> state``. Raises for weights that cannot be compressed.
        apply: ``apply(params, state) -> params``, the effective weights, of the same structure,
            shapes and dtypes; differentiable in ``params`` and ``state.learned``. A leaf that the
            method leaves alone is handed on as the same object.
        update: ``update(params, state, grads) -> state``, once a step, with the weights of the step
            and the gradient with respect to what ``apply`` made of them.
        pack: ``pack(params, state) -> tree`` with compressed leaves, run outside ``jit``. Decoded,
            it equals ``apply(params, state)`` bit for bit.
        project: the part of ``apply`` that only keeps weights or sets them to zero; None where
            there is none. :func:`jaxcomp.wrap_optimizer` writes it into the stored weights. It is
            idempotent, and the identity on a fresh state.
        apply_projected: what is left of ``apply`` for projected weights; None exactly where
            ``project`` is None.
        restart: ``restart(old, new) -> {path: mask}``, from the states before and after an
            ``update``: True where the optimizer is to forget a weight. None where it never is.
            Needs ``project``.
        rewind: ``rewind(params, old, new) -> params``, what the stored weights become after an
            update, before ``project``; the same objects where nothing changes. None where they stay
            what the optimizer made of them. Needs ``project``.
    """

    init: Callable[[Params], State]
    apply: Callable[[Params, State], Params]
    update: Callable[[Params, State, Params], State]
    pack: Callable[[Params, State], Any]
    project: Callable[[Params, State], Params] | None = None
    apply_projected: Callable[[Params, State], Params] | None = None
    restart: Callable[[State, State], dict[str, Any]] | None = None
    rewind: Callable[[Params, State, State], Params] | None = None


def keep(params: Params, state: State) -> Params:
    """Hand the weights on: the ``apply_projected`` of a method that lives in the weights.

    Example:
        >>> keep({"kernel": 1.0}, State({}, ()))
        {'kernel': 1.0}
    """
    del state
    return params


def identity() -> Compression:
    """The method that changes nothing; neutral in :func:`chain`.

    Returns:
        A method without state.

    Example:
        >>> method = identity()
        >>> method.apply({"kernel": 1.0}, method.init({"kernel": 1.0}))
        {'kernel': 1.0}
    """
    return Compression(
        init=lambda params: State({}, ()),
        apply=keep,
        update=lambda params, state, grads: state,
        pack=keep,
        project=keep,
        apply_projected=keep,
    )


def chain(*methods: Compression) -> Compression:
    """Apply methods one after the other, each to what the one before it made.

    Each method is updated with its own input and with the gradient with respect to its own output.
    A leaf is packed by the last method that packs it. As long as leading methods only set weights
    to zero, these zeros are kept in the stored weights and cost the forward pass nothing.

    Args:
        methods: in order of application.

    Returns:
        One method.

    Raises:
        TypeError: an argument is not a :class:`Compression`.
        ValueError: a method that restarts or rewinds weights stands behind one that changes them,
            and so does not own them.

    Example:
        >>> both = chain(identity(), identity())
        >>> both.apply({"kernel": 1.0}, both.init({"kernel": 1.0}))
        {'kernel': 1.0}
    """
    _check_methods(methods)

    def init(params: Params) -> State:
        states = []
        for method in methods:
            states.append(method.init(params))
            params = method.apply(params, states[-1])
        return _join(states)

    def apply(params: Params, state: State) -> Params:
        for method, part in zip(methods, _split(state, len(methods)), strict=True):
            params = method.apply(params, part)
        return params

    def update(params: Params, state: State, grads: Params) -> State:
        states = _split(state, len(methods))
        cotangents = _cotangents(methods, states, params, grads)
        news = []
        for method, part, cotangent in zip(methods, states, cotangents, strict=True):
            news.append(method.update(params, part, cotangent))
            params = method.apply(params, news[-1])
        return _join(news)

    def pack(params: Params, state: State) -> Any:
        packed = params
        for method, part in zip(methods, _split(state, len(methods)), strict=True):
            leaves, new = tree_lib.flatten(params), tree_lib.flatten(method.pack(params, part))
            changed = {path: leaf for path, leaf in new.items() if leaf is not leaves[path]}
            packed = tree_lib.replace(packed, changed)
            params = method.apply(params, part)
        return packed

    # Zeros may be written into the weights up to and including the first method that does more.
    count = 0
    while count < len(methods) and methods[count].apply_projected is keep:
        count += 1
    written = methods[: count + 1]

    def project(params: Params, state: State) -> Params:
        for method, part in zip(written, _split(state, len(methods)), strict=False):
            params = method.project(params, part) if method.project else params
        return params

    def apply_projected(params: Params, state: State) -> Params:
        for index, part in enumerate(_split(state, len(methods))):
            if index < count:
                continue
            rest = methods[index].apply_projected if index == count else None
            params = (rest or methods[index].apply)(params, part)
        return params

    def restart(old: State, new: State) -> dict[str, Any]:
        pairs = zip(methods, _split(old, len(methods)), _split(new, len(methods)), strict=True)
        return _any_mark(m.restart(before, after) for m, before, after in pairs if m.restart)

    def rewind(params: Params, old: State, new: State) -> Params:
        pairs = zip(methods, _split(old, len(methods)), _split(new, len(methods)), strict=True)
        for method, before, after in pairs:
            params = method.rewind(params, before, after) if method.rewind else params
        return params

    for place, method in enumerate(methods):
        if place > count and (method.restart or method.rewind):
            raise ValueError(
                f"method {place} of the chain drops and regrows stored weights, but method {count} "
                "changes what is stored: put the one that prunes first"
            )
    whole = Compression(init, apply, update, pack)
    if count < len(methods) and not any(method.project for method in written):
        return whole
    return whole._replace(
        project=project,
        apply_projected=keep if count == len(methods) else apply_projected,
        restart=restart if any(method.restart for method in methods) else None,
        rewind=rewind if any(method.rewind for method in methods) else None,
    )


def partition(
    rules: dict[str, Compression | None],
    where: Callable[[str, Any], bool] = tree_lib.is_weight,
) -> Compression:
    """Aim methods at leaves by their paths; the first pattern that matches a leaf decides.

    Args:
        rules: shell-style patterns over ``/``-joined paths (``*`` matches ``/`` too) to methods;
            None leaves what it matches alone, and so does matching no pattern.
        where: which leaves patterns choose from: by default matrices, kernels and embeddings, not
            biases and norms.

    Returns:
        One method.

    Raises:
        TypeError: a rule is neither a method nor None.
        ValueError: (from ``init``) a pattern matches nothing, or only what earlier ones took.

    Example:
        >>> import jax.numpy as jnp
        >>> method = partition({"head/*": None, "*": identity()})
        >>> params = {"head": {"kernel": jnp.ones((2, 2))}, "body": {"kernel": jnp.ones((2, 2))}}
        >>> method.apply(params, method.init(params))["head"] is params["head"]
        False
    """
    if not rules:
        raise ValueError("partition needs at least one rule: {'*': method} aims at every weight")
    methods = {pattern: method for pattern, method in rules.items() if method is not None}
    _check_methods(methods.values())

    def selections(params: Params) -> dict[str, tree_lib.Leaves]:
        everything = params if isinstance(params, tree_lib.Leaves) else tree_lib.flatten(params)
        # Inside a selection somebody has chosen already.
        test = (lambda path, leaf: True) if isinstance(params, tree_lib.Leaves) else where
        leaves = {path: leaf for path, leaf in everything.items() if test(path, leaf)}
        _explain_unmatched(rules, everything, leaves)
        chosen = {pattern: tree_lib.Leaves() for pattern in methods}
        for path, pattern in tree_lib.assign(rules, leaves).items():
            if pattern in chosen:
                chosen[pattern][path] = leaves[path]
        for pattern, part in chosen.items():
            if not part:
                raise ValueError(f"pattern '{pattern}' matches only leaves that earlier rules took")
        return chosen

    def part_state(state: State, pattern: str, part: tree_lib.Leaves) -> State:
        learned = {path: value for path, value in state.learned.items() if path in part}
        return State(learned, state.buffers[pattern])

    def union(states: dict[str, State]) -> State:
        learned = {path: v for state in states.values() for path, v in state.learned.items()}
        return State(learned, {pattern: state.buffers for pattern, state in states.items()})

    def mapped(name: str) -> Callable[[Params, State], Any]:
        def function(params: Params, state: State) -> Any:
            news = {}
            for pattern, part in selections(params).items():
                call = getattr(methods[pattern], name)
                if call is None:
                    # A method that cannot live in the weights does all its work in `apply`.
                    call = keep if name == "project" else methods[pattern].apply
                news.update(call(part, part_state(state, pattern, part)))
            return tree_lib.replace(params, news)

        return function

    def init(params: Params) -> State:
        return union({p: methods[p].init(part) for p, part in selections(params).items()})

    def update(params: Params, state: State, grads: Params) -> State:
        states = {}
        for pattern, part in selections(params).items():
            part_grads = None if grads is None else tree_lib.take(grads, part)
            part_old = part_state(state, pattern, part)
            states[pattern] = methods[pattern].update(part, part_old, part_grads)
        return union(states)

    def restart(old: State, new: State) -> dict[str, Any]:
        marks: dict[str, Any] = {}
        for pattern, method in methods.items():
            if method.restart:
                # A selection's learned things are not told apart here: masks live in buffers.
                states = (State({}, state.buffers[pattern]) for state in (old, new))
                marks |= method.restart(*states)
        return marks

    def rewind(params: Params, old: State, new: State) -> Params:
        news = {}
        for pattern, part in selections(params).items():
            call = methods[pattern].rewind
            if call:
                parts = (part_state(state, pattern, part) for state in (old, new))
                news.update(call(part, *parts))
        return tree_lib.replace(params, news)

    base = Compression(init, mapped("apply"), update, mapped("pack"))
    if not any(method.project for method in methods.values()):
        return base
    in_weights = all(method.apply_projected is keep for method in methods.values())
    rest = keep if in_weights else mapped("apply_projected")
    return base._replace(
        project=mapped("project"),
        apply_projected=rest,
        restart=restart if any(method.restart for method in methods.values()) else None,
        rewind=rewind if any(method.rewind for method in methods.values()) else None,
    )


def _explain_unmatched(rules: Any, everything: Any, leaves: Any) -> None:
    """Say so where a pattern names real leaves that are not weights."""
    for pattern in rules:
        named = tree_lib.matching(pattern, everything)
        if named and not any(path in leaves for path in named):
            raise ValueError(
                f"pattern '{pattern}' matches only leaves that are not compressed by default "
                f"({named[0]}): pass where=lambda path, leaf: True to choose from all leaves"
            )


def _any_mark(marks: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Union of masks by path."""
    found: dict[str, Any] = {}
    for each in marks:
        for path, mark in each.items():
            found[path] = found[path] | mark if path in found else mark
    return found


def _check_methods(methods: Any) -> None:
    for method in methods:
        if not isinstance(method, Compression):
            raise TypeError(f"{method!r} is not a Compression: call the function that makes one")


def _join(states: list[State]) -> State:
    """States of a chain as one; learned things under their leaf, then the method's position."""
    learned: dict[str, Any] = {}
    for index, state in enumerate(states):
        for path, value in state.learned.items():
            learned.setdefault(path, {})[str(index)] = value
    return State(learned, tuple(state.buffers for state in states))


def _split(state: State, count: int) -> list[State]:
    if not isinstance(state.buffers, tuple) or len(state.buffers) != count:
        raise ValueError(f"the state is not that of a chain of {count} methods: use its own `init`")
    return [
        State({p: v[str(i)] for p, v in state.learned.items() if str(i) in v}, buffers)
        for i, buffers in enumerate(state.buffers)
    ]


def _cotangents(
    methods: tuple[Compression, ...], states: list[State], params: Params, grads: Params
) -> list[Params]:
    """The gradient with respect to each method's output."""
    if grads is None or len(methods) < 2:
        return [grads] * len(methods)
    pulls = []
    for method, state in zip(methods, states, strict=True):
        params, pull = jax.vjp(lambda p, m=method, s=state: m.apply(p, s), params)
        pulls.append(pull)
    found = [grads]
    for pull in reversed(pulls[1:]):
        found.append(pull(found[-1])[0])
    return found[::-1]
