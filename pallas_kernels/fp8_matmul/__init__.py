"""FP8 matrix products with fine-grained scales (arXiv:2412.19437, section 3.3.2)."""

from pallas_kernels.fp8_matmul.api import matmul as matmul
