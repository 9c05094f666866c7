"""A study's file: what a kill leaves, how a search goes on from it, and what is refused."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import jax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxcomp.search import Integer, Repeat, Stop, load, run, strategies
from tests.search.strategy_cases import CASES, CONDITIONAL, KEY, cost, measured

SPACE = {"x": Integer(0, 9), "y": Repeat(Integer(0, 2), Integer(0, 9))}


def evaluate(found):
    for each in found:
        size = cost(each)
        yield {"error": "bad"} if size == 7 else {"loss": size, "told": [size, "ü\n"]}


def search(file, stop=12, strategy=None, evaluate=evaluate, space=SPACE, **options):
    options = {"objectives": {"loss": "minimize"}, "key": KEY, "batch": 4, **options}
    strategy = strategies.evolution(4, 2) if strategy is None else strategy
    return run(space, evaluate, strategy, stop=stop, file=file, **options)


def without_seconds(study):
    return [each._replace(seconds=0.0) for each in study.trials]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A study that nothing disturbed, and the bytes of its file."""
    file = tmp_path_factory.mktemp("whole") / "study.jsonl"
    study = search(file)
    return without_seconds(study), file.read_bytes()


def test_a_study_is_lines_of_json(whole):
    trials, data = whole
    header, *lines = map(json.loads, data.splitlines())
    assert header["study"] == "jaxcomp.search"
    assert header["objectives"] == {"loss": "minimize"}
    assert header["strategy"] == "evolution(population=4, sample_size=2, spread=0.2)"
    assert [len(line["asked"]) for line in lines if "asked" in line] == [4, 4, 4]
    assert [line["number"] for line in lines if "number" in line] == list(range(12))
    assert len(trials) == 12


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
@given(st.data())
def test_a_file_torn_at_any_byte_goes_on_as_if_it_had_not_been(whole, tmp_path, data):
    trials, text = whole
    end = data.draw(st.integers(0, len(text)))
    file = tmp_path / f"{end}.jsonl"
    file.write_bytes(text[:end])
    evaluated = []

    def counted(found):
        for candidate, result in zip(found, evaluate(found), strict=True):
            evaluated.append(candidate)
            yield result

    study = search(file, evaluate=counted)
    assert without_seconds(study) == trials
    finished = sum("number" in json.loads(line) for line in text[:end].split(b"\n")[:-1])
    assert len(evaluated) == 12 - finished
    assert len(file.read_bytes().splitlines()) == len(text.splitlines())
    assert load(file, SPACE).trials == study.trials


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_strategy_goes_on_from_every_line(case, tmp_path):
    pytest.importorskip(case.needs)
    file = tmp_path / "study.jsonl"
    several = {"loss": "minimize", "size": "maximize"}
    options = {
        "space": CONDITIONAL,
        "evaluate": lambda found: [measured(each) for each in found],
        "objectives": several if case.several else {"loss": "minimize"},
        "constraints": {"size": 90},
        "batch": 3,
    }
    trials = without_seconds(search(file, strategy=case.make(), stop=11, **options))
    lines = file.read_bytes().splitlines(keepends=True)
    for end in range(1, len(lines), 4):
        file.write_bytes(b"".join(lines[:end]))
        again = search(file, strategy=case.make(), stop=11, **options)
        assert without_seconds(again) == trials


def test_a_search_may_go_on_for_longer_and_in_other_batches(whole, tmp_path):
    file = tmp_path / "study.jsonl"
    search(file, 12)
    study = search(file, 20, batch=5)
    assert without_seconds(study)[:12] == whole[0]
    assert len(study.trials) == 20
    assert search(file, 3, evaluate=evaluate).trials == study.trials
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:3]))  # four were asked for, one is finished
    assert len(search(file, 3, batch=1).trials) == 3
    assert without_seconds(search(file, 12)) == whole[0]


def test_patience_waits_for_what_was_asked_at_once(tmp_path):
    """As it does where no kill came in between."""
    file = tmp_path / "study.jsonl"
    values = dict(enumerate([5.0, 6.0, 6.0, 1.0] + [2.0] * 9))
    started = lambda: {"evaluate": lambda found: [values[each] for each in found], "batch": 4}
    options = {"space": Integer(0, 9), "strategy": strategies.grid(), "objectives": "minimize"}
    study = search(file, Stop(patience=2), **options, **started())
    assert len(study.trials) == 8
    lines = file.read_bytes().splitlines(keepends=True)
    for end in range(2, len(lines)):
        file.write_bytes(b"".join(lines[:end]))
        again = search(file, Stop(patience=2), **options, **started())
        assert without_seconds(again) == without_seconds(study)
        assert again.reason == "patience"


