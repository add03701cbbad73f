"""Eight CPU devices, strict array rules, and the small sizes that tests share."""

import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

import pytest  # noqa: E402

from dsv3_jax import mesh  # noqa: E402
from dsv3_jax.config import Config  # noqa: E402

ROOT = Path(__file__).parents[1]

# Every mechanism at its smallest: dense and routed layers, groups, shared experts, two depths of MTP.
SMALL = Config(
    vocab=96,
    d_model=32,
    layers=3,
    dense_layers=1,
    mtp_depth=2,
    heads=4,
    d_nope=8,
    d_rope=4,
    d_value=8,
    q_rank=16,
    kv_rank=8,
    d_dense=48,
    d_expert=16,
    experts=8,
    shared_experts=2,
    top_k=2,
    groups=4,
    top_groups=2,
)


@pytest.fixture(scope="session")
def c() -> Config:
    return SMALL


@pytest.fixture(scope="session")
def one_device() -> jax.sharding.Mesh:
    """The mesh of the first device alone, whatever number the process has."""
    return mesh_of(1, 1)


def mesh_of(data: int, expert: int, pipeline: int = 1) -> jax.sharding.Mesh:
    """A mesh of the first devices; `make_mesh` itself insists on using all of them."""
    explicit = (jax.sharding.AxisType.Explicit,) * 3
    devices = jax.devices()[: pipeline * data * expert]
    return jax.make_mesh((pipeline, data, expert), mesh.AXES, axis_types=explicit, devices=devices)


def parts_of(model, bias):
    """Reads of weights at hand what `Parts.read` reads of a checkpoint."""

    def read(select, row=None):
        part = select({"model": model, "bias": bias})
        return part if row is None else jax.tree.map(lambda w: w[row : row + 1], part)

    return read
