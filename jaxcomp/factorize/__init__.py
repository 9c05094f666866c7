"""Low rank: a weight as a product of small factors."""

from jaxcomp.factorize.cp_tensor import canonical
from jaxcomp.factorize.one_shot import Factorized, FactorizedLeaf, svd
from jaxcomp.factorize.residual import largest_weights
from jaxcomp.factorize.rules import LowRank
from jaxcomp.factorize.svd_matrix import svd_matrix, whitened_svd_matrix
from jaxcomp.factorize.tasks import read_forms
from jaxcomp.factorize.training import train
from jaxcomp.factorize.tucker_tensor import tucker2

__all__ = [
    "Factorized",
    "FactorizedLeaf",
    "LowRank",
    "canonical",
    "largest_weights",
    "read_forms",
    "svd",
    "svd_matrix",
    "train",
    "tucker2",
    "whitened_svd_matrix",
]
