"""Attention of decoding over a cache of latents, with weights absorbed (arXiv:2412.19437, section 2.1.1)."""

from pallas_kernels.mla_decode.api import decode as decode
from pallas_kernels.mla_decode.api import decode_paged as decode_paged
from pallas_kernels.mla_decode.api import merge as merge
