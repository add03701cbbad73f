"""Causal attention inside documents, with one width for queries and keys and another for values."""

from pallas_kernels.mla_attention.api import attention as attention
from pallas_kernels.mla_attention.api import backward as backward
from pallas_kernels.mla_attention.api import forward as forward
