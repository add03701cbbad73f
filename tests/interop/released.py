"""Small checkpoints in the released form, written by the safetensors package rather than by our writer."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from dsv3_jax.config import Config
from dsv3_jax.interop import config as released
from dsv3_jax.interop import names
from dsv3_jax.interop.names import Storage
from dsv3_jax.interop.safetensors import INDEX

BF16 = np.dtype(ml_dtypes.bfloat16)
F32 = np.dtype(np.float32)
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)

TINY = Config(
    vocab=64,
    d_model=32,
    layers=3,
    dense_layers=1,
    mtp_depth=1,
    heads=2,
    d_nope=12,
    d_rope=8,
    d_value=10,
    q_rank=20,
    kv_rank=12,
    d_dense=48,
    d_expert=16,
    experts=8,
    top_k=2,
    groups=4,
    top_groups=2,
    max_length=128,
)
DIRECT = replace(TINY, q_rank=None, mtp_depth=0, dense_layers=0, groups=1, top_groups=1, shared_experts=2)
WIDE = replace(TINY, d_model=160, d_expert=136, d_dense=200, heads=4, experts=4, groups=1, top_groups=1)

FP8_CONFIG = {"quantization_config": released.quantization_json(128)}


def tensors(c: Config, dtype: np.dtype = BF16, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights, scaled so that every layer matters."""
    rng = np.random.default_rng(seed)
    out = {}
    for t in names.tensors(c):
        if t.kind.storage is Storage.EXACT:
            out[t.name] = rng.normal(0, 0.3, t.shape).astype(F32)
        elif len(t.shape) == 1:
            out[t.name] = rng.normal(1, 0.2, t.shape).astype(dtype)
        else:
            out[t.name] = rng.normal(0, t.shape[1] ** -0.5, t.shape).astype(dtype)
    originals = {t.leaf: out[t.name] for t in names.tensors(c)}
    return out | {t.name: originals[t.leaf] for t in names.copies(c)}


def quantised(weights: Mapping[str, np.ndarray], c: Config, seed: int = 1) -> dict[str, np.ndarray]:
    """The same names with random E4M3 values and scales where released FP8 checkpoints have them."""
    rng = np.random.default_rng(seed)
    out = dict(weights)
    for t in names.tensors(c):
        if t.kind.storage is Storage.BLOCKS:
            out[t.name] = rng.normal(0, 60, t.shape).clip(-448, 448).astype(E4M3)
            blocks = [-(-n // 128) for n in t.shape]
            out[t.scale] = rng.uniform(1e-3, 3e-3, blocks).astype(F32)
    return out


def config(c: Config, **changes: Any) -> dict[str, Any]:
    """The config.json of a checkpoint, with some keys changed."""
    return released.to_json(c, "bfloat16", {"bos_token_id": 3, "eos_token_id": 5}) | changes


def write(
    directory: Path, weights: Mapping[str, np.ndarray], keys: Mapping[str, Any], shards: int = 1
) -> Path:
    """Writes a folder, with an index if there is more than one shard."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(keys))
    if shards == 1:
        save_file(dict(weights), directory / "model.safetensors")
        return directory
    index = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(weights.items())[i::shards])
        save_file(part, directory / file)
        index |= dict.fromkeys(part, file)
    text = json.dumps({"metadata": {"total_size": 0}, "weight_map": index})
    (directory / INDEX).write_text(text)
    return directory


def bytes_by_tensor(directory: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Type, shape and bytes of every tensor of a folder, by a few lines independent of our reader."""
    out = {}
    for file in sorted(directory.glob("*.safetensors")):
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8 : 8 + length]).items():
            if name != "__metadata__":
                start, end = (8 + length + offset for offset in entry["data_offsets"])
                assert name not in out
                out[name] = (entry["dtype"], tuple(entry["shape"]), data[start:end])
    return out
