"""How sparse and how many bits each layer shall be: as a space, as rules by path."""

from collections.abc import Callable, Mapping
from typing import Any

from jaxcomp import checks, tree
from jaxcomp.search.spaces import Choice
from jaxcomp.search.spaces.kinds import is_constant


def compressions(
    params: Any,
    *,
    sparsities: Any = (0.0, 0.5, 0.75, 0.9),
    bits: Any = (2, 3, 4, 8, None),
    patterns: Any = None,
    where: Callable[[str, Any], bool] = tree.is_weight,
) -> dict[str, Any]:
    """A space of compression settings, one part for the sparsity and one for the bits of each leaf.

    A candidate is a dict of rules, ``{path: {"sparsity": …, "bits": …}}``; :func:`setting` takes
    one of them out, as ``prune.allocation.fixed`` and ``jaxcomp.partition`` want it.

    Args:
        params: the parameter tree; shapes alone will do.
        sparsities: fractions that a leaf may lose: a sequence or a part; None leaves them out.
        bits: that a weight may have: a sequence, in which None stands for none of the kind, or a
            part; None leaves them out.
        patterns: settings that leaves share, shell-style over paths; the first that matches a leaf
            has it, leaves that none matches are left alone. None: each leaf has its own.
        where: which leaves, by default matrices, kernels and embeddings.

    Returns:
        A space, by path or pattern.

    Raises:
        TypeError: ``sparsities`` or ``bits`` are neither a sequence nor a part, or hold what is no
            number; ``patterns`` are none.
        ValueError: there is nothing to choose; a number is out of range; no leaf is meant; a
            pattern matches none.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxcomp.search import spaces
        >>> params = {"Dense_0": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
        >>> space = compressions(params, sparsities=(0.0, 0.5), bits=(4, 8))
        >>> candidate = spaces.decode(
        ...     space, {"Dense_0/kernel/sparsity": 1, "Dense_0/kernel/bits": 0}
        ... )
        >>> candidate
        {'Dense_0/kernel': {'sparsity': 0.5, 'bits': 4}}
        >>> setting(candidate, "sparsity")
        {'Dense_0/kernel': 0.5}
    """
    parts = {"sparsity": sparsities, "bits": bits}
    parts = {name: _part(name, given) for name, given in parts.items() if given is not None}
    if not parts:
        raise ValueError("compressions: sparsities and bits are both None: give one of them")
    leaves = tree.select(params, where, check=False)
    names = list(leaves)
    if patterns is not None:
        patterns = checks.as_patterns(patterns)
        matched = tree.assign(patterns, leaves)
        names = [pattern for pattern in patterns if pattern in matched.values()]
        for pattern in patterns:
            if pattern not in names:
                raise ValueError(
                    f"pattern '{pattern}' matches only leaves that earlier ones took: put it first"
                )
    return {name: dict(parts) for name in names}


def setting(candidate: Mapping[str, Mapping[str, Any]], name: str, *more: str) -> dict[str, Any]:
    """One setting of each rule, or several together.

    Args:
        candidate: of :func:`compressions`.
        name: ``"sparsity"`` or ``"bits"``.
        *more: further ones.

    Returns:
        By path or pattern, in the order of the rules; a tuple for each if there are several names.

    Raises:
        ValueError: a rule has no such setting.

    Example:
        >>> setting({"head": {"bits": 4}, "body": {"bits": None}}, "bits")
        {'head': 4, 'body': None}
        >>> setting({"head": {"sparsity": 0.5, "bits": 4}}, "sparsity", "bits")
        {'head': (0.5, 4)}
    """
    names = (name, *more)
    for path, rule in candidate.items():
        for each in names:
            if each not in rule:
                raise ValueError(f"{path}: the rule has no {each!r}, only {', '.join(rule)}")
    if not more:
        return {path: rule[name] for path, rule in candidate.items()}
    return {path: tuple(rule[each] for each in names) for path, rule in candidate.items()}


def _part(name: str, given: Any) -> Any:
    # Parts are frozen dataclasses; a sequence is what a choice takes.
    return given if hasattr(given, "__dataclass_fields__") else _choice(name, given)


def _choice(name: str, given: Any) -> Choice:
    try:
        choice = Choice(given)
    except (TypeError, ValueError) as error:
        raise type(error)(f"compressions/{name}: {error}") from None
    constants: list[Any] = [option for option in choice.spaces if is_constant(option)]
    for value in constants:
        if name == "sparsity":
            checks.check_amount("compressions/sparsity", value)
            if value > 1:
                raise ValueError(f"compressions/sparsity is {value}: a fraction is at most 1")
        elif value is not None:
            checks.check_count("compressions/bits", value)
    return choice
