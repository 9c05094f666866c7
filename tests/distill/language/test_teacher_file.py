"""A teacher in a file: what comes back, kills at every byte, random access, hostile bytes."""

import dataclasses
import os
import signal
import struct
import subprocess
import sys
import zlib

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from scipy.special import log_softmax

from jaxcomp.checkpoint import CheckpointError
from jaxcomp.distill.language import records, rows
from jaxcomp.distill.language.cached import open_teacher, write_teacher
from jaxcomp.distill.language.top_logits import TopLogits, top_divergence, top_logits

VOCABULARY, COUNT = 300, 5
GOOD = {"vocabulary": 9, "kept": 2, "dtype": "float32", "rest": False, "temperature": 1.0}


def batch(seed=0, shape=(2, 3), vocabulary=VOCABULARY, count=COUNT, rest=True):
    """Rows as the top of a teacher's logits would be, made without it."""
    rng = np.random.default_rng(seed)
    values = -np.sort(-4 * rng.normal(size=(*shape, count)), -1).astype(np.float32)
    indices = np.argsort(rng.random((*shape, vocabulary)), -1)[..., :count]
    left = rng.normal(size=shape).astype(np.float32) if rest else None
    return TopLogits(values, indices, left, vocabulary, 2.0 if rest else 1.0)


def distribution(top):
    row = np.asarray(top.values, np.float64)
    if top.rest is not None:
        row = np.append(row, np.asarray(top.rest, np.float64)[..., None], -1)
    with np.errstate(invalid="ignore"):
        return log_softmax(row, -1)


def lost(kept, made):
    """KL between what was to be written and what was read."""
    p, q = distribution(made), distribution(kept)
    with np.errstate(invalid="ignore"):
        return np.where(np.exp(p) > 0, np.exp(p) * (p - q), 0).sum(-1)


def follow(*batches):
    return lambda done: iter(batches[done:])


def same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.fixture
def path(tmp_path):
    return os.path.join(tmp_path, "teacher.jxt")


class TestRows:
    @pytest.mark.parametrize("rest", [True, False])
    @pytest.mark.parametrize("dtype", rows.DTYPES)
    @pytest.mark.parametrize("vocabulary", [5, 256, 257, 300, 65536, 65537, 152000])
    def test_what_is_written_is_read(self, dtype, vocabulary, rest):
        made = batch(shape=(7,), vocabulary=vocabulary, rest=rest)
        layout = rows.Layout(vocabulary, COUNT, dtype, rest, 2.0)
        data = rows.encode(made, layout)
        assert len(data) == rows.bytes_for(layout, 7)
        kept = rows.decode(data, (7,), layout)
        np.testing.assert_array_equal(kept.indices, made.indices)
        assert kept.indices.dtype == (np.uint16 if vocabulary <= 65536 else np.int32)
        assert (kept.rest is None) == (not rest)
        most = {"float32": 1e-12, "float16": 1e-6, "uint8": 1e-4}[dtype]
        assert lost(kept, made).max() < most

    @pytest.mark.parametrize("dtype", rows.DTYPES)
    def test_infinities_ties_and_offsets(self, dtype):
        values = np.array(
            [[9.0, 9.0], [1e30, -1e30], [5.0, -np.inf], [-np.inf, -np.inf], [1000.25, 1000.0]],
            np.float32,
        )
        made = TopLogits(
            values, np.tile([0, 1], (5, 1)), np.full(5, -np.inf, np.float32), VOCABULARY
        )
        layout = rows.Layout(VOCABULARY, 2, dtype, True, 1.0)
        kept = rows.decode(rows.encode(made, layout), (5,), layout)
        assert lost(kept, made)[[0, 1, 2, 4]].max() < 1e-4
        assert (kept.rest == -np.inf).all()
        np.testing.assert_array_equal(kept.values[3], [-np.inf, -np.inf])
        assert kept.values[2, 1] == -np.inf
        np.testing.assert_allclose(kept.values[4], [0, -0.25], atol=1e-3)

    def test_bytes_for_a_token_are_those_that_are_told(self):
        for dtype, size in (("float32", 196), ("float16", 130), ("uint8", 99)):
            assert rows.bytes_for(rows.Layout(50257, 32, dtype, True, 1.0), 1) == size

    @given(st.integers(0, 2**32), st.floats(0.1, 30), st.sampled_from(rows.DTYPES))
    def test_the_error_is_small_at_any_spread(self, seed, spread, dtype):
        made = batch(seed, shape=(20,))
        made = dataclasses.replace(made, values=np.float32(spread) * made.values)
        layout = rows.Layout(VOCABULARY, COUNT, dtype, True, 2.0)
        kept = rows.decode(rows.encode(made, layout), (20,), layout)
        assert lost(kept, made).max() < {"float32": 1e-11, "float16": 2e-6, "uint8": 5e-4}[dtype]


