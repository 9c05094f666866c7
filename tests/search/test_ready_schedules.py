"""Ready activations and learning-rate schedules against jax.nn and optax; grids side by side."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcomp.search import ready, spaces
from jaxcomp.search.spaces import Choice, Continuous

X = jnp.array([-30.0, -2.0, -0.5, 0.0, 0.25, 1.0, 30.0])

ACTIVATIONS = [
    ("sigmoid", jax.nn.sigmoid),
    ({"sigmoid": {"slope": 2.0}}, lambda x: jax.nn.sigmoid(2 * x)),
    ("tanh", jnp.tanh),
    ("relu", jax.nn.relu),
    ({"relu": {"leak": 0.1}}, lambda x: jax.nn.leaky_relu(x, 0.1)),
    ({"relu": {"threshold": 0.5, "leak": 0.0}}, lambda x: x * (x > 0.5)),
    ("gelu", lambda x: jax.nn.gelu(x, approximate=False)),
    ("silu", jax.nn.silu),
    ({"elu": {"alpha": 0.5}}, lambda x: jax.nn.elu(x, 0.5)),
    ("softplus", jax.nn.softplus),
    ({"softplus": {"slope": 3.0}}, lambda x: jax.nn.softplus(3 * x) / 3),
]


@jax.jit
def _references(x):
    return jnp.stack([function(x) for _, function in ACTIVATIONS])


@jax.jit
def _plain(x):
    return jnp.stack([ready.activation(candidate)(x) for candidate, _ in ACTIVATIONS])


@jax.jit
def _numbered(numbers, x):
    values = jax.vmap(lambda one: ready.activation_of(one)(x))(numbers)
    slopes = jax.vmap(lambda one: jax.vmap(jax.grad(ready.activation_of(one)))(x))(numbers)
    by_number = jax.vmap(jax.grad(lambda one: ready.activation_of(one)(x).sum(), allow_int=True))
    return values, slopes, by_number(numbers).values


def test_activations_are_those_of_jax():
    wanted = np.asarray(_references(X))
    np.testing.assert_allclose(_plain(X), wanted, rtol=1e-6, atol=1e-7)
    numbers = ready.stack([ready.activation_numbers(candidate) for candidate, _ in ACTIVATIONS])
    values, slopes, of_numbers = _numbered(numbers, X)
    np.testing.assert_allclose(values, wanted, rtol=1e-6, atol=1e-7)
    jacobian = np.asarray(jax.jit(jax.jacfwd(_references))(X))
    slopes = np.array(slopes)
    slopes[4, 3] = 1.0  # a kink: of its two slopes JAX takes the other one
    np.testing.assert_allclose(slopes, jacobian.diagonal(axis1=1, axis2=2), rtol=1e-5, atol=1e-6)
    # Kinds that are not taken leave no NaN behind, and no slope.
    assert np.isfinite(of_numbers).all()
    assert np.count_nonzero(np.asarray(of_numbers)[6]) == 0


def test_activations_keep_the_type_of_their_input():
    x = X.astype(jnp.float16)
    numbers = ready.activation_numbers({"relu": {"leak": np.float32(0.1)}})
    assert jax.eval_shape(ready.activation_of(numbers), x).dtype == jnp.float16
    assert jax.eval_shape(ready.activation({"silu": {"slope": 2.0}}), x).dtype == jnp.float16


def test_parameters_may_be_traced():
    space = ready.activations()
    leaks = jnp.array([0.0, 0.5])
    f = jax.jit(jax.vmap(lambda leak: ready.activation({"relu": {"leak": leak}})(X)))
    np.testing.assert_allclose(f(leaks)[1], np.where(X > 0, X, 0.5 * X))
    numbers = jax.jit(lambda leak: ready.activation_numbers({"relu": {"leak": leak}}).values)
    np.testing.assert_allclose(numbers(leaks[1]), [1, 1, 0, 0.5, 1, 1, 1])
    assert list(spaces.every_part(space)) == [
        "",
        "sigmoid/slope",
        "tanh/slope",
        "relu/threshold",
        "relu/leak",
        "silu/slope",
        "elu/alpha",
        "softplus/slope",
    ]


WARM = 10
STEPS = 100
SCHEDULES = [
    ({"rate": 0.1, "warmup": 0.0, "decay": "constant"}, optax.constant_schedule(0.1)),
    (
        {"rate": 0.1, "warmup": 0.1, "decay": "cosine"},
        optax.warmup_cosine_decay_schedule(0.0, 0.1, WARM, STEPS),
    ),
    (
        {"rate": 0.1, "warmup": 0.1, "decay": {"cosine": {"final": 0.2}}},
        optax.warmup_cosine_decay_schedule(0.0, 0.1, WARM, STEPS, 0.02),
    ),
    (
        {"rate": 0.3, "warmup": 0.1, "decay": {"exponential": {"final": 0.05}}},
        optax.warmup_exponential_decay_schedule(
            0.0, 0.3, WARM, STEPS - WARM, 0.05, end_value=0.015
        ),
    ),
    (
        {"rate": 0.2, "warmup": 0.1, "decay": {"step": {"drops": 2, "factor": 0.5}}},
        optax.join_schedules(
            [
                optax.linear_schedule(0.0, 0.2, WARM),
                optax.piecewise_constant_schedule(0.2, {30: 0.5, 60: 0.5}),
            ],
            [WARM],
        ),
    ),
    (
        {"rate": 0.2, "warmup": 0.0, "decay": {"linear": {"final": 0.1}}},
        optax.linear_schedule(0.2, 0.02, STEPS),
    ),
]


def test_schedules_are_those_of_optax():
    steps = np.arange(STEPS + 20)
    references = jax.jit(jax.vmap(lambda step: jnp.stack([f(step) for _, f in SCHEDULES])))
    one_by_one = jax.jit(
        jax.vmap(lambda step: jnp.stack([ready.schedule(c, STEPS)(step) for c, _ in SCHEDULES]))
    )
    numbers = ready.stack([ready.schedule_numbers(candidate) for candidate, _ in SCHEDULES])
    grid = jax.jit(
        jax.vmap(
            lambda step, steps: jax.vmap(lambda one: ready.schedule_of(one, steps)(step))(numbers),
            (0, None),
        )
    )
    wanted = np.asarray(references(steps))
    np.testing.assert_allclose(one_by_one(steps), wanted, rtol=2e-5, atol=1e-8)
    np.testing.assert_allclose(grid(steps, STEPS), wanted, rtol=2e-5, atol=1e-8)


def test_every_candidate_of_the_space_has_a_rate():
    space = ready.schedules()
    rng = np.random.default_rng(0)
    candidates = [spaces.decode(space, spaces.sample(space, rng)) for _ in range(40)]
    numbers = ready.stack([ready.schedule_numbers(candidate) for candidate in candidates])
    rates = jax.jit(
        lambda numbers: jax.vmap(
            lambda one: jax.vmap(ready.schedule_of(one, STEPS))(jnp.arange(STEPS))
        )(numbers)
    )(numbers)
    highest = np.array([candidate["rate"] for candidate in candidates])
    assert np.isfinite(rates).all()
    assert np.min(rates) >= 0
    np.testing.assert_allclose(np.max(rates, axis=1), highest, rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: ready.activations("relu"), TypeError, "^activations: kinds must be None"),
        (lambda: ready.activations(["rleu"]), ValueError, "^activations: there is no 'rleu'"),
        (lambda: ready.activations({"gelu": {"slope": 1}}), ValueError, "it has none"),
        (lambda: ready.activations({"relu": {"leek": 1}}), ValueError, "^activations/relu: .*leak"),
        (lambda: ready.activation({"relu": 0.1}), TypeError, "^activation/relu: parameters must"),
        (lambda: ready.activation(3), TypeError, "^activation: must be a name or"),
        (lambda: ready.activation_numbers({"a": 1, "b": 2}), TypeError, "^activation: must be"),
        (lambda: ready.schedules({"cosin": None}), ValueError, "^schedules/decay: there is no"),
        (lambda: ready.schedule("cosine", 10), TypeError, "^schedule: must be a dict"),
        (lambda: ready.schedule({"rate": 1}, 10), ValueError, "is not there"),
        (
            lambda: ready.schedule_numbers({"rate": 1, "warmup": 0, "decay": "step", "x": 1}),
            ValueError,
            "'x' is no part of a schedule",
        ),
        (
            lambda: ready.schedule({"rate": 1, "warmup": 0, "decay": "step"}, 0),
            ValueError,
            "steps is 0",
        ),
        (lambda: ready.stack([]), ValueError, "^stack: there are no numbers"),
        (
            lambda: ready.stack(
                [
                    ready.activation_numbers("relu"),
                    ready.schedule_numbers({"rate": 1, "warmup": 0, "decay": "step"}),
                ]
            ),
            TypeError,
            "^stack: Numbers and ScheduleNumbers do not stand side by side",
        ),
        (lambda: ready.activations([]), ValueError, "^activations: there is no kind to choose"),
        (lambda: ready.activations(["relu", "relu"]), ValueError, "^activations: 'relu' is named"),
        (lambda: ready.activations({"relu": {"leak": "a"}}), TypeError, "^activations/relu/leak"),
        (
            lambda: ready.activation({"relu": {"leak": "a"}}),
            TypeError,
            "^activation/relu/leak: mus",
        ),
        (
            lambda: ready.activation("relu")(jnp.array([-2, 3])),
            TypeError,
            "takes floats, not int32",
        ),
        (
            lambda: ready.activation_of(ready.activation_numbers("relu"))(np.array([1])),
            TypeError,
            "takes floats, not int",
        ),
        (lambda: ready.schedules(rate="fast"), TypeError, "^schedules/rate: must be a number or a"),
        (
            lambda: ready.schedule({"rate": "fast", "warmup": 0, "decay": "step"}, 9),
            TypeError,
            "^schedule/rate: must be a number, not 'fast'",
        ),
        (
            lambda: ready.schedule_numbers({"rate": 1, "warmup": 20, "decay": "step"}),
            ValueError,
            "^schedule/warmup is 20: a fraction of the steps",
        ),
    ],
)
def test_what_will_not_do_is_named(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_kinds_may_be_named_with_parts_or_constants():
    space = ready.activations({"relu": {"leak": Choice((0.0, 0.1))}, "tanh": None})
    assert [spaces.decode(space, point) for point in spaces.enumerate_points(space)] == [
        {"relu": {"leak": 0.0}},
        {"relu": {"leak": 0.1}},
        "tanh",
    ]
    rates = ready.schedules(["cosine"], rate=Continuous(0.1, 1.0), warmup=0.0)
    assert spaces.count(rates, levels=3) == 3
