"""Products of many groups of rows, each group with its own matrix."""

from pallas_kernels.grouped_matmul.api import fp8_matmul as fp8_matmul
from pallas_kernels.grouped_matmul.api import fp8_weight_gradient as fp8_weight_gradient
from pallas_kernels.grouped_matmul.api import matmul as matmul
from pallas_kernels.grouped_matmul.reference import starts as starts