class TestFile:
    @pytest.mark.parametrize("dtype", rows.DTYPES)
    def test_batches_of_any_shape_in_any_order(self, path, dtype):
        shapes = [(2, 3), (1, 3), (4,), (2, 1, 2)]
        made = [batch(i, shape) for i, shape in enumerate(shapes)]
        assert write_teacher(path, follow(*made), dtype=dtype, about={"teacher": "a"}) == 4
        file = open_teacher(path)
        assert len(file) == 4
        assert file.torn == 0
        assert file.about == {"teacher": "a"}
        assert file.layout == rows.Layout(VOCABULARY, COUNT, dtype, True, 2.0)
        for i in (3, 0, -1, np.int64(2), 1, 0):
            assert lost(file[i], made[i]).max() < 1e-4
            assert file[i].temperature == 2.0
        assert [top.values.shape[:-1] for top in file] == shapes
        with pytest.raises(IndexError):
            file[4]
        assert "4 batches" in repr(file)

    def test_from_logits_to_a_loss(self, path):
        student, teacher = 3 * np.random.default_rng(0).normal(size=(2, 2, 3, 50))
        top = top_logits(teacher.astype(np.float32), 8, 2.0)
        write_teacher(path, follow(top))
        student = student.astype(np.float32)
        np.testing.assert_allclose(
            top_divergence(student, open_teacher(path)[0]), top_divergence(student, top), rtol=1e-3
        )

    def test_a_teacher_without_a_rest(self, path):
        bare = batch(rest=False)
        write_teacher(path, follow(bare))
        assert open_teacher(path)[0].rest is None

    def test_a_long_file_is_written_and_opened_in_little_memory(self, path):
        many, top, read = 400, batch(shape=(8,)), []

        def batches(done):
            for i in range(done, many):
                read.append(os.path.getsize(path) if os.path.exists(path) else 0)
                yield dataclasses.replace(top, rest=np.full(8, float(i), np.float32))

        write_teacher(path, batches, dtype="float32")
        # Each batch was in the file before the next one was asked for.
        assert len(set(np.diff(read[1:]))) == 1
        file = open_teacher(path)
        for i in (399, 7, 200):
            same(np.float32(file[i].rest - file[i].values[:, 0]), i - top.values[:, 0])
        # Bytes for a batch: its row, its indices of 9 bits, and 56 of the record.
        assert os.path.getsize(path) < 300 + many * (8 * (6 * 4 + 6) + 56)


