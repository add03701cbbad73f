"""What the conformance suites share: interpreters, compilers of absent chips, measures, hard inputs."""

import functools
import importlib.util
import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.scaled import Scaled

# Kernels are interpreted where jax has an interpreter for GPUs, and one for TPUs that does not hang.
interprets = pytest.mark.skipif(
    tuple(map(int, jax.__version__.split(".")[:2])) < (0, 11),
    reason="jax before 0.11 cannot interpret kernels",
)
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the compiler for TPUs, is not installed"
)
CHIPS = {"v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


def on_tpu():
    """Interprets a TPU kernel and raises on races; outside `shard_map` only."""
    from jax.experimental.pallas import tpu as pltpu

    return pltpu.InterpretParams(detect_races=True)


def on_hopper():
    """Interprets a Mosaic GPU kernel and raises on races."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.InterpretGPUParams(detect_races=True)


@functools.cache
def absent(chip: str, slices: int = 1) -> list[jax.Device]:
    """The cores of a few chips that are not here, to compile for."""
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    several = {"num_slices": slices} if slices > 1 else {}
    return topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip], **several).devices


def _device(chip: str) -> NamedSharding:
    return NamedSharding(Mesh(np.array(absent(chip)[:1]), ("one",)), PartitionSpec())


def compile_for(chip: str, f, *arguments):
    """Compiles `f` for one core of a chip, with that chip's compiler. Arguments are trees of shapes."""
    place = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=_device(chip))  # noqa: E731
    return jax.jit(f).lower(*jax.tree.map(place, arguments)).compile()


def shape(*sizes: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def scaled_shape(*sizes: int, tile: tuple[int, int]) -> Scaled:
    """The abstract quantised matrix, or stack of them."""
    *stack, rows, columns = sizes
    scales = (*stack, -(-rows // tile[0]), -(-columns // tile[1]))
    return Scaled(shape(*sizes, dtype=jnp.float8_e4m3fn), shape(*scales, dtype=jnp.float32), tile)


def numbers(x: Scaled) -> np.ndarray:
    """What a quantised array stands for, in float64."""
    scales = np.asarray(x.scales, np.float64)
    for axis, tile in zip((-2, -1), x.tile, strict=True):
        scales = np.repeat(scales, tile, axis)
    rows, columns = x.shape[-2:]
    return np.asarray(x.values).astype(np.float64) * scales[..., :rows, :columns]


def relative_error(got, want) -> float:
    """|got - want| / |want|, Frobenius norms in float64."""
    got, want = np.asarray(got).astype(np.float64), np.asarray(want).astype(np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def difference(got, want) -> float:
    """DeepGEMM's measure, 1 - 2<x,y> / (<x,x> + <y,y>); it accepts below 0.001 (testing/numeric.py)."""
    got, want = np.asarray(got).astype(np.float64), np.asarray(want).astype(np.float64)
    return float(1 - 2 * np.sum(got * want) / (np.sum(got * got) + np.sum(want * want)))


def hard(name: str, rows: int, columns: int, dtype=np.float32) -> np.ndarray:
    """Inputs that break careless kernels; `dtype` may be ml_dtypes.bfloat16."""
    rng = np.random.default_rng(rows * 1000 + columns)
    x = rng.normal(size=(rows, columns)).astype(np.float32)
    if name == "zeros":
        x[:] = 0
    elif name == "some zero tiles":
        x[: rows // 2, : columns // 2] = 0
    elif name == "one huge":
        x[rows // 3, columns // 3] = 3e30
    elif name == "tiny":
        x *= 1e-20
    elif name == "denormal":
        x *= 1e-39
    elif name == "edges":
        x = np.sign(x) * np.float32(448) * np.exp2(rng.integers(-12, 3, x.shape)).astype(np.float32)
    elif name == "nan":
        x[rows // 2, columns // 2] = np.nan
    elif name == "inf":
        x[rows // 2, columns // 2] = np.inf
    else:
        assert name == "normal", name
    return x.astype(dtype)


HARD = ["normal", "zeros", "some zero tiles", "one huge", "tiny", "denormal", "edges", "nan", "inf"]
BF16 = ml_dtypes.bfloat16
