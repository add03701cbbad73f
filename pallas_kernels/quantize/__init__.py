"""Casts to FP8 and to 12 bits with a scale for each tile, alone or fused with SwiGLU."""

from pallas_kernels.quantize.reference import pack as pack
from pallas_kernels.quantize.reference import quantize as quantize
from pallas_kernels.quantize.reference import swiglu as swiglu
from pallas_kernels.quantize.reference import swiglu_backward as swiglu_backward
from pallas_kernels.quantize.reference import swiglu_transposed as swiglu_transposed
from pallas_kernels.quantize.reference import transposed as transposed
from pallas_kernels.quantize.reference import unpack as unpack
