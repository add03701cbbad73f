"""Sizes of blocks. Nothing here was timed on a device."""

from pallas_kernels.hopper import SMS

TPU_TOKENS = 512  # of a step
_HOPPER_LEAST = 8  # blocks of 64 tokens in a part, against which its results, written and merged, are few
_HOPPER_MOST = 32  # parts


def hopper_parts(programs: int, blocks: int, sms: int = SMS) -> int:
    """Parts of each sequence's tokens, so that all multiprocessors have some while results stay few."""
    return max(1, min(sms // programs, blocks // _HOPPER_LEAST, _HOPPER_MOST))