def test_seconds_of_earlier_runs_count(tmp_path):
    file = tmp_path / "study.jsonl"
    search(file, 4)
    text = file.read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    slow = [{**line, "seconds": 100.0} if "number" in line else line for line in lines]
    file.write_text("".join(json.dumps(line) + "\n" for line in slow))
    assert search(file, Stop(seconds=399.0)).reason == "seconds"


def test_an_interrupt_is_let_through_and_all_that_finished_is_kept(whole, tmp_path):
    file = tmp_path / "study.jsonl"

    def stopped(found):
        for i, result in enumerate(evaluate(found)):
            if i == 2 and len(found) == 4:
                raise KeyboardInterrupt
            yield result

    with pytest.raises(KeyboardInterrupt):
        search(file, evaluate=stopped)
    assert len(load(file, SPACE).trials) == 2
    assert without_seconds(search(file)) == whole[0]


PROGRAM = """
    import sys, time
    import jax
    from jaxcomp.search import Integer, Repeat, run, strategies

    def evaluate(found):
        for each in found:
            if open(sys.argv[1]).read().count('"number"') == 5:
                print("ready", flush=True)
                time.sleep(600)  # until it is killed
            size = float(each["x"] + sum(each["y"]))
            yield {"error": "bad"} if size == 7 else {"loss": size, "told": [size, "ü\\n"]}

    space = {"x": Integer(0, 9), "y": Repeat(Integer(0, 2), Integer(0, 9))}
    run(space, evaluate, strategies.evolution(4, 2), objectives={"loss": "minimize"},
        key=jax.random.key(7), stop=12, batch=4, file=sys.argv[1])
"""


def test_a_killed_process_loses_nothing(whole, tmp_path):
    file = tmp_path / "study.jsonl"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), str(file)],
        stdout=subprocess.PIPE,
        env=environment,
    ) as process:
        assert process.stdout.readline() == b"ready\n"
        with pytest.raises(BlockingIOError, match="another search is writing this study"):
            search(file)
        process.send_signal(signal.SIGKILL)
    assert len(load(file, SPACE).trials) == 5
    assert without_seconds(search(file)) == whole[0]


def test_a_study_being_written_is_locked_and_can_be_read(tmp_path):
    file = tmp_path / "study.jsonl"

    def nested(found):
        with pytest.raises(BlockingIOError, match=r"study\.jsonl: another search is writing"):
            search(file)
        assert len(load(file, SPACE).trials) == 0
        return [1.0] * len(found)

    search(file, 2, evaluate=nested)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"space": {**SPACE, "x": Integer(0, 8)}},
            "another study: space: 'x       0 to 9', now 'x       0 to 8'",
        ),
        (
            {"objectives": {"loss": "maximize"}},
            "another study: objectives: {'loss': 'minimize'}, now",
        ),
        (
            {"objectives": {"loss": "minimize", "a": "minimize"}, "strategy": strategies.random()},
            "another study: objectives",
        ),
        ({"constraints": {"bytes": 3}}, "another study: constraints: {}, now {'bytes': 3.0}"),
        ({"strategy": strategies.nsga2()}, "another study: strategy: 'evolution.*now 'nsga2"),
        ({"strategy": strategies.evolution(5, 2)}, "another study: strategy"),
        ({"key": jax.random.key(8)}, "another study: key: 7, now 8"),
    ],
)
def test_another_study_is_refused_by_what_is_different(whole, tmp_path, changes, words):
    file = tmp_path / "study.jsonl"
    file.write_bytes(whole[1])
    with pytest.raises(ValueError, match=words):
        search(file, **{"evaluate": evaluate, **changes})
    assert file.read_bytes() == whole[1]


def test_what_a_strategy_refuses_leaves_no_file(tmp_path):
    both = {"loss": "minimize", "size": "minimize"}
    with pytest.raises(ValueError, match="evolution takes one objective, not 2"):
        search(tmp_path / "study.jsonl", objectives=both)
    assert not (tmp_path / "study.jsonl").exists()


def test_a_space_may_be_told_in_other_words(whole, tmp_path):
    file = tmp_path / "study.jsonl"
    file.write_bytes(whole[1].replace(b"0 to 9", b"from 0 up to 9"))
    assert without_seconds(search(file, 12)) == whole[0]


def test_the_order_of_objectives_counts(tmp_path):
    file = tmp_path / "study.jsonl"
    both = lambda found: [{"a": 1.0, "b": 2.0}] * len(found)
    options = {"evaluate": both, "strategy": strategies.random()}
    search(file, 4, objectives={"a": "minimize", "b": "minimize"}, **options)
    with pytest.raises(ValueError, match="another study: objectives"):
        search(file, 4, objectives={"b": "minimize", "a": "minimize"}, **options)


