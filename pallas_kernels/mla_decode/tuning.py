"""Sizes of blocks. Nothing here was timed on a device."""

from pallas_kernels.hopper import SMS

# Bundles in the compiled schedule for 1024 tokens that all rows see (jax 0.12.0, libtpu 0.0.50), by the
# tokens of a step:
#
#                       256    512   1024
#   tpu7x, 128 heads   2208   1204    978
#   tpu7x, 16 heads     880    676    558
#   v6e, 128 heads        -   1588   1313
TPU_TOKENS = 1024  # of a step
_HOPPER_LEAST = 8  # blocks of 64 tokens in a part, against which its results, written and merged, are few
_HOPPER_MOST = 32  # parts


def hopper_parts(programs: int, blocks: int, sms: int = SMS) -> int:
    """Parts of each sequence's tokens, so that all multiprocessors have some while results stay few."""
    return max(1, min(sms // programs, blocks // _HOPPER_LEAST, _HOPPER_MOST))
