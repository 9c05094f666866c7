"""What the benchmarks with a teacher conclude, and that students learn from what is said."""

import functools
import importlib
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.demo.data import Dataset


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parent.parent / "benchmarks"))
    return importlib.import_module


@pytest.fixture
def digits():
    generator = np.random.default_rng(0)
    images = generator.random((256, 4, 4, 1), np.float32)
    labels = np.arange(256, dtype=np.int32) % 10
    return Dataset("noise", images, labels, images[:10], labels[:10])


def test_a_finished_run_is_read_and_a_broken_one_is_not_kept(benchmark, tmp_path):
    runs = benchmark("teacher_runs")
    file = runs.file_of(tmp_path / "runs", "name", ("facts", 1), 0)
    assert file != runs.file_of(tmp_path / "runs", "name", ("facts", 2), 0)
    with pytest.raises(KeyboardInterrupt):
        runs.kept(file, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert not file.exists()
    first = runs.kept(file, lambda: {"kernel": jnp.ones(3)})
    again = runs.kept(file, lambda: pytest.fail("trained twice"))
    np.testing.assert_array_equal(first["kernel"], again["kernel"])


def test_image_students_learn_from_what_their_lesson_says(benchmark, digits):
    models = benchmark("teacher_images_models")
    training = models.Training(width=4, epochs=1, rate=0.01)
    threes = digits.train_labels == 3
    zeros, other = np.zeros((2, 256, 10), np.float32)
    other[:, 7] = 50.0
    spoilt = np.where(threes[:, None], np.float32(np.nan), zeros)

    def kernel(lesson, logits):
        found = models.fit_student(training, lesson, digits, logits, 0, lambda: None)
        return np.asarray(found["last"]["kernel"])

    alone = kernel(models.Lesson(20.0, 0.0), zeros)
    np.testing.assert_array_equal(alone, kernel(models.Lesson(20.0, 0.0), other))
    assert np.isnan(kernel(models.Lesson(20.0, 0.9), spoilt)).any()
    assert np.isfinite(kernel(models.Lesson(20.0, 0.9, unseen=3), spoilt)).all()


def test_an_epoch_has_every_image_once(benchmark):
    models = benchmark("teacher_images_models")
    found = np.concatenate(list(models.orders(256, 2, 0))).reshape(2, 256)
    np.testing.assert_array_equal(np.sort(found), [np.arange(256)] * 2)
    assert (found[0] != found[1]).any()


def test_image_errors_are_counted(benchmark):
    models = benchmark("teacher_images_models")
    logits = np.eye(10, dtype=np.float32)[[3, 3, 5, 3]]
    found = models.judged(logits, np.array([3, 4, 3, 5]), 3)
    assert (found.errors, found.unseen_errors) == (3, 1)
    assert found.loss == pytest.approx(np.log(np.e + 9) - 0.25)


def test_an_image_teacher_that_does_not_help_is_said_not_to(benchmark):
    images = benchmark("teacher_images")

    def told(teacher, alone, taught):
        rows = {"teacher": [teacher], images.ALONE: alone, images.TAUGHT: taught}
        return images.verdict(
            {name: [images.Tested(n, 0, 0.0) for n in own] for name, own in rows.items()}
        )

    good = told(60, [100, 120], [80, 80])
    assert "60, 80.0, 110.0: holds" in good
    assert "in 2 of 2 seeds and closes 60% of the gap (91% in the paper)" in good
    bad = told(60, [100, 120], [100, 130])
    assert "DOES NOT HOLD" in bad
    assert "in 0 of 2 seeds" in bad


def test_a_teacher_of_few_bits_that_does_not_help_is_said_not_to(benchmark):
    bits = benchmark("teacher_bits")

    def told(alone, taught):
        rows = {(2, False): alone, (2, True): taught}
        return bits.verdict({row: [bits.Tested(a, 1) for a in own] for row, own in rows.items()}, 2)

    assert told([98.0, 99.0], [98.5, 99.1]).endswith(
        "the teacher helps: 0.30 ± 0.28 points, better in 2 of 2 seeds."
    )
    assert "DOES NOT HELP" in told([98.0, 99.0], [98.5, 98.0])


def test_a_student_of_few_bits_is_packed_in_few_bits(benchmark):
    bits = benchmark("teacher_bits")
    generator = np.random.default_rng(0)
    images = generator.random((128, 28, 28, 1), np.float32)
    labels = np.arange(128, dtype=np.int32) % 10
    data = Dataset("noise", images, labels, images, labels)
    recipe = bits.Recipe((1, 1, 2), (1, 1), (0.1, 0.1), 0.0)
    whole, module = bits.LeNet5(recipe.widths), bits.LeNet5(recipe.widths, 2)
    start = whole.init(jax.random.key(0), images)["params"]
    params = bits.models.with_steps(module, start, images)
    packed = bits.fit(module, params, start, data, recipe, bits.Lesson(4.0, 0.9), 0, lambda: None)
    kernel = np.asarray(jax.tree.leaves(bits.jaxcomp.decode(packed["conv"]["kernel"]))[0])
    assert len(np.unique(kernel)) <= 4
    assert len(np.unique(start["conv"]["kernel"])) == kernel.size


@pytest.fixture
def languages(benchmark, tmp_path):
    text = benchmark("teacher_text")
    file = tmp_path / "text.txt"
    file.write_text("the quick brown fox jumps over the lazy dog. " * 1000)
    sizes = text.Size(width=8, depth=1, steps=2), text.Size(width=16, depth=2, steps=2)
    return text, *(text.task_of(str(file), size, 2) for size in sizes)


def test_a_text_lesson_is_the_sum_of_its_parts(languages):
    text, student, teacher = languages
    models = text.models
    own, wanted = (text.sparsity_models.initial(task, i) for i, task in enumerate(languages[1:]))
    tokens, following = student.batch(np.random.default_rng(0), 2)
    (projection,) = models.init_projections(jax.random.key(0), student, teacher, [own, wanted])
    trained = {"student": own, "projections": [projection]}

    @functools.partial(jax.jit, static_argnums=0)
    def apply(module, params):
        blocks = lambda module, _: isinstance(module, text.sparsity_models.Block)
        return module.apply({"params": params}, tokens, capture_intermediates=blocks)

    def parts(task, params, block):
        logits, kept = apply(task.module, params)
        hidden = kept["intermediates"][block]["__call__"][0]
        return np.asarray(logits, np.float64), np.asarray(hidden, np.float64)

    logits, hidden = parts(student, own, "block0")
    teacher_logits, teacher_hidden = parts(teacher, wanted, "block1")

    def log_softmax(x):
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    hard = -np.take_along_axis(log_softmax(logits), following[..., None], -1).mean()
    p, q = log_softmax(teacher_logits / 2), log_softmax(logits / 2)
    soft = 4 * (np.exp(p) * (p - q)).sum(-1).mean()
    distance = np.square(hidden @ np.asarray(projection["kernel"]) - teacher_hidden).mean()
    for lesson, expected in {
        models.Lesson(): hard,
        models.Lesson(2.0, 0.25, 0.5): 0.75 * hard + 0.25 * soft + 0.5 * distance,
    }.items():
        loss = jax.jit(models.lesson_loss(student, teacher, lesson))
        assert loss(trained, wanted, tokens, following) == pytest.approx(expected, rel=1e-5)


def test_a_text_student_is_kept_without_its_projections(languages):
    text, student, teacher = languages
    wanted = text.sparsity_models.initial(teacher, 1)
    lesson, ticks = text.LESSONS["with both"], []
    found = text.models.fit(student, teacher, wanted, lesson, 0, lambda: ticks.append(0))
    start = text.sparsity_models.initial(student, 0)
    assert len(ticks) == student.steps
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, start)
    assert (found["head"]["kernel"] != start["head"]["kernel"]).any()


def test_a_shallow_student_learns_from_the_end_of_each_group(benchmark, languages):
    text, student, teacher = languages

    def deep(task, depth):
        return task._replace(module=task.module.clone(depth=depth))

    assert isinstance(student.module, nn.Module)
    own, others = text.models.paired(deep(student, 2), deep(teacher, 4))
    assert own == ["Decoder/block0", "Decoder/block1"]
    assert others == ["Decoder/block1", "Decoder/block3"]


def test_a_text_teacher_that_does_not_help_is_said_not_to(benchmark):
    text = benchmark("teacher_text")

    def told(alone, taught):
        rows = {text.ALONE: alone, "with both": taught}
        bit = float(np.log(2))
        found = {name: [text.Quality(b * bit, 0.5) for b in own] for name, own in rows.items()}
        return text.verdict(found, "with both")

    assert told([2.0, 3.0], [1.5, 2.5]) == (
        "with both helps: 0.500 ± 0.000 bits a character fewer than alone, better in 2 of 2 seeds."
    )
    assert "DOES NOT HELP" in told([2.0, 3.0], [2.5, 2.6])