class TestResuming:
    made = tuple(batch(i) for i in range(4))

    def whole(self, path, **kwargs):
        write_teacher(path, follow(*self.made), **kwargs)
        with open(path, "rb") as file:
            return file.read()

    def test_cut_at_any_byte_it_goes_on_and_is_the_same_file(self, path):
        whole = self.whole(path)
        starts, asked = open_teacher(path).starts, []

        def follow_and_tell(done):
            asked.append(done)
            return self.made[done:]

        edges = {start + more for start in starts for more in (0, 1, 55, 56, 57)}
        for cut in sorted(edges | set(range(starts[0], len(whole), 11)) | {len(whole) - 1}):
            with open(path, "wb") as file:
                file.write(whole[:cut])
            left = open_teacher(path)
            ends = [*left.starts[1:], cut - left.torn]
            assert all(end <= cut for end in ends)
            if left.starts:
                same(left[-1], rows.decode(*self.payload(left), left.layout))
            asked.append(len(left))
            assert write_teacher(path, follow_and_tell) == 4
            assert asked.pop(0) == asked.pop(0)
            with open(path, "rb") as file:
                assert file.read() == whole

    @staticmethod
    def payload(file):
        return records.read_payload(file.data, file.starts[-1], file.layout)

    def test_after_a_power_cut(self, path):
        whole = self.whole(path)
        starts = open_teacher(path).starts
        for data in (
            whole[: starts[3]] + bytes(len(whole) - starts[3]),  # the size, without any data
            whole[: starts[3] + 60] + bytes(len(whole) - starts[3] - 60),  # with some
        ):
            with open(path, "wb") as file:
                file.write(data)
            assert write_teacher(path, follow(*self.made)) == 4
            with open(path, "rb") as file:
                assert file.read() == whole

    def test_a_failing_teacher_leaves_what_was_written(self, path):
        def batches(done):
            yield from self.made[done:2]
            raise RuntimeError("out of memory")

        with pytest.raises(RuntimeError):
            write_teacher(path, batches)
        assert len(open_teacher(path)) == 2
        assert write_teacher(path, follow(*self.made)) == 4

    def test_nothing_is_written_without_batches(self, path):
        assert write_teacher(path, follow()) == 0
        assert not os.path.exists(path)

    def test_another_call_is_refused(self, path):
        whole = self.whole(path, about={"teacher": "a"})
        for match, kwargs in (
            ("dtype uint8, the file float16", {"dtype": "uint8", "about": {"teacher": "a"}}),
            ("teacher b, the file a", {"about": {"teacher": "b"}}),
            ("teacher absent, the file a", {}),
        ):
            with pytest.raises(ValueError, match=match):
                write_teacher(path, follow(*self.made), **kwargs)
        for match, other in (
            ("vocabulary 400, those before it 300", batch(vocabulary=400)),
            ("kept 4, those before it 5", batch(count=4)),
            ("rest False", batch(rest=False)),
            ("temperature 3", dataclasses.replace(batch(), temperature=3.0)),
        ):
            with pytest.raises(ValueError, match=match):
                write_teacher(path, follow(*self.made, other), about={"teacher": "a"})
        with open(path, "rb") as file:
            assert file.read() == whole

    @pytest.mark.slow
    def test_a_process_that_is_killed(self, path):
        program = (
            "import itertools, sys, numpy as np\n"
            "from jaxcomp.distill.language.cached import write_teacher\n"
            "from jaxcomp.distill.language.top_logits import TopLogits\n"
            "def top(i):\n"
            "    x = np.random.default_rng(i).normal(size=(64, 512, 8)).astype(np.float32)\n"
            "    return TopLogits(x, np.argsort(-x, -1), x[..., 0], 9)\n"
            "write_teacher(sys.argv[1], lambda done: map(top, itertools.count(done)))\n"
        )
        done = 0
        for _ in range(3):
            child = subprocess.Popen([sys.executable, "-c", program, path])
            while not os.path.exists(path) or len(open_teacher(path)) < done + 3:
                assert child.poll() is None
            child.send_signal(signal.SIGKILL)
            child.wait()
            file = open_teacher(path)
            assert len(file) >= done + 3
            done = len(file)
            for i in (0, done - 1):
                x = np.random.default_rng(i).normal(size=(64, 512, 8)).astype(np.float32)
                np.testing.assert_array_equal(file[i].indices, np.argsort(-x, -1))


