"""Random small networks: plain functions of a dict of weights, drawn step by step."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from tests.model.steps import BY_RANK, Draw, Made, Shape, combine, dense, pick


class Step(NamedTuple):
    """One step of a network: its name, what it computes, and the numbers of the values it reads."""

    name: str
    made: Made
    reads: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Network:
    """A function of (params, *inputs); value 0 is the input, value i + 1 what step i makes.

    Attributes:
        steps: in order.
        outputs: numbers of the values that it returns.
        shapes: of all values.
    """

    steps: tuple[Step, ...]
    outputs: tuple[int, ...]
    shapes: tuple[Shape, ...] = field(repr=False)

    def __call__(self, params: Any, x: Any) -> tuple[Any, ...]:
        values = [x]
        for step in self.steps:
            reads = (values[i] for i in step.reads)
            values.append(step.made.compute(params.get(step.name, {}), *reads))
        return tuple(values[i] for i in self.outputs)

    def __repr__(self) -> str:
        lines = [f"value 0 {self.shapes[0]}"]
        for i, step in enumerate(self.steps):
            reads = ", ".join(f"value {j}" for j in step.reads)
            weights = f" with {step.made.weights}" if step.made.weights else ""
            lines.append(f"value {i + 1} {self.shapes[i + 1]} = {step.name}({reads}){weights}")
        return "\n".join([*lines, f"outputs: values {self.outputs}"])


class Drawn(NamedTuple):
    """A network with random weights and a batch."""

    apply_fn: Network
    params: dict[str, Any]
    inputs: tuple[Any, ...]

    def __repr__(self) -> str:
        return f"\n{self.apply_fn!r}\n"


@st.composite
def networks(draw: Draw, most_steps: int = 7) -> Drawn:
    """Draw a network of images, sequences or vectors, in float32, with batches of two.

    It begins with a dense layer. What no step reads becomes an output, mostly through a dense head;
    so nothing is dead, and some channels that come out as they are must stay. So must those that
    the input is added to, or that a norm is taken over: about one network in eight has none to cut.
    """
    shapes: list[Shape] = [pick(draw, (2, 4), (2, 3, 4), (2, 4, 4, 3))]
    steps: list[Step] = []

    def add(maker: Any, *reads: int) -> None:
        made = maker(draw, *(shapes[i] for i in reads))
        if made is None:
            return
        structs = [jax.ShapeDtypeStruct(shapes[i], jnp.float32) for i in reads]
        weights = {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in made.weights.items()}
        shape = jax.eval_shape(made.compute, weights, *structs).shape
        if np.prod(shape) <= 1500:
            steps.append(Step(f"{maker.__name__}{len(steps)}", made, reads))
            shapes.append(shape)

    add(dense, 0)
    for _ in range(draw(st.integers(2, most_steps))):
        # Mostly the newest value; sometimes an older one, so that paths part and meet again.
        last = len(shapes) - 1
        here = pick(draw, last, last, draw(st.integers(1, last)))
        if draw(st.integers(0, 3)) == 3:
            other = draw(st.integers(1, last))
            add(combine, here, pick(draw, other, other, other, 0))
        else:
            add(pick(draw, *BY_RANK[len(shapes[here])]), here)
    read = {i for step in steps for i in step.reads}
    outputs = []
    for i in sorted(set(range(1, len(shapes))) - read):
        if draw(st.integers(0, 5)) < 5:
            add(dense, i)
            i = len(shapes) - 1
        outputs.append(i)
    network = Network(tuple(steps), tuple(outputs), tuple(shapes))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    params = {step.name: _weights(rng, step.made) for step in steps if step.made.weights}
    return Drawn(network, params, (_normal(rng, shapes[0]),))


def _weights(rng: Any, made: Made) -> dict[str, Any]:
    weights = {}
    for name, shape in made.weights.items():
        if name == "var":
            weights[name] = jax.device_put(rng.uniform(0.5, 1.5, shape).astype(np.float32))
        else:
            # The root of the mean size of the axes: near enough to a fan-in for any layout.
            scale = np.prod(shape) ** (0.5 / len(shape)) if len(shape) > 1 else 1.0
            weights[name] = _normal(rng, shape, scale)
    return weights


def _normal(rng: Any, shape: Shape, scale: float = 1.0) -> Any:
    # In NumPy: with JAX every shape would be compiled for.
    return jax.device_put((rng.normal(size=shape) / scale).astype(np.float32))
