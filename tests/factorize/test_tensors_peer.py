"""Tucker-2 and CP beside tensorly: no worse than what it finds."""

import jax
import numpy as np
import pytest

from jaxcomp.factorize.cp_tensor import canonical
from jaxcomp.factorize.tucker_tensor import tucker2

pytestmark = pytest.mark.slow
RNG = np.random.default_rng(7)


def smooth(shape):
    """Noise on a decaying spectrum, as trained kernels have."""
    kernel = RNG.normal(size=shape)
    for axis, size in enumerate(shape):
        basis = np.linalg.qr(RNG.normal(size=(size, size)))[0] * 0.8 ** np.arange(size)
        kernel = np.moveaxis(np.tensordot(kernel, basis, (axis, 0)), -1, axis)
    return kernel


def relative_error(kernel, found):
    return np.linalg.norm(found - kernel) / np.linalg.norm(kernel)


@pytest.mark.parametrize("ranks", [(1, 1), (3, 5), (8, 4), (16, 24)])
def test_tucker_2(ranks):
    tensorly = pytest.importorskip("tensorly", reason="pip install tensorly")
    from tensorly.decomposition import partial_tucker

    kernel = smooth((16, 9, 24))
    (core, factors), _ = partial_tucker(
        kernel, rank=list(ranks), modes=[0, 2], n_iter_max=100, tol=1e-10
    )
    theirs = tensorly.tenalg.multi_mode_dot(core, factors, modes=[0, 2])
    ours = [np.asarray(f, np.float64) for f in tucker2(kernel.astype(np.float32), ranks, 100)]
    error = relative_error(kernel, np.einsum("ia,akb,bo->iko", *ours))
    best = relative_error(kernel, theirs)
    print(f"Tucker-2 {ranks}: {error:.6f}, tensorly {best:.6f}")
    # To the rounding of float32 at full ranks, where nothing is left over.
    assert error <= best * 1.001 + 2e-6


@pytest.mark.parametrize("rank", [1, 4, 12])
def test_canonical(rank):
    pytest.importorskip("tensorly", reason="pip install tensorly")
    from tensorly.cp_tensor import cp_to_tensor
    from tensorly.decomposition import parafac

    kernel = smooth((3, 3, 8, 12))

    def theirs(seed):
        found = parafac(kernel, rank, n_iter_max=100, tol=0, init="random", random_state=seed)
        return relative_error(kernel, cp_to_tensor(found))

    def ours(seed):
        key = jax.random.key(seed)
        found = canonical(kernel.astype(np.float32), rank, iterations=100, key=key)
        factors = [np.asarray(factor, np.float64) for factor in found]
        return relative_error(kernel, np.einsum("ar,br,cr,dr->abcd", *factors))

    # Alternating least squares stops in local optima, some per cent apart: means are compared.
    error, best = (np.mean([one(seed) for seed in range(5)]) for one in (ours, theirs))
    print(f"CP {rank}: {error:.6f}, tensorly {best:.6f}")
    assert error <= 1.02 * best
