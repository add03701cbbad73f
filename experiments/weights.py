"""The abstract weights that a checkpoint is loaded into."""

from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax.config import Config
from dsv3_jax.model import size
from dsv3_jax.training.manifest import MODEL, Meta


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
