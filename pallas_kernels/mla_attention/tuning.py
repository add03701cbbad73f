"""Sizes of blocks."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Blocks:
    """Positions in a block of queries and in one of keys."""

    queries: int
    keys: int


TPU_FORWARD = Blocks(512, 512)
TPU_QUERY_GRADIENT = Blocks(512, 512)
TPU_KEY_GRADIENT = Blocks(512, 512)


@dataclass(frozen=True)
class Passing:
    """What passes by the positions that a kernel holds on Hopper."""

    positions: int  # of a block
    stages: int  # blocks in shared memory


HOPPER_KEYS = Passing(64, 3)
HOPPER_QUERIES = Passing(32, 4)
