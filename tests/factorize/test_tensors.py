"""Tucker-2 and CP of kernels, against NumPy and what is known of tensors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.factorize.cp_tensor import canonical, product
from jaxcomp.factorize.tucker_tensor import tucker2

RNG = np.random.default_rng(1)
KERNEL = RNG.normal(size=(6, 9, 5)).astype(np.float32)
KERNEL = KERNEL * (0.7 ** np.arange(6))[:, None, None].astype(np.float32)


def rebuilt(down, core, up):
    return np.einsum("ia,akb,bo->iko", *(np.asarray(f, np.float64) for f in (down, core, up)))


def hosvd(kernel, a, b):
    """Error of the truncated higher-order decomposition, in float64."""
    u = np.linalg.svd(kernel.reshape(6, -1), full_matrices=False)[0][:, :a]
    v = np.linalg.svd(kernel.reshape(-1, 5).T, full_matrices=False)[0][:, :b]
    core = np.einsum("iko,ia,ob->akb", kernel, u, v)
    return np.linalg.norm(np.einsum("ia,akb,ob->iko", u, core, v) - kernel)


def hooi(kernel, a, b, turns=200):
    u = np.linalg.svd(kernel.reshape(6, -1), full_matrices=False)[0][:, :a]
    v = np.linalg.svd(kernel.reshape(-1, 5).T, full_matrices=False)[0][:, :b]
    for _ in range(turns):
        seen = np.einsum("iko,ob->ikb", kernel, v).reshape(6, -1)
        u = np.linalg.svd(seen, full_matrices=False)[0][:, :a]
        seen = np.einsum("iko,ia->ako", kernel, u).reshape(-1, 5)
        v = np.linalg.svd(seen.T, full_matrices=False)[0][:, :b]
    core = np.einsum("iko,ia,ob->akb", kernel, u, v)
    return np.linalg.norm(np.einsum("ia,akb,ob->iko", u, core, v) - kernel)


def test_tucker_is_hosvd_then_hooi():
    wide = KERNEL.astype(np.float64)
    plain = np.linalg.norm(rebuilt(*tucker2(KERNEL, (3, 2), iterations=0)) - wide)
    np.testing.assert_allclose(plain, hosvd(wide, 3, 2), rtol=1e-4)
    better = np.linalg.norm(rebuilt(*tucker2(KERNEL, (3, 2), iterations=60)) - wide)
    np.testing.assert_allclose(better, hooi(wide, 3, 2), rtol=1e-4)
    assert better < plain


def test_tucker_at_full_ranks_is_exact_and_of_true_ranks_too():
    bound = 2e-6 * np.linalg.norm(KERNEL)
    assert np.linalg.norm(rebuilt(*tucker2(KERNEL, (6, 5))) - KERNEL) <= bound
    low = np.einsum(
        "ia,akb,bo->iko",
        RNG.normal(size=(6, 2)),
        RNG.normal(size=(2, 9, 2)),
        RNG.normal(size=(2, 5)),
    )
    error = np.linalg.norm(rebuilt(*tucker2(low.astype(np.float32), (2, 2))) - low)
    assert error <= 2e-6 * np.linalg.norm(low)


def test_tucker_of_zeros_and_of_equals():
    assert not np.any(rebuilt(*tucker2(np.zeros((6, 9, 5), np.float32), (2, 2))))
    equal = np.full((6, 9, 5), 0.3, np.float32)
    np.testing.assert_allclose(rebuilt(*tucker2(equal, (1, 1))), equal, rtol=1e-5)


def test_cp_finds_a_tensor_of_its_rank():
    true = [RNG.normal(size=(n, 3)) for n in (3, 3, 6, 5)]
    tensor = np.einsum("ar,br,cr,dr->abcd", *true).astype(np.float32)
    factors = canonical(tensor, 3, iterations=300)
    error = np.linalg.norm(np.asarray(product(factors)) - tensor) / np.linalg.norm(tensor)
    assert error < 1e-3
    # The terms of a term's factors are of one length.
    norms = [np.linalg.norm(factor, axis=0) for factor in factors]
    np.testing.assert_allclose(norms[1:], [norms[0]] * 3, rtol=1e-4)


def test_cp_of_a_matrix_is_its_decomposition():
    matrix = KERNEL[:, 0, :]
    factors = canonical(matrix, 2, iterations=200)
    best = np.sqrt(np.sum(np.linalg.svd(matrix, compute_uv=False)[2:] ** 2))
    error = np.linalg.norm(np.asarray(product(factors)) - matrix)
    np.testing.assert_allclose(error, best, rtol=1e-3)


def test_cp_of_a_degenerate_tensor_stays_bounded():
    """a⊗a⊗b + a⊗b⊗a + b⊗a⊗a has rank 3 and border rank 2: no best one of rank 2 exists."""
    a, b = np.eye(2)
    terms = [np.einsum("i,j,k->ijk", *part) for part in ((a, a, b), (a, b, a), (b, a, a))]
    tensor = np.sum(terms, axis=0).astype(np.float32)
    factors = canonical(tensor, 2, iterations=500)
    assert max(float(np.abs(np.asarray(f)).max()) for f in factors) < 30
    error = np.linalg.norm(np.asarray(product(factors)) - tensor) / np.linalg.norm(tensor)
    assert error < 0.2
    # Damping trades nearness for size.
    calm = canonical(tensor, 2, iterations=500, damping=0.1)
    sizes = [sum(float((np.asarray(f) ** 2).sum()) for f in found) for found in (calm, factors)]
    assert sizes[0] < sizes[1]
    # More terms than either axis has positions, and it is exact.
    exact = canonical(tensor, 3, jax.random.key(3), iterations=500)
    assert np.linalg.norm(np.asarray(product(exact)) - tensor) < 0.01


def test_cp_of_zeros_is_zero():
    zeros = np.zeros((2, 2, 2), np.float32)
    assert not np.any(np.asarray(product(canonical(zeros, 2, iterations=500))))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: tucker2(KERNEL, (0, 2)), ValueError, "rank of the inputs is 0"),
        (lambda: tucker2(KERNEL, (7, 2)), ValueError, "above its largest, 6"),
        (lambda: tucker2(KERNEL, (2, 2), iterations=-1), ValueError, "iterations"),
        (lambda: tucker2(np.ones((6, 1, 5), np.float32), (4, 2)), ValueError, "differ by more"),
        (lambda: tucker2(KERNEL[:0], (1, 1)), ValueError, "is not"),
        (lambda: canonical(KERNEL, 0), ValueError, "rank is 0"),
        (lambda: canonical(np.ones(3, np.float32), 1), ValueError, "no such factors"),
        (lambda: canonical(KERNEL, 1, key=3), TypeError, "PRNG key"),
        (lambda: canonical(KERNEL, 1, damping=jnp.inf), ValueError, "damping"),
    ],
)
def test_bad_input_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()
