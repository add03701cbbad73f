"""The flags of programs that look at texts with a checkpoint, once for all of them, and what they stand for.

A program adopts them with `flags.adopt_module_key_flags`, so that its --help has them too.
"""

from pathlib import Path

import jax
from absl import flags

from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.interop import tokenizer as beside
from dsv3_jax.ops import Ops
from experiments.scoring import PRECISIONS, mesh_of

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "A run's work directory, or converted weights.", required=True
)
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "A tokenizer.json; else the one beside the checkpoint.")
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 8, "Sequences at once; rounded up to a multiple of the devices.", lower_bound=1
)
_MESH_DATA = flags.DEFINE_integer("mesh_data", None, "Devices on the data axis; else all that are left.")
_MESH_EXPERT = flags.DEFINE_integer("mesh_expert", 1, "Devices on the expert axis.", lower_bound=1)
_PRECISION = flags.DEFINE_enum("precision", "float32", list(PRECISIONS), "Of activations and products.")


def checkpoint() -> Path:
    """Where the weights are."""
    return Path(_CHECKPOINT.value)


def tokenizer_file() -> str | None:
    """The one that was named."""
    return _TOKENIZER.value


def tokenizer() -> Tokenizer:
    """The one that was named, or else the checkpoint's.

    Raises:
        FileNotFoundError: if there is none.
    """
    return Tokenizer.load(_TOKENIZER.value or beside.find(checkpoint()))


def batch_size() -> int:
    """Sequences at once."""
    return _BATCH_SIZE.value


def mesh() -> jax.sharding.Mesh:
    """Of all devices."""
    return mesh_of(_MESH_DATA.value, _MESH_EXPERT.value)


def precision() -> str:
    """The word for the operations."""
    return _PRECISION.value


def operations() -> Ops:
    """Of that precision."""
    return PRECISIONS[_PRECISION.value]()
