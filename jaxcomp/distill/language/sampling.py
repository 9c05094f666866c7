"""Text that a student writes itself, to learn from on its own mistakes.

A student that only sees the text of others is taught nothing about what follows its own. On-policy
distillation (GKD) lets it write after prompts, and has the teacher judge every token of that. In a
train step, with the share ``on_policy`` (the paper's lambda) of such batches::

    def train_step(params, opt_state, batch, key):
        choose, write = jax.random.split(key)
        written = sample_tokens(apply_fn, params, batch.prompts, batch.lengths, write, steps=64)
        own = jax.random.bernoulli(choose, on_policy)
        tokens = jnp.where(own, written.tokens, batch.tokens)  # padded to the same length
        where = jnp.where(own, written.where, batch.where)

        def loss_fn(params):
            student, teacher = apply_fn(params, tokens), apply_fn(teacher_params, tokens)
            loss = jensen_shannon_divergence(student, teacher, interpolation=0.5, where=where)
            return loss.sum() / where.sum()

Nothing is differentiated through the tokens. A ``jax.lax.cond`` in place of ``jnp.where`` saves the
writing in steps that do not use it.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Int, PRNGKeyArray, Shaped

from jaxcomp.checks import check_count
from jaxcomp.distill.inputs import check_scalar, known
from jaxcomp.sharding import automatic, spec_like

Apply = Callable[[Any, Array], Array]
Step = Callable[[Any, Any, Array], tuple[Array, Any]]


class Written(NamedTuple):
    """Prompts with what was written after them.

    Attributes:
        tokens: ``(batch, length + steps)``, padded on the right.
        lengths: ``(batch,)`` int32, tokens that are no padding: prompt, text, its ending token.
        where: ``(batch, length + steps)`` boolean, the positions whose *logits* chose a token that
            was written: position ``i`` predicts token ``i + 1``. The ``where=`` of a loss between
            logits of ``tokens``.
    """

    tokens: Int[Array, "batch total"]
    lengths: Int[Array, " batch"]
    where: Bool[Array, "batch total"]


class Options(NamedTuple):
    """What a loop is compiled for; ``beams`` matters to a search only."""

    steps: int
    end: int | None
    pad: int
    beams: int = 1


def sample_tokens(
    apply_fn: Apply,
    params: Any,
    tokens: Shaped[ArrayLike, "batch length"],
    lengths: Shaped[ArrayLike, " batch"],
    key: PRNGKeyArray | Shaped[Array, "2"],
    *,
    steps: int,
    temperature: ArrayLike = 1.0,
    end: int | None = None,
    pad: int = 0,
) -> Written:
    """Write after prompts with a model's own samples, in one compiled loop.

    The model reads the whole text at every step, so that any causal model will do as it is, without
    a cache; :func:`decode_tokens` is for those that have one.

    Args:
        apply_fn: ``apply_fn(params, tokens) -> logits``, ``(batch, total)`` integers to
            ``(batch, total, vocabulary)``. Logits must not depend on tokens to their right. It is
            compiled with: pass the same function each time, or call this inside ``jax.jit``.
        params: of the model.
        tokens: ``(batch, length)`` integers, prompts padded on the right.
        lengths: ``(batch,)`` integers, of the prompts, at least 1.
        key: of the samples.
        steps: most tokens to write after each prompt.
        temperature: that logits are divided by, at least 0, possibly traced; 0 takes the likeliest.
        end: token that ends a text; it is written, nothing after it. None: ``steps`` are written.
        pad: token that fills up.

    Returns:
        The texts, and where the model wrote.

    Raises:
        TypeError: tokens or lengths that are not integers.
        ValueError: shapes that do not fit, no steps, lengths outside 1 to length, a temperature
            below 0.

    Example:
        >>> def apply_fn(params, tokens):  # whatever stands there, the next number follows
        ...     return 9.0 * jax.nn.one_hot(tokens + 1, 8)
        >>> prompts, lengths = jnp.array([[1, 2, 0], [4, 0, 0]]), jnp.array([2, 1])
        >>> written = sample_tokens(
        ...     apply_fn, {}, prompts, lengths, jax.random.key(0), steps=3, temperature=0.0, end=6
        ... )
        >>> print(written.tokens)
        [[1 2 3 4 5 0]
         [4 5 6 0 0 0]]
        >>> print(written.where.astype(int))
        [[0 1 1 1 0 0]
         [1 1 0 0 0 0]]

    Agarwal et al., "On-Policy Distillation of Language Models: Learning from Self-Generated
    Mistakes", 2024, algorithm 1.
    """
    tokens, lengths = check_prompts(tokens, lengths, steps)
    temperature = _check_temperature(temperature)
    options = Options(steps, end, pad)
    return run_loop(_sample, apply_fn, options, tokens, lengths, params, key, temperature)


def decode_tokens(
    step_fn: Step,
    params: Any,
    cache: Any,
    tokens: Shaped[ArrayLike, "batch length"],
    lengths: Shaped[ArrayLike, " batch"],
    key: PRNGKeyArray | Shaped[Array, "2"],
    *,
    steps: int,
    temperature: ArrayLike = 1.0,
    end: int | None = None,
    pad: int = 0,
) -> Written:
    """:func:`sample_tokens` for a model that keeps a cache, one token at a time.

    All examples are at the same position in every step, prompts included: those with short prompts
    write while others still read. So the cache needs no notion of padding, at ``length + steps``
    steps of one token each.

    Args:
        step_fn: ``step_fn(params, cache, tokens) -> (logits, cache)``: the next ``(batch,)``
            tokens to the ``(batch, vocabulary)`` logits of what follows them. It is compiled with.
        params: of the model.
        cache: empty, with room for ``length + steps`` positions; its shapes and dtypes stay.
        tokens: as in :func:`sample_tokens`, like all that follow.
        lengths: of the prompts.
        key: of the samples.
        steps: most tokens to write after each prompt.
        temperature: that logits are divided by.
        end: token that ends a text.
        pad: token that fills up.

    Returns:
        The texts, and where the model wrote. With the key of :func:`sample_tokens` they are other
        samples: the keys go to other steps.

    Raises:
        TypeError: tokens or lengths that are not integers.
        ValueError: shapes that do not fit, no steps, lengths outside 1 to length, a temperature
            below 0.

    Example:
        >>> def step_fn(params, cache, token):  # the sum of all tokens so far follows
        ...     cache = cache + token
        ...     return 9.0 * jax.nn.one_hot(cache, 8), cache
        >>> prompts, lengths = jnp.array([[1, 1], [3, 0]]), jnp.array([2, 1])
        >>> empty = jnp.zeros(2, jnp.int32)
        >>> key = jax.random.key(0)
        >>> decode_tokens(
        ...     step_fn, {}, empty, prompts, lengths, key, steps=2, temperature=0.0
        ... ).tokens.tolist()
        [[1, 1, 2, 4], [3, 3, 6, 0]]

    Agarwal et al., "On-Policy Distillation of Language Models: Learning from Self-Generated
    Mistakes", 2024, algorithm 1.
    """
    tokens, lengths = check_prompts(tokens, lengths, steps)
    temperature = _check_temperature(temperature)
    options = Options(steps, end, pad)
    return run_loop(_decode, step_fn, options, tokens, lengths, params, cache, key, temperature)


def check_prompts(tokens: Any, lengths: Any, steps: int) -> tuple[Array, Array]:
    """Prompts and their lengths as arrays of int32.

    Raises:
        TypeError: they are not integers.
        ValueError: shapes that do not fit, no steps, lengths outside 1 to length.

    Example:
        >>> check_prompts(jnp.ones((2, 3), int), jnp.array([1, 4]), 5)
        Traceback (most recent call last):
        ...
        ValueError: lengths hold 4, but prompts have 1 to 3 tokens: ...
    """
    value = known(lengths)
    tokens, lengths = jnp.asarray(tokens), jnp.asarray(lengths)
    for name, array in (("tokens", tokens), ("lengths", lengths)):
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise TypeError(f"{name} must be integers, got {array.dtype}: cast them.")
    if tokens.ndim != 2 or lengths.shape != tokens.shape[:1] or 0 in tokens.shape:
        raise ValueError(
            f"tokens {tokens.shape} must be (batch, length), neither of them 0, and lengths "
            f"{lengths.shape} (batch,)."
        )
    check_count("steps", steps)
    longest = tokens.shape[1]
    if value is not None and not (np.all(value >= 1) and np.all(value <= longest)):
        wrong = value[(value < 1) | (value > longest)][0]
        raise ValueError(
            f"lengths hold {wrong}, but prompts have 1 to {longest} tokens: begin an empty one "
            "with the token that begins texts."
        )
    return tokens.astype(jnp.int32), lengths.astype(jnp.int32)


def checked_logits(logits: Any, shape: tuple[int, ...]) -> Any:
    """What a model returned, if it is logits for tokens of this shape.

    Raises:
        TypeError: it is no array.
        ValueError: it has another shape.

    Example:
        >>> checked_logits(jnp.ones((2, 9)), (2, 3))
        Traceback (most recent call last):
        ...
        ValueError: the model gives (2, 9) for tokens (2, 3): it must give (2, 3, vocabulary).
    """
    if not hasattr(logits, "shape"):
        kind = type(logits).__name__
        raise TypeError(f"the model gives a {kind}: wrap it in a function that gives logits alone.")
    if logits.ndim != len(shape) + 1 or logits.shape[:-1] != shape:
        wanted = f"({', '.join(map(str, shape))}, vocabulary)"
        message = f"the model gives {logits.shape} for tokens {shape}"
        raise ValueError(f"{message}: it must give {wanted}.")
    return logits


def with_room(tokens: Array, lengths: Array, options: Options) -> Array:
    """Prompts with room for what is to be written, and padding behind all of them.

    Example:
        >>> with_room(jnp.array([[5, 6, 9]]), jnp.array([2]), Options(2, None, 0)).tolist()
        [[5, 6, 0, 0, 0]]
    """
    tokens = jnp.pad(tokens, ((0, 0), (0, options.steps)))
    return jnp.where(jnp.arange(tokens.shape[1]) < lengths[:, None], tokens, options.pad)


@functools.partial(jax.jit, static_argnames=("loop", "model", "options"))
def run_loop(
    loop: Callable[..., Any], model: Callable[..., Any], options: Options, *arrays: Any
) -> Any:
    """Compile a loop with a model; what comes out lies as the prompts, the first array, do.

    Example:
        >>> loop = lambda model, options, tokens: model(tokens)[:, : options.steps]
        >>> run_loop(loop, jnp.square, Options(1, None, 0), jnp.array([[2, 3]])).tolist()
        [[4]]
    """
    rows = spec_like(arrays[0], (len(arrays[0]), 1))
    loop = functools.partial(loop, model, options)
    return automatic(loop, out=PartitionSpec(*rows[:1]))(*arrays)


def _check_temperature(temperature: Any) -> Array:
    high = jnp.finfo(jnp.float32).max
    return check_scalar("temperature", temperature, 0, high, "must be 0 or above, and finite")


def _choose(logits: Array, key: Array, temperature: Array) -> Array:
    """A sample of the softmax at a temperature: Gumbel's, which is the maximum at temperature 0."""
    logits = logits.astype(jnp.float32)
    noise = jax.random.gumbel(key, logits.shape, logits.dtype)
    return jnp.argmax(logits + temperature.astype(logits.dtype) * noise, -1).astype(jnp.int32)