def edit(line, **changes):
    return json.dumps({**json.loads(line), **changes}).encode()


HOSTILE = {
    "no json": (lambda lines: [lines[0], b"{", *lines[1:]], "line 2: not what a search wrote"),
    "a list": (lambda lines: [lines[0], b"[]", *lines[1:]], "line 2: not what a search wrote"),
    "binary": (lambda lines: [lines[0], b"\xff\x00", *lines[1:]], "line 2: not what"),
    "deep": (lambda lines: [lines[0], b"[" * 100_000, *lines[1:]], "line 2: not what a search"),
    "empty line": (lambda lines: [lines[0], b"", *lines[1:]], "line 2: not what a search"),
    "no header": (lambda lines: lines[1:], "its first line does not say which one"),
    "other file": (lambda lines: [b'{"a": 1}'], "its first line does not say which one"),
    "newer": (lambda lines: [edit(lines[0], format=2), *lines[1:]], "of format 2, not 1"),
    "nan": (
        lambda lines: [*lines[:2], lines[2].replace(b'"seconds": ', b'"seconds": NaN, "s": ')],
        "line 3: not what a search wrote: NaN",
    ),
    "huge": (lambda lines: [*lines[:2], edit(lines[2], values=[10**400])], "no finite number"),
    "negative": (lambda lines: [*lines[:2], edit(lines[2], number=-1)], "number is -1"),
    "no number": (lambda lines: [*lines[:2], edit(lines[2], number=True)], "number is True"),
    "duplicate": (lambda lines: [*lines[:3], lines[2]], "line 4: trial 0 where 1 comes next"),
    "gap": (lambda lines: [*lines[:2], lines[3]], "line 3: trial 1 where 0 comes next"),
    "not asked": (lambda lines: [lines[0], lines[2]], "line 2: trial 0 was not asked for"),
    "other point": (lambda lines: [*lines[:2], edit(lines[2], point={"x": 1})], "was not asked"),
    "asked twice": (lambda lines: [*lines[:2], lines[1]], "line 3: points are asked for before"),
    "asked nothing": (lambda lines: [lines[0], b'{"asked": []}'], "no list of points"),
    "asked what": (lambda lines: [lines[0], b'{"asked": [3]}'], "3 is no point"),
    "no point": (lambda lines: [lines[0], b'{"asked": [{"x": 99}]}'], "line 2: x: 99 is not among"),
    "more keys": (lambda lines: [*lines[:2], edit(lines[2], run="rm")], "neither a trial nor"),
    "status": (lambda lines: [*lines[:2], edit(lines[2], status="good")], "status 'good' is none"),
    "seconds": (lambda lines: [*lines[:2], edit(lines[2], seconds=-1)], "seconds are -1"),
    "told": (lambda lines: [*lines[:2], edit(lines[2], told=[])], r"told is \[\]"),
    "violation": (
        lambda lines: [*lines[:2], edit(lines[2], told={"violation": -1})],
        "violation is",
    ),
    "values": (lambda lines: [*lines[:2], edit(lines[2], values=[1, 2])], "values .* of 1 object"),
    "text": (lambda lines: [*lines[:2], edit(lines[2], values=["1"])], "no finite number"),
    "none": (
        lambda lines: [*lines[:2], edit(lines[2], values=None)],
        "finished, but has no values",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_and_left_as_they_are(whole, tmp_path, name):
    change, words = HOSTILE[name]
    file = tmp_path / "study.jsonl"
    data = b"\n".join(change(whole[1].split(b"\n")[:-1])) + b"\n"
    file.write_bytes(data)
    with pytest.raises(ValueError, match=rf"study\.jsonl.*{words}"):
        search(file)
    with pytest.raises(ValueError, match=words):
        load(file, SPACE)
    assert file.read_bytes() == data


def test_other_things_than_studies_are_left_alone(tmp_path):
    file = tmp_path / "thesis.txt"
    file.write_text("no newline at the end")
    with pytest.raises(ValueError, match="not a study, and not empty"):
        search(file)
    assert file.read_text() == "no newline at the end"
    with pytest.raises(ValueError, match="not a regular file"):
        search(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="not a regular file"):
        search(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError, match="no such directory: create it"):
        search(tmp_path / "absent" / "study.jsonl")
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "absent.jsonl", SPACE)
    file.write_text("")
    assert len(search(file, 2).trials) == 2
    with pytest.raises(ValueError, match="of another space than this one"):
        load(file, {"x": Integer(0, 3)})
