"""Zero-cost proxies: what an untrained network tells about how well it will train.

All are pure: ``jax.jit`` them, and ``jax.vmap`` them over the parameters of many initializations.
None needs hooks or special layers; higher is better in each. They order networks of one space, and
poorly so in many: see what their ranks are worth in yours before you search by them.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp import checks
from jaxcomp import tree as tree_lib
from jaxcomp.model import tapped
from jaxcomp.model.program import Op, Program, Value, read
from jaxcomp.model.reach import reached
from jaxcomp.search import scaled
from jaxcomp.sharding import automatic

_COMPARISONS = frozenset({"gt", "ge", "lt", "le"})
# Where these turn from one side to the other, their input changes its sign.
_SIGMOIDAL = frozenset({"tanh", "logistic", "erf", "erfc"})
_STABILIZER = 1e-5


def gradient_norm(loss: Any, params: Any, *batch: Any) -> jax.Array:
    """The sum of the Euclidean norms of the weights' gradients, each leaf's by itself.

    Args:
        loss: ``(params, *batch) -> scalar``.
        params: any tree; biases and norms have no part in it.
        *batch: a minibatch.

    Returns:
        float32 scalar.

    Raises:
        TypeError: ``loss`` is none, or returns no floating scalar.
        ValueError: there is no weight.

    Example:
        >>> params = {"w": jnp.array([[1.0], [2.0]])}
        >>> gradient_norm(lambda p, x: (x @ p["w"]).sum(), params, jnp.array([[3.0, 4.0]]))
        Array(5., dtype=float32)

    Source: Abdelfattah et al., "Zero-cost proxies for lightweight NAS", ICLR 2021, section 3.2.1.
    """
    checks.check_function("loss", loss, "(params, *batch) that returns one number")
    # Leaves of integers, such as counters, have no gradient and no part in it.
    slope = jax.grad(lambda p: checks.one_number(loss(p, *batch)), allow_int=True)
    found = slope(params)
    norms = [
        jnp.sqrt(jnp.square(leaf.astype(jnp.float32)).sum()) for leaf in _weights(found).values()
    ]
    return jnp.stack(norms).sum()


def synflow(apply_fn: Any, params: Any, *inputs: Any) -> jax.Array:
    """The logarithm of SynFlow: how much of a signal flows through the weights as a whole.

    Of the network with all parameters made positive, on inputs of ones, the sum over weights of
    weight times gradient of the summed outputs. The sum grows by a factor with every layer; it is
    computed with exponents beyond those of floats (:mod:`jaxcomp.search.scaled`), and so are depths
    compared that overflow otherwise.

    Args:
        apply_fn: ``(params, *inputs)``; batch norm, if any, as in evaluation.
        params: any tree; of its leaves, those that are weights are summed over.
        *inputs: floating ones count by their shapes only; one example will do.

    Returns:
        float32 scalar, natural logarithm; ``-inf`` if nothing flows.

    Raises:
        TypeError: ``apply_fn`` is none.
        ValueError: there is no weight; the outputs are not floating.

    Example:
        >>> params = [{"w": jnp.full((1, 1), -(2.0**100))} for _ in range(4)]
        >>> def model(params, x):
        ...     for layer in params:
        ...         x = jax.nn.relu(x @ layer["w"])
        ...     return x
        >>> score = jax.jit(lambda p: synflow(model, p, jnp.zeros((1, 1))))(params)
        >>> round(float(score / jnp.log(2.0)), 3)  # 4 * 2**400
        402.0

    Source: Tanaka et al., "Pruning neural networks without any data by iteratively conserving
    synaptic flow", NeurIPS 2020, equation 2; as a proxy Abdelfattah et al., ICLR 2021, equation 2.
    """
    checks.check_function("apply_fn", apply_fn, "(params, *inputs)")
    magnitudes = jax.tree.map(lambda x: jnp.abs(x) if _is_floating(x) else x, params)
    weights = _weights(magnitudes)
    ones = jax.tree.map(lambda x: jnp.ones_like(x) if _is_floating(x) else jnp.asarray(x), inputs)

    def flow(params: Any, *inputs: Any) -> Any:
        outputs = jax.tree.leaves(apply_fn(params, *inputs))
        sums = [leaf.sum() for leaf in outputs if _is_floating(leaf)]
        if not sums:
            raise ValueError("apply_fn returns nothing floating: the flow of what is summed?")
        return sum(sums[1:], sums[0])

    program = read(flow, magnitudes, *ones)

    def mantissa(weights: Any) -> Any:
        # In the order of the program's inputs, which is that of the tree.
        values = {**all_leaves, **weights}.values()
        (found,) = scaled.run(program, [*values, *jax.tree.leaves(ones)])
        return found.mantissa.astype(jnp.float32), found.exponent

    all_leaves = tree_lib.flatten(magnitudes, is_leaf=lambda _: False)
    gradients, exponent = jax.grad(mantissa, has_aux=True)(weights)
    single = lambda x: jnp.abs(x).astype(jnp.float32)
    flows = [jnp.sum(single(weights[path]) * single(gradients[path])) for path in weights]
    total = sum(flows[1:], flows[0])
    return scaled.logarithm(scaled.Scaled(total, exponent))


def naswot(apply_fn: Any, params: Any, *inputs: Any) -> jax.Array:
    """How differently a network treats examples before training, by which of its units are on.

    Each example has a binary code: whether the input of each activation is positive. The score is
    the log-determinant of the matrix of how many units any two examples agree in. Activations are
    found in the traced function: ``max`` with 0 (ReLU, as in the paper), comparisons with 0
    (leaky ReLU, ELU), and tanh, logistic and erf, thus also SiLU and GELU; what does not depend on
    both parameters and inputs is none.

    Args:
        apply_fn: ``(params, *inputs)``; it is called with one example at a time, as a batch of one.
        params: any tree.
        *inputs: arrays (n, ...); a minibatch, from 16 to 128 examples as a rule.

    Returns:
        float32 scalar; ``-inf`` where two examples have the same code, to rounding.

    Raises:
        TypeError: ``apply_fn`` is none.
        ValueError: there are no activations; one lies where its values cannot be had, in a branch
            or a ``while`` loop; the inputs do not have as many examples.

    Example:
        >>> params = {"w": jnp.eye(2)}
        >>> model = lambda p, x: jax.nn.relu(x @ p["w"])
        >>> x = jnp.array([[1.0, 1.0], [-1.0, 1.0]])
        >>> naswot(model, params, x).round(4)  # log det [[2, 1], [1, 2]]
        Array(1.0986, dtype=float32)

    Source: Mellor et al., "Neural architecture search without training", ICML 2021, equations 1-2.
    """
    checks.check_function("apply_fn", apply_fn, "(params, *inputs)")
    return automatic(_log_determinant)(activation_codes(apply_fn, params, *inputs))


def _log_determinant(codes: Any) -> Any:
    codes = codes.astype(jnp.float32)
    agreeing = codes @ codes.T + (1 - codes) @ (1 - codes).T
    return jnp.linalg.slogdet(agreeing).logabsdet


def activation_codes(apply_fn: Any, params: Any, *inputs: Any) -> jax.Array:
    """Which units are on, for each example; what :func:`naswot` compares.

    Args:
        apply_fn: as for :func:`naswot`, as are the others.
        params: any tree.
        *inputs: arrays (n, ...).

    Returns:
        bool (n, units), the units in the order of the program.

    Raises:
        TypeError: as :func:`naswot`.
        ValueError: likewise.

    Example:
        >>> model = lambda p, x: jnp.tanh(x * p["w"])
        >>> activation_codes(model, {"w": jnp.ones(2)}, jnp.array([[1.0, -1.0], [2.0, 3.0]]))
        Array([[ True, False],
               [ True,  True]], dtype=bool)
    """
    _check_examples(inputs)

    def one(params: Any, *example: Any) -> Any:
        return apply_fn(params, *jax.tree.map(lambda x: x[None], example))

    first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), inputs)
    program = read(one, params, *first)
    places = list(_activations(program))
    if not places:
        raise ValueError(
            "apply_fn has no activations that depend on parameters and inputs: none of max(x, 0), "
            "comparison with 0, tanh, logistic, erf is in it"
        )
    taps: dict[Op, list[tapped.Tap]] = {}
    blank = {}
    for number, (op, place, loops) in enumerate(places):
        fold = lambda _, read, place=place: read[place] > 0
        taps.setdefault(op, []).append(tapped.Tap(str(number), loops, fold))
        shape = (*(loop.params["length"] for loop in loops), *op.inputs[place].shape)
        blank[str(number)] = jnp.zeros(shape, bool)

    def code(*example: Any) -> Any:
        values = [*jax.tree.leaves(params), *jax.tree.leaves(example)]
        _, state = tapped.run(program, values, taps, blank)
        return jnp.concatenate([automatic(jnp.ravel)(state[key]) for key in blank])

    return jax.vmap(code)(*inputs)


def jacobian_covariance(apply_fn: Any, params: Any, x: Any) -> jax.Array:
    """How little the linear maps at different examples correlate before training.

    Args:
        apply_fn: ``(params, x)``; it is called with one example at a time, as a batch of one.
        params: any tree.
        x: floating (n, ...); a minibatch.

    Returns:
        float32 scalar, at most ``-n``; ``-inf`` if an example has the same derivative, such as
        zero, by all of its inputs, for then it correlates with nothing.

    Raises:
        TypeError: ``apply_fn`` is none; ``x`` is not floating, such as tokens.
        ValueError: ``x`` has no examples; the outputs are not floating.

    Example:
        >>> x = jnp.array([[1.0, 2.0, 5.0], [2.0, -1.0, 0.5]])
        >>> jacobian_covariance(lambda p, x: jnp.tanh(x @ p["w"]), {"w": jnp.eye(3)}, x).round(3)
        Array(-12.548, dtype=float32)

    Source: Mellor et al., "Neural architecture search without training", arXiv 2006.04647v1,
    section 3; as ``jacob_cov`` Abdelfattah et al., ICLR 2021, section 3.2.3.
    """
    checks.check_function("apply_fn", apply_fn, "(params, x)")
    _check_examples((x,))
    if not _is_floating(x):
        raise TypeError(f"x is of {jnp.result_type(x)}: there are no derivatives by it")

    def total(example: Any) -> Any:
        outputs = jax.tree.leaves(apply_fn(params, example[None]))
        sums = [leaf.astype(jnp.float32).sum() for leaf in outputs if _is_floating(leaf)]
        if not sums:
            raise ValueError("apply_fn returns nothing floating: the derivatives of what?")
        return sum(sums[1:], sums[0])

    return automatic(_spread)(jax.vmap(jax.grad(total))(x))


def _spread(slopes: Any) -> Any:
    """Of derivatives by each example's inputs, how little their directions correlate."""
    slopes = slopes.astype(jnp.float32).reshape(len(slopes), -1)
    centred = slopes - slopes.mean(axis=1, keepdims=True)
    norms = jnp.linalg.norm(centred, axis=1, keepdims=True)
    dead = (norms == 0).any()
    unit = centred / jnp.where(norms == 0, 1, norms)
    # The eigenvalues of all correlations, as squares: those near zero weigh most, and come out of
    # the matrix of correlations itself with errors far above the stabilizer.
    roots = jnp.linalg.svd(unit, compute_uv=False)
    values = jnp.pad(roots**2, (0, len(slopes) - len(roots))) + _STABILIZER
    return jnp.where(dead, -jnp.inf, -jnp.sum(jnp.log(values) + 1 / values))


