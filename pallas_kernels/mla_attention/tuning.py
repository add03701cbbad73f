"""Sizes of blocks, beside the numbers that chose them. Nothing here was timed on a device."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Blocks:
    """Positions in a block of queries and in one of keys."""

    queries: int
    keys: int


# Bundles in the compiled schedule for 512 x 512 scores that need no mask, by queries x keys of a block (jax
# 0.12.0, libtpu 0.0.50):
#
#                           256 x 512   512 x 256   512 x 512   1024 x 512   512 x 1024
#   tpu7x, forward               1100        1074         916          898          868
#   tpu7x, of queries            1474        1202         913          824            -
#   tpu7x, of keys, values       2126        1788        1393            -         1203
#   v6e, forward                    -           -        1109            -            -
#   v5p, forward                    -           -        1925            -            -
#
# The longest of these compute a ninth more in a row of 4096 positions, as more of what they cover is hidden,
# and more where documents are short: that is what they save.
TPU_FORWARD = Blocks(512, 512)
TPU_QUERY_GRADIENT = Blocks(512, 512)
TPU_KEY_GRADIENT = Blocks(512, 512)


@dataclass(frozen=True)
class Passing:
    """What passes by the positions that a kernel holds on Hopper."""

    positions: int  # of a block
    stages: int  # blocks in shared memory


# Of 240 registers a thread, gradients of 64 queries take 96, those of 64 keys and their values 160. ptxas
# 13.0.88 spills nothing with these; 2540 bytes with 128 keys, 1388 with 64 queries, and 32 bytes with 32
# queries in six stages, whose remainders take more registers than a mask.
HOPPER_KEYS = Passing(64, 3)
HOPPER_QUERIES = Passing(32, 4)