class TestHostile:
    @pytest.fixture
    def sound(self, path):
        write_teacher(path, follow(*(batch(i) for i in range(3))), dtype="uint8")
        with open(path, "rb") as file:
            return file.read()

    @staticmethod
    def put(path, data):
        with open(path, "wb") as file:
            file.write(data)

    def test_any_changed_byte_is_found_when_it_is_read(self, path, sound):
        for at in range(len(sound)):
            data = bytearray(sound)
            data[at] ^= 1 << at % 8
            self.put(path, data)
            with pytest.raises(CheckpointError, match=r"teacher\.jxt: "):
                list(open_teacher(path))

    @settings(max_examples=60)
    @given(data=st.data())
    def test_bytes_at_random_never_do_anything_else(self, tmp_path_factory, data):
        path = os.path.join(tmp_path_factory.mktemp("hostile"), "teacher.jxt")
        write_teacher(path, follow(*(batch(i) for i in range(2))))
        with open(path, "rb") as file:
            sound = file.read()
        cut = data.draw(st.integers(0, len(sound)))
        self.put(path, sound[:cut] + data.draw(st.binary(min_size=1, max_size=200)))
        try:
            file = open_teacher(path)
            tops = list(file)
        except CheckpointError:
            return
        for i, top in enumerate(tops):
            made = rows.decode(rows.encode(batch(i), file.layout), (2, 3), file.layout)
            same(top, made)

    def header(self, layout, about=None):
        import json

        text = json.dumps({"layout": layout, "about": about or {}}).encode()
        return self.sealed(text)

    @staticmethod
    def sealed(text, version=1, length=None):
        start = struct.pack("<7sBI", b"JXTEACH", version, len(text) if length is None else length)
        return start + struct.pack("<I", zlib.crc32(text, zlib.crc32(start))) + text

    @pytest.mark.parametrize(
        "change",
        [
            {"vocabulary": 1},
            {"vocabulary": 2**40},
            {"vocabulary": 9.0},
            {"kept": 0},
            {"kept": True},
            {"dtype": "object"},
            {"rest": 1},
            {"temperature": 0.0},
            {"temperature": float("nan")},
            {"more": 1},
        ],
    )
    def test_headers_that_make_no_sense(self, path, change):
        self.put(path, self.header(GOOD))
        assert len(open_teacher(path)) == 0
        self.put(path, self.header(GOOD | change))
        with pytest.raises(CheckpointError, match="header"):
            open_teacher(path)

    @pytest.mark.parametrize(
        ("match", "data"),
        [
            ("empty", b""),
            ("does not begin like one", b"JXTEACH"),
            ("does not begin like one", b"\x80\x04pickle" + bytes(50)),
            ("format version 2", sealed(b"{}", version=2)),
            ("damaged", sealed(b"{}", length=2**32 - 1)),
            ("cannot be read", sealed(b"{}")),
            ("cannot be read", sealed(b"[" * 5000)),
            ("cannot be read", sealed(b"\xff")),
            ("cannot be read", sealed(b"[]")),
        ],
    )
    def test_other_files(self, path, match, data):
        self.put(path, data)
        for use in (open_teacher, lambda path: write_teacher(path, follow(batch()))):
            with pytest.raises(CheckpointError, match=match):
                use(path)
        assert os.path.getsize(path) == len(data)

    def forged(self, payload, shape=(1,), number=0, layout=None):
        layout = layout or GOOD
        return self.header(layout) + records.record_head(payload, number, shape) + payload

    def test_sealed_payloads_that_make_no_sense(self, path):
        row, indices = struct.pack("<2f", 0, -1), bytes([0x21])
        self.put(path, self.forged(row + indices))
        np.testing.assert_array_equal(open_teacher(path)[0].indices, [[1, 2]])
        for payload, match in (
            (row + bytes([0xF1]), "an index 15"),
            (struct.pack("<2f", 0, np.nan) + indices, "NaN"),
            (struct.pack("<2f", 0, 1) + indices, "above the largest"),
        ):
            self.put(path, self.forged(payload))
            with pytest.raises(CheckpointError, match=match):
                open_teacher(path)[0]

    def test_shapes_that_would_not_fit_into_memory_are_a_torn_end(self, path):
        self.put(path, self.forged(b"abc", (2**32 - 1,) * 8))
        file = open_teacher(path)
        assert len(file) == 0
        assert file.torn == records.HEAD_BYTES + 3

    def test_records_out_of_order(self, path):
        self.put(path, self.forged(struct.pack("<2f", 0, -1) + b"\x21", number=1))
        with pytest.raises(CheckpointError, match="two processes"):
            open_teacher(path)

    def test_no_file(self, path):
        with pytest.raises(FileNotFoundError, match="no such file"):
            open_teacher(path)
        with pytest.raises(CheckpointError, match="not a regular one"):
            open_teacher(os.path.dirname(path))


class TestBadBatches:
    @pytest.mark.parametrize(
        ("match", "change"),
        [
            ("both must be", {"values": np.zeros((2, 3, 4), np.float32)}),
            ("both must be", {"values": np.zeros(3), "indices": np.zeros(3, int), "rest": None}),
            ("both must be", {"values": np.zeros((0, 3)), "indices": np.zeros((0, 3), int)}),
            ("one number for each position", {"rest": np.zeros((2, 3, 1))}),
            ("vocabulary 4 must be", {"vocabulary": 4}),
            ("indices hold 299", {"vocabulary": 299, "indices": np.full((2, 3, COUNT), 299)}),
            ("indices hold -1", {"indices": np.full((2, 3, COUNT), -1)}),
            (r"NaN or \+inf", {"rest": np.full((2, 3), np.nan)}),
            (r"NaN or \+inf", {"rest": np.full((2, 3), np.inf)}),
        ],
    )
    def test_they_are_refused_before_anything_is_written(self, path, match, change):
        bad = dataclasses.replace(batch(), **change)
        with pytest.raises(ValueError, match=match):
            write_teacher(path, follow(bad))
        assert not os.path.exists(path)
        if "vocabulary" not in change:
            with pytest.raises(ValueError, match=match):
                write_teacher(path, follow(batch(), bad))
            assert len(open_teacher(path)) == 1

    def test_types(self, path):
        bad = dataclasses.replace(batch(), indices=np.zeros((2, 3, COUNT)))
        with pytest.raises(TypeError, match="must be integers"):
            write_teacher(path, follow(bad))
        with pytest.raises(FileNotFoundError, match="no such directory"):
            write_teacher(os.path.join(path, "a", "b"), follow(batch()))
