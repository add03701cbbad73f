"""Products of many groups of rows, each group with its own matrix."""

from pallas_kernels.grouped_matmul.api import grouped_matmul as grouped_matmul
