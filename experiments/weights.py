"""The weights of a checkpoint, as they were trained or as text is written with them."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax.config import Config
from dsv3_jax.model import size
from dsv3_jax.model.cached import Served
from dsv3_jax.ops import Ops
from dsv3_jax.ops.held import Hold, in_fp8
from dsv3_jax.training.manifest import MODEL, Meta
from dsv3_jax.training.restore import load_parts

HOLD = {"as_products": None, "fp8": in_fp8}
"""How the weights of linear layers lie in memory while text is written; None as the products read them."""


def served(checkpoint: Path, c: Config, meta: Meta, ops: Ops, hold: Hold | None = None) -> Served:
    """The weights of a checkpoint in the form that text is written with, on the mesh that is set.

    They are read a layer at a time, so that those of training are never held beside them.

    Raises:
        CheckpointError: if they are damaged.
    """
    return load_parts(
        checkpoint, weights_of(c, meta), partial(Served.of, c=c, dtype=ops.dtype, hold=hold or ops.hold)
    )


def weights_of(c: Config, meta: Meta) -> dict[str, Any]:
    """The weights of a checkpoint in the types that it has, laid out for the mesh that is set."""
    stored = meta.arrays[MODEL]
    tree = {
        "model": size.abstract(c),
        "bias": jax.ShapeDtypeStruct((c.balanced_layers, c.experts), jnp.float32),
    }

    def one(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        dtype = stored[name].dtype if name in stored else leaf.dtype
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)

    return jax.tree_util.tree_map_with_path(one, tree)
