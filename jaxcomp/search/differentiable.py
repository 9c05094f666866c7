"""Search by gradients: architecture logits trained beside the weights, on data held out.

What is chosen is relaxed to a mixture of the options, whose weights come from logits. Any loss of
the mixture will do: of :meth:`jaxcomp.search.Supernet.mixed` parameters, or of a model that sums
its options itself.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcomp import checks
from jaxcomp.search.spaces import Choice


class SearchState(NamedTuple):
    """Where a search stands; an ordinary pytree.

    Attributes:
        params: the weights.
        logits: the architecture's, in the structure of the space, (options,) for each choice.
        weight_state: of the weights' optimizer.
        logit_state: of the architecture's optimizer.
        step: of either, int32.
        key: a PRNG key, for the noise to come.
    """

    params: Any
    logits: Any
    weight_state: Any
    logit_state: Any
    step: Any
    key: Any


class Told(NamedTuple):
    """What a step tells.

    Attributes:
        loss: of the training batch.
        held_out: of the batch held out, without the penalty.
        penalty: what was added to it.
        entropy: mean over the choices, as a fraction of that of even odds; 0 is a decision.
    """

    loss: Any
    held_out: Any
    penalty: Any
    entropy: Any


class Search(NamedTuple):
    """A search by gradients as two pure functions.

    Attributes:
        init: ``init(params, key) -> state``.
        step: ``step(state, batch, held_out_batch) -> (state, Told)``; jit it, scan it.
    """

    init: Callable[..., Any]
    step: Callable[..., Any]


def logits(space: Any) -> Any:
    """Even odds for everything that a space chooses.

    Args:
        space: dicts, lists and tuples with choices among constants; constants stand for themselves.

    Returns:
        The same structure with zeros (options,) in the place of choices; None of constants.

    Raises:
        TypeError: a part is no choice, or an option is a space.

    Example:
        >>> logits({"act": Choice(("relu", "gelu")), "bias": True})
        {'act': Array([0., 0.], dtype=float32), 'bias': None}
    """
    return _walk(space, "", lambda part: jnp.zeros(len(part.spaces)))


def decide(space: Any, logits: Any) -> Any:
    """The candidate with the likeliest option of each choice; of two alike, the first.

    Args:
        space: as for :func:`logits`.
        logits: in its structure, or weights.

    Returns:
        A candidate of the space.

    Raises:
        TypeError: as :func:`logits`.
        ValueError: logits are not finite, or not one for each option.

    Example:
        >>> decide({"act": Choice(("relu", "gelu"))}, {"act": jnp.array([-1.0, 2.0])})
        {'act': 'gelu'}
    """

    def likeliest(part: Choice, path: str, own: Any) -> Any:
        if jnp.shape(own) != (len(part.spaces),):
            raise ValueError(
                f"{path}: logits of shape {jnp.shape(own)}, but there are {len(part.spaces)} "
                "options: give those that logits(space) made"
            )
        if not bool(jnp.isfinite(own).all()):
            raise ValueError(f"{path}: logits are not finite: lower the architecture's step size")
        return (part.names if part.is_named else part.spaces)[int(jnp.argmax(own))]

    return _walk(space, "", likeliest, logits)


def _walk(space: Any, path: str, of: Callable[..., Any], *beside: Any) -> Any:
    if isinstance(space, Choice):
        options = space.spaces
        if any(
            isinstance(option, (dict, list, tuple)) or hasattr(option, "__dataclass_fields__")
            for option in options
        ):
            raise TypeError(f"{path or 'space'}: an option is a space: choose among constants only")
        return of(space, *((path, *beside) if beside else ()))
    inside = lambda key: [_part(each, key, path) for each in beside]
    if isinstance(space, dict):
        return {k: _walk(sub, f"{path}/{k}".strip("/"), of, *inside(k)) for k, sub in space.items()}
    if isinstance(space, (list, tuple)) and not hasattr(space, "_fields"):
        pairs = enumerate(space)
        return type(space)(_walk(sub, f"{path}/{i}".strip("/"), of, *inside(i)) for i, sub in pairs)
    if hasattr(space, "__dataclass_fields__") or hasattr(space, "_fields"):
        raise TypeError(
            f"{path or 'space'}: {type(space).__name__} has no logits: make it a Choice"
        )
    return space if beside else None


def _part(logits: Any, key: Any, path: str) -> Any:
    try:
        return logits[key]
    except (KeyError, IndexError, TypeError):
        raise ValueError(
            f"{f'{path}/{key}'.strip('/')}: there are no logits of it: give those that "
            "logits(space) made"
        ) from None


def probabilities(logits: Any) -> Any:
    """How likely each option is: the softmax of each choice's logits.

    Example:
        >>> probabilities({"act": jnp.zeros(2)})
        {'act': Array([0.5, 0.5], dtype=float32)}
    """
    return jax.tree.map(jax.nn.softmax, logits)


def gumbel_softmax(logits: Any, key: Any, temperature: Any, hard: bool = False) -> Any:
    """Draw a relaxed one-hot vector for each choice.

    Args:
        logits: any tree of (..., options) arrays.
        key: a PRNG key; each array has noise of its own. None: no noise, the tempered softmax.
        temperature: above 0; the lower, the nearer to one-hot. May be traced.
        hard: make it one-hot, with the gradient of the relaxed one (straight through).

    Returns:
        The same structure; the last axis sums to one. The largest entry is an option drawn with
        the softmax's odds, at any temperature.

    Raises:
        TypeError: ``key`` is no key.
        ValueError: ``temperature`` is a known number that is not above 0.

    Example:
        >>> drawn = gumbel_softmax(jnp.zeros(3), jax.random.key(0), 0.5, hard=True)
        >>> float(drawn.sum()), float(drawn.max())
        (1.0, 1.0)

    Jang, Gu and Poole, Categorical Reparameterization with Gumbel-Softmax (2017), section 2;
    Maddison, Mnih and Teh, The Concrete Distribution (2017).
    """
    if checks.is_number(temperature) and not temperature > 0:
        raise ValueError(f"temperature must be above 0, not {temperature!r}")
    if key is not None:
        checks.check_key(key)
    leaves, structure = jax.tree.flatten(jax.tree.map(jnp.asarray, logits))
    keys = [None] * len(leaves) if key is None else jax.random.split(key, len(leaves))
    drawn = []
    for leaf, each in zip(leaves, keys, strict=True):
        noise = 0.0 if each is None else jax.random.gumbel(each, leaf.shape, leaf.dtype)
        soft = jax.nn.softmax((leaf + noise) / temperature)
        if hard:
            whole = jax.nn.one_hot(jnp.argmax(soft, -1), soft.shape[-1], dtype=soft.dtype)
            # Exactly one-hot: whole + (soft - soft) need not be, to the last bit.
            soft = jax.lax.stop_gradient(whole) + (soft - jax.lax.stop_gradient(soft))
        drawn.append(soft)
    return jax.tree.unflatten(structure, drawn)


def darts(
    space: Any,
    loss: Any,
    weight_optimizer: Any,
    logit_optimizer: Any,
    *,
    temperature: Any = 1.0,
    hard: bool = False,
    noise: bool = True,
    inner_rate: Any = None,
    penalty: Any = None,
    warm_up: int = 0,
) -> Search:
    """Train an architecture's logits on held-out data, by turns with the weights on training data.

    Each step moves the logits along the gradient of the held-out loss, at the weights as they are
    (first order) or as one step of gradient descent would make them (second order), and then the
    weights along that of the training loss. Both see the same draw of the noise.

    Args:
        space: as for :func:`logits`.
        loss: ``loss(params, weights, batch) -> scalar``, with ``weights`` in the structure of the
            space: how much of each option.
        weight_optimizer: of the weights.
        logit_optimizer: of the logits.
        temperature: of the relaxation, or a function of the step, such as
            ``optax.exponential_decay(5.0, 100, 0.9)``.
        hard: one option a choice and step, with straight-through gradients.
        noise: draw Gumbel noise; without it, the plain softmax mixture of DARTS.
        inner_rate: the step size of the step that the second order looks ahead; None: first order.
        penalty: ``penalty(probabilities) -> scalar``, added to the held-out loss: what the
            architecture costs, such as ``lambda p: 0.1 * net.expected_cost(p).flops / 1e6``.
        warm_up: steps in which the weights alone are trained.

    Returns:
        The search; :func:`decide` turns ``state.logits`` into a candidate.

    Raises:
        TypeError: a function or an optimizer is none; a part of the space is no choice among
            constants.
        ValueError: there is nothing to choose; a temperature or a rate is not above 0.

    Example:
        >>> space = {"act": Choice(("relu", "negated"))}
        >>> def loss(params, weights, batch):
        ...     x, y = batch
        ...     made = weights["act"] @ jnp.stack([jax.nn.relu(x), -x])
        ...     return jnp.mean((params["scale"] * made - y) ** 2)
        >>> search = darts(space, loss, optax.sgd(0.1), optax.adam(0.1), noise=False)
        >>> state = search.init({"scale": jnp.ones(())}, jax.random.key(0))
        >>> x = jnp.linspace(-1, 1, 16)
        >>> step = jax.jit(search.step)
        >>> for _ in range(30):
        ...     state, told = step(state, (x, -x), (x, -x))
        >>> decide(space, state.logits)
        {'act': 'negated'}

    Liu, Simonyan and Yang, DARTS (2019), algorithm 1 and equations 7 and 8, the step ahead
    differentiated exactly; with Gumbel noise as in Wu et al., FBNet (2019), equations 3 to 5.
    """
    start = logits(space)
    _check(start, loss, weight_optimizer, logit_optimizer, temperature, inner_rate, penalty)
    checks.check_count("warm_up", warm_up, 0)

    def init(params: Any, key: Any) -> SearchState:
        checks.check_key(key)
        states = weight_optimizer.init(params), logit_optimizer.init(start)
        return SearchState(params, start, *states, jnp.zeros((), jnp.int32), key)

    def held_out_loss(logits: Any, params: Any, draw: Any, batch: Any, held_out: Any) -> Any:
        weights = draw(logits)
        if inner_rate is not None:
            ahead = jax.grad(_checked(loss))(params, weights, batch)
            params = jax.tree.map(lambda p, g: p - inner_rate * g, params, ahead)
        value = checks.one_number(loss(params, weights, held_out))
        added = jnp.zeros(()) if penalty is None else penalty(probabilities(logits))
        if jnp.shape(added) != ():
            raise TypeError(f"penalty must return one number, not an array of {jnp.shape(added)}")
        return value + added, (value, added)

    def step(state: SearchState, batch: Any, held_out_batch: Any) -> tuple[SearchState, Told]:
        now = temperature(state.step) if callable(temperature) else temperature
        key, own = jax.random.split(state.key)
        draw = lambda logits: gumbel_softmax(logits, own if noise else None, now, hard)
        grads, (held_out, added) = jax.grad(held_out_loss, has_aux=True)(
            state.logits, state.params, draw, batch, held_out_batch
        )
        changes, logit_state = logit_optimizer.update(grads, state.logit_state, state.logits)
        moved = optax.apply_updates(state.logits, changes), logit_state
        before = state.logits, state.logit_state
        chosen, logit_state = _where(state.step >= warm_up, moved, before)
        value, slopes = jax.value_and_grad(_checked(loss))(state.params, draw(chosen), batch)
        updates, weight_state = weight_optimizer.update(slopes, state.weight_state, state.params)
        params = optax.apply_updates(state.params, updates)
        told = Told(value, held_out, added, entropy(chosen))
        return SearchState(params, chosen, weight_state, logit_state, state.step + 1, key), told

    return Search(init, step)


def _check(
    start: Any,
    loss: Any,
    weight_optimizer: Any,
    logit_optimizer: Any,
    temperature: Any,
    inner_rate: Any,
    penalty: Any,
) -> None:
    checks.check_function("loss", loss, "(params, weights, batch)")
    if not jax.tree.leaves(start):
        raise ValueError("space: there is nothing to choose in it")
    for name, value in (("weight", weight_optimizer), ("logit", logit_optimizer)):
        if not (hasattr(value, "init") and hasattr(value, "update")):
            raise TypeError(f"{name}_optimizer must be an optimizer of optax, not {value!r:.60}")
    if inner_rate is not None and not (checks.is_number(inner_rate) and inner_rate > 0):
        raise ValueError(f"inner_rate must be above 0, or None for first order, not {inner_rate!r}")
    if not callable(temperature) and not (checks.is_number(temperature) and temperature > 0):
        raise ValueError(f"temperature must be above 0, or a function, not {temperature!r}")
    if penalty is not None:
        checks.check_function("penalty", penalty, "(probabilities,)")


def entropy(logits: Any) -> Any:
    """How undecided logits are: 1 for even odds, 0 for a decision; mean over the choices.

    Example:
        >>> print(f"{entropy({'act': jnp.zeros(4), 'bias': jnp.array([9.0, -9.0])}):.3f}")
        0.500
    """
    found = []
    for leaf in jax.tree.leaves(logits):
        if leaf.shape[-1] > 1:
            logs = jax.nn.log_softmax(leaf)
            chances = jnp.exp(logs)
            # An option that is ruled out by a logit of -inf adds nothing.
            terms = jnp.where(chances > 0, chances * logs, 0.0)
            found.append(-terms.sum(-1).mean() / jnp.log(leaf.shape[-1]))
    return jnp.mean(jnp.stack(found)) if found else jnp.zeros(())


def _checked(loss: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *given: checks.one_number(loss(*given))


def _where(condition: Any, first: Any, second: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), first, second)
