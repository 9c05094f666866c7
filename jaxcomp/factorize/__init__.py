"""Low rank: a weight as a product of small factors."""

from jaxcomp.factorize.applied import LowRankModel, LowRankProduct, low_rank_apply
from jaxcomp.factorize.budget import Allocation, Budget, allocate
from jaxcomp.factorize.cp_tensor import canonical
from jaxcomp.factorize.one_shot import Factorized, FactorizedLeaf, svd
from jaxcomp.factorize.residual import largest_weights
from jaxcomp.factorize.rules import LowRank
from jaxcomp.factorize.spectra import Spectra, Spectrum, spectra, truncated
from jaxcomp.factorize.svd_matrix import svd_matrix, whitened_svd_matrix
from jaxcomp.factorize.tasks import read_forms
from jaxcomp.factorize.to_accuracy import RanksToAccuracy, to_accuracy
from jaxcomp.factorize.training import train
from jaxcomp.factorize.tucker_tensor import tucker2

__all__ = [
    "Allocation",
    "Budget",
    "Factorized",
    "FactorizedLeaf",
    "LowRank",
    "LowRankModel",
    "LowRankProduct",
    "RanksToAccuracy",
    "Spectra",
    "Spectrum",
    "allocate",
    "canonical",
    "largest_weights",
    "low_rank_apply",
    "read_forms",
    "spectra",
    "svd",
    "svd_matrix",
    "to_accuracy",
    "train",
    "truncated",
    "tucker2",
    "whitened_svd_matrix",
]
