"""What a model says of given tokens: sequences of any lengths, in batches of few shapes."""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jaxtyping import Int

from dsv3_jax import mesh
from dsv3_jax.config import Config
from dsv3_jax.interop.config import from_record
from dsv3_jax.model.loss import Scores
from dsv3_jax.model.model import Model
from dsv3_jax.ops import Ops, bfloat16, float32
from dsv3_jax.pipeline import execute
from dsv3_jax.pipeline.objective import Batch, batch_spec
from dsv3_jax.training.progress import progress
from dsv3_jax.training.restore import load_weights, read_meta
from experiments.weights import weights_of

_SHORTEST = 16  # positions of the shortest batch: powers of two from here on, so that few shapes are compiled

_TOLD = 20  # times that progress is shown

PRECISIONS = {"float32": float32, "bfloat16": bfloat16}
"""Of activations and products."""


def mesh_of(data: int | None, expert: int) -> jax.sharding.Mesh:
    """So many devices on the expert axis, and on the data axis as many, or all that are left."""
    return mesh.make_mesh(1, data or max(1, jax.device_count() // expert), expert)


@dataclass(frozen=True)
class Scorer:
    """A model on the mesh that is set, and how many sequences it looks at together.

    Where a mesh spans processes, each of them calls with the same sequences and gets all results.
    """

    model: Model
    bias: jax.Array
    batch_size: int  # a multiple of the devices
    c: Config
    ops: Ops

    @classmethod
    def load(cls, checkpoint: Path, batch_size: int, operations: Ops) -> "Scorer":
        """The weights of a checkpoint; a batch is made larger until it divides over the devices.

        Raises:
            CheckpointError: if they are damaged.
            ValueError: if the model does not divide over the mesh.
        """
        meta = read_meta(checkpoint)
        c = from_record(meta.model_config)
        sizes = jax.sharding.get_mesh().shape
        data, expert = sizes[mesh.DATA], sizes[mesh.EXPERT]
        batch_size = -(-batch_size // (data * expert)) * data * expert
        mesh.check_divides(c, batch_size, 1, data, expert)
        weights = load_weights(checkpoint, weights_of(c, meta))
        return cls(weights["model"], weights["bias"], batch_size, c, operations)

    def score(self, lines: Sequence[Int[np.ndarray, " n"]]) -> list[Scores]:
        """Of tokens 2..n of each line, in the order of the lines: log p in nats, and the likeliest tokens.

        Lines of similar length share a batch; what is padded belongs to no segment and is seen by no token.

        Raises:
            ValueError: if the model gives a value that is not finite.
        """
        nothing: Any = np.zeros(0, np.float32), np.zeros(0, np.int32)
        out = [Scores(*nothing)] * len(lines)
        for rows, found in self._each_batch(_score, lines):
            for place, i in enumerate(rows):  # the last batch may have rows of padding alone
                out[i] = Scores(*(x[0, place, : len(lines[i]) - 1] for x in found))
                if not np.all(np.isfinite(out[i].logprobs)):
                    raise ValueError(
                        f"The model gives log-probabilities that are not finite for line {i + 1}."
                    )
        return out

    def expert_load(self, lines: Sequence[Int[np.ndarray, " n"]]) -> Int[np.ndarray, "R E"]:
        """How often tokens 1..n-1 of the lines chose each expert of each routed layer of the main model."""
        loads = (found for _, found in self._each_batch(_expert_load, lines))
        return sum(
            (load.astype(np.int64) for load in loads), np.zeros((self.c.routed_layers, self.c.experts), int)
        )

    def _each_batch(self, program: Callable, lines: Sequence[np.ndarray]) -> Iterator[tuple[list[int], Any]]:
        """Which lines, and what a program gives for them."""
        plan = list(batches([len(line) for line in lines], self.batch_size))
        with progress(len(plan), 0, sys.stderr) as display:
            for done, (rows, width) in enumerate(plan, 1):
                batch = _padded([lines[i] for i in rows], (1, self.batch_size, width + 1))
                found = program(self.model, self.bias, batch, c=self.c, ops=self.ops)
                yield rows, multihost_utils.process_allgather(found, tiled=True)
                if done == len(plan) or done % max(1, len(plan) // _TOLD) == 0:
                    display.update(done, {})


_score = jax.jit(execute.score, static_argnames=("c", "ops"))
_expert_load = jax.jit(execute.expert_load, static_argnames=("c", "ops"))


def batches(lengths: Sequence[int], batch_size: int) -> Iterator[tuple[list[int], int]]:
    """Lines to score together, and the positions to pad them to; lines of one token need no scoring."""
    widths: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        if length > 1:
            widths.setdefault(max(_SHORTEST, 1 << (length - 2).bit_length()), []).append(i)
    for width, rows in sorted(widths.items()):
        for start in range(0, len(rows), batch_size):
            yield rows[start : start + batch_size], width


def _padded(lines: Sequence[np.ndarray], shape: tuple[int, int, int]) -> Batch:
    tokens, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for row, line in enumerate(lines):
        tokens[0, row, : len(line)] = line
        segments[0, row, : len(line)] = 1
    layout = NamedSharding(jax.sharding.get_mesh(), batch_spec())
    return Batch(jax.device_put(tokens, layout), jax.device_put(segments, layout))
