"""Low-rank leaves: equations of every form, what they say of themselves, and parts that lie."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from leaf_samples import low_rank, low_rank_sum, quantized, reference, weights

from jaxcomp.arrays import LowRankArray, LowRankSumArray, Parts, Symbols

FACTORS = {
    "ia,ao->io": [(4, 2), (2, 6)],
    "hwia,ao->oihw": [(3, 2, 4, 2), (2, 6)],
    "hia,awo->hwio": [(3, 4, 2), (2, 2, 6)],
    "ia,hwab,bo->hwio": [(4, 2), (3, 2, 2, 3), (3, 6)],
    "ha,wa,ia,ao->hwio": [(3, 2), (2, 2), (4, 2), (2, 6)],
    "xia,xao->ixo": [(5, 4, 2), (5, 2, 6)],
}


def leaf_of(equation, batch=(), dtype="float32"):
    shapes = FACTORS[equation]
    parts = [np.round(weights((*batch, *shape)) * 8) / 8 for shape in shapes]
    return LowRankArray.from_factors(map(jnp.asarray, parts), equation, dtype)


@pytest.mark.parametrize("equation", FACTORS)
def test_every_form_decodes_to_the_sum_of_products(equation):
    for batch in ((), (2,)):
        leaf = leaf_of(equation, batch)
        want = reference(leaf)
        assert leaf.shape == want.shape
        assert leaf.dtype == np.float32
        # Products of four factors of three bits need more than float32 has.
        np.testing.assert_allclose(leaf.decode(), want, rtol=1e-6)
        again = LowRankArray.from_parts(leaf.to_parts())
        assert again.equation == equation
        np.testing.assert_array_equal(again.decode(), leaf.decode())


def test_what_it_says_of_itself():
    leaf = leaf_of("ia,hwab,bo->hwio", dtype="bfloat16")
    assert (leaf.shape, leaf.ranks, leaf.dtype) == ((3, 2, 4, 6), {"a": 2, "b": 3}, jnp.bfloat16)
    assert leaf.form() == "ranks 2 and 3"
    assert low_rank(weights((4, 6)), mask=True).form() == "rank 2, masked"
    assert low_rank_sum(weights((4, 6))).form() == "rank 2 + int4 symmetric, 6 scales"


def test_beyond_the_dtype_is_its_largest():
    big = jnp.full((2, 1), 400.0)
    leaf = LowRankArray.from_factors((big, big.T), "ia,ao->io", "float16")
    assert np.asarray(leaf.decode()).max() == 65504.0
    low = LowRankArray.from_factors((big, big.T), "ia,ao->io", "float32")
    both = LowRankSumArray(low, quantized(np.full((2, 2), 1.0, np.float32), 8), "float16")
    assert np.asarray(both.decode()).max() == 65504.0


GOOD = leaf_of("ia,ao->io").to_parts()


@pytest.mark.parametrize(
    "equation",
    [
        None,
        3,
        "",
        "ia,ao",
        "ia->i",
        "ia,ao->io->io",
        "...ia,...ao->...io",
        "iia,ao->io",
        "ia,ao->iox",
        "ia,ao->iia",
        "io,io->io",
        "ia,bo->io",
        "ia,ao,oo->io",
        "ia,ao,xo->io",
        "i a,ao->io",
        "é,a->é",
        "a" * 10_000,
    ],
)
def test_equations_that_lie_are_refused(equation):
    with pytest.raises(ValueError, match=r"equation|must hold|factor"):
        LowRankArray.from_parts(GOOD._replace(static={**GOOD.static, "equation": equation}))


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("factor1", (3, 6), "axis a"),
        ("factor1", (2, 2, 6), "leading axes"),
        ("factor1", (6,), "does not fit the axes"),
        ("factor0", (), "does not fit the axes"),
        ("factor0", (4, 0), "axis a"),
    ],
)
def test_factors_that_do_not_fit_are_refused(name, shape, words):
    arrays = {**GOOD.arrays, name: np.zeros(shape, np.float32)}
    with pytest.raises(ValueError, match=words):
        LowRankArray.from_parts(GOOD._replace(arrays=arrays))


def test_other_lies_are_refused():
    none = {"factor0": np.zeros((4, 0), np.float32), "factor1": np.zeros((0, 6), np.float32)}
    with pytest.raises(ValueError, match="a rank of 0"):
        LowRankArray.from_parts(GOOD._replace(arrays=none))
    huge = {
        "factor0": np.broadcast_to(np.float32(1), (1 << 24, 1)),
        "factor1": np.broadcast_to(np.float32(1), (1, 1 << 24)),
    }
    with pytest.raises(ValueError, match="no array is that large"):
        LowRankArray.from_parts(GOOD._replace(arrays=huge))
    whole = {**GOOD.arrays, "factor0": np.ones((4, 2), int)}
    for lie in (
        GOOD._replace(arrays=whole),
        GOOD._replace(static=None),
        GOOD._replace(arrays=None),
        GOOD._replace(static={**GOOD.static, "dtype": "int8"}),
        GOOD._replace(arrays={**GOOD.arrays, "factor2": GOOD.arrays["factor1"]}),
        GOOD._replace(symbols={"mask": Symbols(np.ones((4, 5), np.uint8), 2)}),
        GOOD._replace(symbols={"mask": Symbols(np.full((4, 6), 2, np.uint8), 2)}),
    ):
        with pytest.raises(ValueError, match=r"."):
            LowRankArray.from_parts(lie)


def test_sums_that_lie_are_refused():
    good = low_rank_sum(weights((4, 6))).to_parts()
    assert LowRankSumArray.from_parts(good).shape == (4, 6)
    for section, name in [(s, n) for s in Parts._fields for n in getattr(good, s)]:
        rest = {n: part for n, part in getattr(good, section).items() if n != name}
        with pytest.raises(ValueError, match=r"."):
            LowRankSumArray.from_parts(good._replace(**{section: rest}))
    other = {**good.arrays, "factor0": np.ones((5, 2), np.float32)}
    with pytest.raises(ValueError, match="do not fit weights"):
        LowRankSumArray.from_parts(good._replace(arrays=other))
    masked = LowRankSumArray(
        low_rank(weights((4, 6)), mask=True), quantized(weights((4, 6))), "float32"
    )
    with pytest.raises(ValueError, match="has no mask"):
        masked.to_parts()


def test_factors_that_do_not_fit_are_refused_when_made():
    with pytest.raises(ValueError, match="axis a"):
        LowRankArray.from_factors((jnp.ones((4, 2)), jnp.ones((3, 6))), "ia,ao->io", "float32")
    with pytest.raises(ValueError, match="a mask of shape"):
        LowRankArray.from_factors(
            (jnp.ones((4, 2)), jnp.ones((2, 6))), "ia,ao->io", "float32", jnp.ones((4, 5), bool)
        )


def test_an_empty_weight_stays_empty():
    leaf = LowRankArray.from_factors((jnp.ones((0, 2)), jnp.ones((2, 6))), "ia,ao->io", "float32")
    assert leaf.decode().shape == (0, 6)
    assert LowRankArray.from_parts(leaf.to_parts()).shape == (0, 6)


def test_gradients_reach_every_factor():
    leaf = leaf_of("ia,hwab,bo->hwio")
    grad = jax.grad(lambda leaf: jnp.sum(leaf.decode() ** 2))(leaf)
    assert all(float(np.abs(np.asarray(part)).max()) > 0 for part in grad.factors)
