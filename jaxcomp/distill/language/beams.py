"""Sequence-level distillation: a student learns the texts that its teacher finds likeliest.

The teacher's beam search writes them once; the student is trained on them as on any text, by plain
cross-entropy at the positions ``where``.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxcomp.checks import check_count
from jaxcomp.distill.language.sampling import (
    Apply,
    Options,
    check_prompts,
    checked_logits,
    run_loop,
    with_room,
)


class Beams(NamedTuple):
    """The texts that a search has found, likeliest first.

    Attributes:
        tokens: ``(batch, beams, length + steps)``, padded on the right.
        lengths: ``(batch, beams)`` int32, tokens that are no padding: prompt, text, ending token.
        scores: ``(batch, beams)`` float32, log-probability of what was written; ``-inf`` where
            there are fewer texts than beams.
        where: ``(batch, beams, length + steps)`` boolean, the positions whose logits chose a token
            that was written: position ``i`` predicts token ``i + 1``.
    """

    tokens: Int[Array, "batch beams total"]
    lengths: Int[Array, "batch beams"]
    scores: Float[Array, "batch beams"]
    where: Bool[Array, "batch beams total"]


def beam_search(
    apply_fn: Apply,
    params: Any,
    tokens: Shaped[ArrayLike, "batch length"],
    lengths: Shaped[ArrayLike, " batch"],
    *,
    beams: int,
    steps: int,
    end: int | None = None,
    pad: int = 0,
) -> Beams:
    """The likeliest continuations of prompts that a beam finds, in one compiled loop.

    Texts are ranked by their log-probability alone, as in the paper; one that has ended keeps its
    place in the beam until better ones push it out. With as many beams as there are texts the
    search is exact; with one it is greedy. To rank by another rule, such as the log-probability of
    a token, sort by ``scores`` and ``lengths``.

    Args:
        apply_fn: ``apply_fn(params, tokens) -> logits``, ``(n, total)`` integers to
            ``(n, total, vocabulary)`` for ``n = batch * beams``. Logits must not depend on tokens
            to their right. It is compiled with: pass the same function each time, or call this
            inside ``jax.jit``.
        params: of the model.
        tokens: ``(batch, length)`` integers, prompts padded on the right.
        lengths: ``(batch,)`` integers, of the prompts, at least 1.
        beams: how many texts to follow.
        steps: most tokens to write after each prompt.
        end: token that ends a text. None: ``steps`` tokens are written.
        pad: token that fills up.

    Returns:
        The texts, likeliest first: ``found.tokens[:, 0]`` with ``found.where[:, 0]`` are targets.

    Raises:
        TypeError: tokens or lengths that are not integers.
        ValueError: shapes that do not fit, no steps or beams, lengths outside 1 to length.

    Example:
        >>> table = jnp.log(jnp.array([[0.1, 0.5, 0.4], [0.6, 0.3, 0.1], [0.0, 0.0, 1.0]]))
        >>> def apply_fn(table, tokens):  # what follows depends on the last token only
        ...     return table[tokens]
        >>> found = beam_search(
        ...     apply_fn, table, jnp.array([[0]]), jnp.array([1]), beams=2, steps=2
        ... )
        >>> print(found.tokens[0], (100 * jnp.exp(found.scores[0])).round())
        [[0 2 2]
         [0 1 0]] [40. 30.]

    Kim and Rush, "Sequence-Level Knowledge Distillation", 2016, section 3.2.
    """
    tokens, lengths = check_prompts(tokens, lengths, steps)
    check_count("beams", beams)
    options = Options(steps, end, pad, beams)
    return run_loop(_search, apply_fn, options, tokens, lengths, params)


class _State(NamedTuple):
    step: Array
    tokens: Array  # (batch, beams, total)
    ends: Array  # (batch, beams)
    scores: Array
    done: Array


def _search(apply_fn: Apply, options: Options, tokens: Array, lengths: Array, params: Any) -> Beams:
    texts, beams, end = with_room(tokens, lengths, options), options.beams, options.end
    batch, total = texts.shape
    spread = lambda x: jnp.repeat(x[:, None], beams, 1)
    start = _State(
        jnp.int32(0),
        spread(texts),
        spread(lengths),
        # All beams begin alike: only one of them may be followed.
        jnp.where(jnp.arange(beams) == 0, jnp.zeros((batch, 1), jnp.float32), -jnp.inf),
        jnp.zeros((batch, beams), bool),
    )

    def going(state: _State) -> Array:
        return (state.step < options.steps) & ~jnp.all(state.done)

    def extend(state: _State) -> _State:
        tokens = state.tokens.reshape(batch * beams, total)
        logits = checked_logits(apply_fn(params, tokens), tokens.shape)
        last = logits[jnp.arange(batch * beams), state.ends.reshape(-1) - 1]
        log_p = jax.nn.log_softmax(last.astype(jnp.float32), -1).reshape(batch, beams, -1)
        return _best(state, log_p, end)

    state = jax.lax.while_loop(going, extend, start)
    at = jnp.arange(total)
    first, last = lengths[:, None, None] - 1, state.ends[..., None] - 1
    return Beams(state.tokens, state.ends, state.scores, (at >= first) & (at < last))


def _best(state: _State, log_p: Array, end: int | None) -> _State:
    """Extend every text by every token, and keep the best; a text that is done stays as it is."""
    batch, beams, vocabulary = log_p.shape
    # Of a text that is done one copy goes on, as if its next token were sure.
    stays = jnp.where(jnp.arange(vocabulary) == 0, 0, -jnp.inf)
    scores = state.scores[..., None] + jnp.where(state.done[..., None], stays, log_p)
    scores, chosen = jax.lax.top_k(scores.reshape(batch, -1), beams)
    parent, token = chosen // vocabulary, chosen % vocabulary
    texts = jnp.take_along_axis(state.tokens, parent[..., None], 1)
    ends, done = (jnp.take_along_axis(x, parent, 1) for x in (state.ends, state.done))
    row, beam = jnp.arange(batch)[:, None], jnp.arange(beams)
    texts = texts.at[row, beam, ends].set(jnp.where(done, texts[row, beam, ends], token))
    over = done if end is None else done | (token == end)
    return _State(state.step + 1, texts, jnp.where(done, ends, ends + 1), scores, over)
