"""Sizes of blocks. Nothing here was timed on a device."""

TPU_TOKENS = 512  # of a step
