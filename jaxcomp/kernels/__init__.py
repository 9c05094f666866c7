"""Hot paths: arrays in, arrays out. Nothing here knows of parameter trees."""

from jaxcomp.kernels.block_sparse.matmul import block_sparse_matmul
from jaxcomp.kernels.codebook.matmul import codebook_matmul
from jaxcomp.kernels.fake_quant.conv import fake_quant_conv
from jaxcomp.kernels.fake_quant.matmul import fake_quant_matmul
from jaxcomp.kernels.fake_quant.rounding import Rounding
from jaxcomp.kernels.masked.conv import masked_conv, pack_kernel_mask
from jaxcomp.kernels.masked.matmul import masked_matmul
from jaxcomp.kernels.packed_mask import PackedMask, pack_mask
from jaxcomp.kernels.quantized.matmul import quantized_matmul
from jaxcomp.kernels.tables import Table, load_table, save_table, tuned
from jaxcomp.kernels.tuning import tune

__all__ = [
    "PackedMask",
    "Rounding",
    "Table",
    "block_sparse_matmul",
    "codebook_matmul",
    "fake_quant_conv",
    "fake_quant_matmul",
    "load_table",
    "masked_conv",
    "masked_matmul",
    "pack_kernel_mask",
    "pack_mask",
    "quantized_matmul",
    "save_table",
    "tune",
    "tuned",
]
