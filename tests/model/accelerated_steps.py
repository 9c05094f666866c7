"""Train steps with compression inside the model, as it is and accelerated."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcomp
from jaxcomp.model import accelerate


def check_same_steps(
    apply_fn: Callable[[Any, Any], Any], params: Any, batch: tuple[Any, Any], method: Any,
    kernels: dict[str, int], left: int, close: float,
) -> None:  # fmt: skip
    """Three steps come to the same parameters; so many products are in kernels, others left."""
    tx, (x, y) = jaxcomp.wrap_optimizer(optax.sgd(0.1), method), batch

    def seen(opt_state: Any) -> Any:
        return lambda params, x: apply_fn(jaxcomp.compressed(params, opt_state), x)

    def trained(how: Any) -> Any:
        @jax.jit
        def step(params: Any, opt_state: Any) -> Any:
            loss = lambda params: jnp.mean((how(seen(opt_state))(params, x) - y) ** 2)
            updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        now, opt_state = params, tx.init(params)
        for _ in range(3):
            now, opt_state = step(now, opt_state)
        return now

    told = accelerate(seen(tx.init(params))).describe(params, x)
    assert {name: told.count(name) for name in kernels} == kernels
    assert told.count("left: ") == left
    pairs = zip(
        jax.tree.leaves(trained(accelerate)),
        jax.tree.leaves(trained(lambda run: run)),
        strict=True,
    )
    for found, expected in pairs:
        np.testing.assert_allclose(found, expected, rtol=close, atol=close)