def _activations(program: Program) -> Iterator[tuple[Op, int, tuple[Op, ...]]]:
    """Operations, which of their inputs decides, and the loops around them."""
    data = reached(program, program.inputs) & reached(program, program.leaves.values())
    seen: set[Value] = set()
    zeros: set[Value] = set()
    for op, outside in tapped.around(program):
        if op.name == "broadcast_in_dim" and _is_zero(op.inputs[0], zeros):
            zeros.add(op.outputs[0])
        for place in _deciding(op, lambda value: _is_zero(value, zeros)):
            value = op.inputs[place]
            if value not in data or value in seen or not jnp.issubdtype(value.dtype, jnp.floating):
                continue
            seen.add(value)
            for around, _ in outside:
                if around.name in ("cond", "while"):
                    raise ValueError(
                        f"{op} is inside {around}, which need not come to it: its codes are not "
                        "known"
                    )
            problem = tapped.obstacle(outside)
            if problem:
                raise ValueError(f"{op}: {problem}")
            yield op, place, tuple(around for around, _ in outside if around.name == "scan")


def _deciding(op: Op, is_zero: Callable[[Value], bool]) -> list[int]:
    if op.name in _SIGMOIDAL:
        return [0]
    if op.name == "max" or op.name in _COMPARISONS:
        return [place for place in (0, 1) if is_zero(op.inputs[1 - place])]
    return []


def _is_zero(value: Value, zeros: set[Value]) -> bool:
    if value.constant is None:
        return value in zeros
    return bool(np.size(value.constant) == 1 and np.all(np.asarray(value.constant) == 0))


def _is_floating(x: Any) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(x), jnp.floating))


def _weights(params: Any) -> tree_lib.Leaves:
    return tree_lib.select(params, check=False)


def _check_examples(inputs: tuple[Any, ...]) -> None:
    counts = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(inputs)}
    if len(counts) != 1 or counts in ({()}, {(0,)}):
        raise ValueError("inputs must have the same number of examples, their first axis, above 0")
