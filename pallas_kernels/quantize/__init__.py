"""Casts to FP8 and to 12 bits with a scale for each tile, alone or fused with SwiGLU."""

from pallas_kernels.quantize.api import pack as pack
from pallas_kernels.quantize.api import quantize as quantize
from pallas_kernels.quantize.api import swiglu as swiglu
from pallas_kernels.quantize.api import swiglu_backward as swiglu_backward
from pallas_kernels.quantize.api import swiglu_transposed as swiglu_transposed
from pallas_kernels.quantize.api import transposed as transposed
from pallas_kernels.quantize.api import unpack as unpack
