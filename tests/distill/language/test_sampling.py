"""Text from students and teachers: samples, greedy, beams, against enumeration; a GKD step."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy.special import log_softmax

from jaxcomp.distill.language.beams import beam_search
from jaxcomp.distill.language.divergences import jensen_shannon_divergence
from jaxcomp.distill.language.sampling import decode_tokens, sample_tokens

VOCABULARY, END = 5, 4


def apply_fn(params, tokens):
    """A small causal model whose logits depend on all tokens so far and on where they stand."""
    embedded = jnp.take(params["embedding"], tokens, 0)
    moved = embedded * params["position"][: tokens.shape[-1], None]
    return jnp.tanh(jnp.cumsum(moved, -2)) @ params["out"]


def step_fn(params, cache, token):
    at, total = cache
    total = total + params["embedding"][token] * params["position"][at]
    return jnp.tanh(total) @ params["out"], (at + 1, total)


def init(seed=0, width=6, spread=1.5):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: (spread * rng.normal(size=shape)).astype(np.float32)
    return {"embedding": draw(VOCABULARY, width), "position": draw(16), "out": draw(width, 5)}


def next_log_p(params, text, temperature=1.0):
    """Of the next token after one text without padding, in float64, by NumPy."""
    moved = params["embedding"][text] * params["position"][: len(text), None]
    logits = np.tanh(np.cumsum(moved, 0, dtype=np.float64))[-1] @ params["out"].astype(np.float64)
    return log_softmax(logits / temperature)


def greedy(params, text, steps, end):
    for _ in range(steps):
        text = [*text, int(next_log_p(params, text).argmax())]
        if text[-1] == end:
            break
    return text


def all_texts(params, prompt, steps, end):
    """Every text that can follow a prompt, with its log-probability, likeliest first."""
    open_, closed = [(list(prompt), 0.0)], []
    for _ in range(steps):
        longer = [
            ([*text, token], score + step)
            for text, score in open_
            for token, step in enumerate(next_log_p(params, text))
        ]
        closed += [x for x in longer if x[0][-1] == end]
        open_ = [x for x in longer if x[0][-1] != end]
    return sorted(open_ + closed, key=lambda x: -x[1])


PROMPTS = np.array([[1, 2, 3], [2, 9, 9], [0, 1, 9]])  # 9 is never read: it is behind the prompts
LENGTHS = np.array([3, 1, 2])
KEY = jax.random.key(0)


def texts_of(written):
    return [
        row[:n].tolist()
        for row, n in zip(np.asarray(written.tokens), np.asarray(written.lengths), strict=True)
    ]


def empty_cache(batch, width=6):
    return jnp.int32(0), jnp.zeros((batch, width))


def by_both(params, *args, **kwargs):
    return [
        sample_tokens(apply_fn, params, *args, **kwargs),
        decode_tokens(step_fn, params, empty_cache(len(args[0])), *args, **kwargs),
    ]


class TestSampling:
    @pytest.mark.parametrize("end", [None, END])
    def test_greedy_is_the_likeliest_token_each_time(self, end):
        for seed in range(4):
            params = init(seed)
            expected = [
                greedy(params, row[:n].tolist(), 4, end)
                for row, n in zip(PROMPTS, LENGTHS, strict=True)
            ]
            for written in by_both(
                params, PROMPTS, LENGTHS, KEY, steps=4, temperature=0.0, end=end
            ):
                assert texts_of(written) == expected

    def test_mask_lengths_and_padding_fit_the_tokens(self):
        params, ended = init(1), []
        for written in by_both(params, PROMPTS, LENGTHS, KEY, steps=4, end=END, pad=3):
            tokens, lengths, where = (np.asarray(x) for x in written)
            assert tokens.shape == where.shape == (3, 7)
            for i, (row, n) in enumerate(zip(tokens, lengths, strict=True)):
                np.testing.assert_array_equal(row[: LENGTHS[i]], PROMPTS[i, : LENGTHS[i]])
                assert (row[n:] == 3).all()
                new = row[LENGTHS[i] : n]
                assert END not in new[:-1]
                assert len(new) == 4 or new[-1] == END
                # Position i predicts token i + 1.
                expected = [LENGTHS[i] <= at + 1 < n for at in range(7)]
                np.testing.assert_array_equal(where[i], expected)
                ended.append(new[-1] == END)
        assert any(ended)
        assert not all(ended)

    @pytest.mark.parametrize("temperature", [0.7, 2.0])
    def test_samples_follow_the_distribution(self, temperature):
        params, count = init(2, spread=0.7), 4000
        prompts = np.tile([[1, 2]], (count, 1))
        exact = {}
        for first, second in itertools.product(range(VOCABULARY), repeat=2):
            p = next_log_p(params, [1, 2], temperature)[first]
            p += next_log_p(params, [1, 2, first], temperature)[second]
            exact[first, second] = np.exp(p)
        for written in by_both(
            params, prompts, np.full(count, 2), KEY, steps=2, temperature=temperature
        ):
            pairs = np.asarray(written.tokens)[:, 2:]
            seen = np.zeros((VOCABULARY, VOCABULARY))
            np.add.at(seen, (pairs[:, 0], pairs[:, 1]), 1)
            expected = count * np.array([[exact[i, j] for j in range(5)] for i in range(5)])
            # Chi-squared of 24 degrees of freedom: 60 is exceeded once in 15,000.
            assert (np.square(seen - expected) / expected).sum() < 60

    def test_the_key_decides(self):
        write = functools.partial(sample_tokens, apply_fn, init(2), PROMPTS, LENGTHS, steps=4)
        first, again, other = (write(jax.random.key(i)).tokens for i in (0, 0, 1))
        np.testing.assert_array_equal(first, again)
        assert (np.asarray(first) != np.asarray(other)).any()

    def test_under_jit_with_a_scheduled_temperature_and_unknown_lengths(self):
        params = init(1)
        traced = []

        @jax.jit
        def write(params, lengths, temperature):
            traced.append(None)
            return sample_tokens(
                apply_fn, params, PROMPTS, lengths, KEY, steps=4, temperature=temperature
            )

        for temperature in (0.0, 1.5):
            expected = sample_tokens(
                apply_fn, params, PROMPTS, LENGTHS, KEY, steps=4, temperature=temperature
            )
            jax.tree.map(
                np.testing.assert_array_equal, write(params, LENGTHS, temperature), expected
            )
        assert len(traced) == 1

    def test_a_token_without_probability_is_never_written(self):
        never = lambda params, tokens: (
            jnp.where(jnp.arange(5) == 2, 0, -jnp.inf) + 0.0 * tokens[..., None]
        )
        written = sample_tokens(never, {}, PROMPTS, LENGTHS, KEY, steps=3, temperature=50.0)
        assert np.asarray(written.tokens)[np.arange(8)[None, :6] >= LENGTHS[:, None]].max() == 2

    @pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
    def test_sharded_over_the_batch(self, kind):
        params, prompts, lengths = init(1), np.tile(PROMPTS[:2], (4, 1)), np.tile(LENGTHS[:2], 4)
        expected = sample_tokens(apply_fn, params, prompts, lengths, KEY, steps=3)
        mesh = jax.make_mesh((8,), ("batch",), axis_types=(kind,))
        place = NamedSharding(mesh, PartitionSpec("batch"))
        on = [jax.device_put(x, place) for x in (prompts, lengths)]
        actual = sample_tokens(apply_fn, params, *on, KEY, steps=3)
        jax.tree.map(np.testing.assert_array_equal, actual, expected)


class TestBeams:
    @pytest.mark.parametrize("end", [None, END])
    def test_with_room_for_all_texts_it_is_exact(self, end):
        for seed in range(3):
            params = init(seed)
            found = beam_search(
                apply_fn, params, PROMPTS, LENGTHS, beams=125, steps=3, end=end, pad=0
            )
            for i, n in enumerate(LENGTHS):
                best = all_texts(params, PROMPTS[i, :n], 3, end)
                tokens, ends = np.asarray(found.tokens)[i], np.asarray(found.lengths)[i]
                scores = np.asarray(found.scores)[i]
                np.testing.assert_allclose(scores[: len(best)], [s for _, s in best], atol=2e-5)
                assert (scores[len(best) :] == -np.inf).all()
                assert tokens[0, : ends[0]].tolist() == best[0][0]
                written = {tuple(row[:end]) for row, end in zip(tokens, ends, strict=True)}
                assert written >= {tuple(text) for text, _ in best}

    @pytest.mark.parametrize("end", [None, END])
    def test_one_beam_is_greedy(self, end):
        params = init(1)
        found = beam_search(apply_fn, params, PROMPTS, LENGTHS, beams=1, steps=3, end=end)
        for i, n in enumerate(LENGTHS):
            text = np.asarray(found.tokens)[i, 0, : np.asarray(found.lengths)[i, 0]].tolist()
            assert text == greedy(params, PROMPTS[i, :n].tolist(), 3, end)

    def test_more_beams_find_likelier_texts_and_scores_are_theirs(self):
        params, best = init(3), []
        for beams in (1, 3, 125):
            found = beam_search(apply_fn, params, PROMPTS, LENGTHS, beams=beams, steps=3, end=END)
            scores = np.asarray(found.scores)
            assert (scores[:, 1:] <= scores[:, :-1]).all()
            for i, k in itertools.product(range(3), range(min(beams, 3))):
                text = np.asarray(found.tokens)[i, k, : np.asarray(found.lengths)[i, k]]
                steps = [
                    next_log_p(params, text[:n])[text[n]] for n in range(LENGTHS[i], len(text))
                ]
                np.testing.assert_allclose(scores[i, k], sum(steps), atol=2e-5)
                # Nothing but padding behind it, and the mask covers what was written.
                assert not np.asarray(found.tokens)[i, k, len(text) :].any()
                where = np.asarray(found.where)[i, k]
                assert where.sum() == len(text) - LENGTHS[i]
                assert where[LENGTHS[i] - 1]
            best.append(scores[:, 0])
        assert (best[0] <= best[2] + 1e-5).all()

    def test_under_jit(self):
        params = init(1)
        search = functools.partial(beam_search, apply_fn, beams=3, steps=3, end=END)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, atol=1e-5),
            jax.jit(search)(params, PROMPTS, LENGTHS),
            search(params, PROMPTS, LENGTHS),
        )


class TestStep:
    """What a GKD step looks like, whole."""

    def test_mixing_own_and_given_text_in_one_step_lowers_the_loss(self):
        optimizer, teacher = optax.adam(0.03), init(7, width=8)
        student = init(8, width=3, spread=0.5)
        given = sample_tokens(
            apply_fn, teacher, np.tile(PROMPTS, (4, 1)), np.tile(LENGTHS, 4), KEY, steps=5
        )

        @functools.partial(jax.jit, static_argnames="on_policy")
        def train_step(params, state, key, on_policy):
            choose, write = jax.random.split(key)

            def own():
                prompts, lengths = given.tokens[:, :3], jnp.tile(LENGTHS, 4)
                return sample_tokens(apply_fn, params, prompts, lengths, write, steps=5)

            text = jax.lax.cond(jax.random.bernoulli(choose, on_policy), own, lambda: given)

            def loss_fn(params):
                loss = jensen_shannon_divergence(
                    apply_fn(params, text.tokens),
                    apply_fn(teacher, text.tokens),
                    interpolation=0.9,
                    where=text.where,
                )
                return loss.sum() / text.where.sum()

            loss, slope = jax.value_and_grad(loss_fn)(params)
            updates, state = optimizer.update(slope, state)
            return optax.apply_updates(params, updates), state, loss

        params, state, losses = student, optimizer.init(student), []
        for key in jax.random.split(KEY, 60):
            params, state, loss = train_step(params, state, key, 0.5)
            losses.append(float(loss))
        assert np.isfinite(losses).all()
        assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:10])


class TestBadInput:
    @pytest.mark.parametrize(
        ("error", "match", "change"),
        [
            (TypeError, "tokens must be integers", {"tokens": PROMPTS * 1.0}),
            (TypeError, "lengths must be integers", {"lengths": LENGTHS * 1.0}),
            (ValueError, "lengths hold 0", {"lengths": np.array([3, 0, 1])}),
            (ValueError, "lengths hold 4", {"lengths": np.array([3, 4, 1])}),
            (ValueError, "steps is 0", {"steps": 0}),
        ],
    )
    def test_prompts(self, error, match, change):
        args = {"tokens": PROMPTS, "lengths": LENGTHS, "steps": 2} | change
        with pytest.raises(error, match=match):
            sample_tokens(apply_fn, init(), key=KEY, **args)
        with pytest.raises(error, match=match):
            beam_search(apply_fn, init(), beams=2, **args)

    def test_other_arguments(self):
        with pytest.raises(ValueError, match="temperature -1"):
            sample_tokens(apply_fn, init(), PROMPTS, LENGTHS, KEY, steps=1, temperature=-1.0)
        with pytest.raises(ValueError, match="beams is 0"):
            beam_search(apply_fn, init(), PROMPTS, LENGTHS, beams=0, steps=1)


@pytest.mark.slow
class TestAgainstTransformers:
    """A random GPT-2, run by PyTorch from inside the loops, beside its own ``generate``."""

    def test_greedy_and_beams(self):
        torch, transformers = map(pytest.importorskip, ("torch", "transformers"))
        torch.manual_seed(0)
        config = transformers.GPT2Config(
            vocab_size=23, n_positions=16, n_embd=16, n_layer=2, n_head=2, initializer_range=0.6
        )
        config.bos_token_id = config.eos_token_id = config.pad_token_id = None
        model = transformers.GPT2LMHeadModel(config).eval()

        def host(tokens):
            with torch.no_grad():
                return model(torch.tensor(np.array(tokens, np.int64))).logits.numpy()

        def apply_fn(params, tokens):
            shape = jax.ShapeDtypeStruct((*tokens.shape, 23), np.float32)
            return jax.pure_callback(host, shape, tokens)

        prompts = np.random.default_rng(0).integers(0, 23, (3, 4))
        lengths, inputs = np.full(3, 4), torch.tensor(prompts)
        generate = functools.partial(
            model.generate,
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=6,
            do_sample=False,
        )
        for end in (None, 5):
            options = {} if end is None else {"eos_token_id": end, "pad_token_id": 0}
            written = sample_tokens(
                apply_fn, {}, prompts, lengths, KEY, steps=6, temperature=0.0, end=end
            )
            expected = generate(**options).numpy()
            tokens = np.asarray(written.tokens)
            np.testing.assert_array_equal(tokens[:, : expected.shape[1]], expected)
        found = beam_search(apply_fn, {}, prompts, lengths, beams=4, steps=6)
        expected = generate(
            num_beams=4,
            num_return_sequences=4,
            length_penalty=0.0,
            output_scores=True,
            return_dict_in_generate=True,
        )
        np.testing.assert_array_equal(
            np.asarray(found.tokens).reshape(12, 10), expected.sequences.numpy()
        )
        np.testing.assert_allclose(
            np.asarray(found.scores).reshape(-1), expected.sequences_scores.numpy(), atol=1e-4
        )