def _written(tokens: Array, before: Array, lengths: Array) -> Written:
    at = jnp.arange(tokens.shape[1])
    where = (at >= before[:, None] - 1) & (at < lengths[:, None] - 1)
    return Written(tokens, lengths, where)


def _sample(
    apply_fn: Apply,
    options: Options,
    tokens: Array,
    lengths: Array,
    params: Any,
    key: Any,
    temperature: Array,
) -> Written:
    rows = jnp.arange(len(tokens))

    def going(state: Any) -> Array:
        step, _, _, done = state
        return (step < options.steps) & ~jnp.all(done)

    def write(state: Any) -> Any:
        step, texts, ends, done = state
        # One row of logits an example: those that choose what comes next.
        logits = checked_logits(apply_fn(params, texts), texts.shape)[rows, ends - 1]
        token = _choose(logits, jax.random.fold_in(key, step), temperature)
        texts = texts.at[rows, ends].set(jnp.where(done, texts[rows, ends], token))
        over = done if options.end is None else done | (token == options.end)
        return step + 1, texts, jnp.where(done, ends, ends + 1), over

    texts = with_room(tokens, lengths, options)
    start = (jnp.int32(0), texts, lengths, jnp.zeros_like(lengths, bool))
    _, texts, ends, _ = jax.lax.while_loop(going, write, start)
    return _written(texts, lengths, ends)


def _decode(
    step_fn: Step,
    options: Options,
    tokens: Array,
    lengths: Array,
    params: Any,
    cache: Any,
    key: Any,
    temperature: Array,
) -> Written:
    texts = with_room(tokens, lengths, options)
    most = lengths + options.steps

    def going(state: Any) -> Array:
        at, _, _, _, done = state
        return (at < texts.shape[1] - 1) & ~jnp.all(done)

    def write(state: Any) -> Any:
        at, texts, cache, ends, done = state
        logits, cache = step_fn(params, cache, texts[:, at])
        logits = checked_logits(logits, texts.shape[:1])
        token = _choose(logits, jax.random.fold_in(key, at), temperature)
        writes = (at + 1 >= lengths) & ~done
        texts = texts.at[:, at + 1].set(jnp.where(writes, token, texts[:, at + 1]))
        ends = ends + writes
        done = done | (ends >= most)
        if options.end is not None:
            done = done | writes & (token == options.end)
        return at + 1, texts, cache, ends, done

    start = (jnp.int32(0), texts, cache, lengths, jnp.zeros_like(lengths, bool))
    _, texts, _, ends, _ = jax.lax.while_loop(going, write, start)
    return _written(texts, lengths, ends)
