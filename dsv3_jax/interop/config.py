"""Between our Config and the config.json of released checkpoints, with rope_scaling or rope_parameters.

What our model does not compute is refused by name, so that no checkpoint is read as something it is not.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dsv3_jax.config import Config, Yarn

# Our field and the released key, for sizes that every config.json must give.
_INTEGERS = (
    ("vocab", "vocab_size"),
    ("d_model", "hidden_size"),
    ("layers", "num_hidden_layers"),
    ("dense_layers", "first_k_dense_replace"),
    ("heads", "num_attention_heads"),
    ("d_nope", "qk_nope_head_dim"),
    ("d_rope", "qk_rope_head_dim"),
    ("d_value", "v_head_dim"),
    ("kv_rank", "kv_lora_rank"),
    ("d_dense", "intermediate_size"),
    ("d_expert", "moe_intermediate_size"),
    ("experts", "n_routed_experts"),
    ("top_k", "num_experts_per_tok"),
    ("groups", "n_group"),
    ("top_groups", "topk_group"),
    ("max_length", "max_position_embeddings"),
)
_NUMBERS = (("route_scale", "routed_scaling_factor"), ("norm_eps", "rms_norm_eps"))

# Keys that would change what is computed, and the only value that we compute; absent means that value too.
_FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "moe_layer_freq": 1,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "rope_interleave": True,
}
_MODEL_TYPES = ("deepseek_v3", "kimi_k2")
_LATENT_EPS = 1e-6  # of the norms of both latents, whatever rms_norm_eps says
_YARN = {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"}
_ROPE_NEUTRAL: dict[str, Any] = {"attention_factor": None, "truncate": True, "partial_rotary_factor": 1.0}


class BadConfig(ValueError):
    """A config.json that cannot be converted; the message names the file and the key."""


class Released(NamedTuple):
    """What a config.json says."""

    config: Config
    block: tuple[int, int] | None  # of FP8 weights, or None where weights are not FP8
    token_ids: dict[str, Any]  # bos_token_id and eos_token_id, as they are


def read(path: Path) -> Released:
    """Reads a config.json of model_type deepseek_v3 or kimi_k2.

    Raises:
        BadConfig: naming the first key that is missing, mistyped, or asks for what is not computed here.
    """
    keys = _Keys(path, _load(path))
    keys.check_one_of("model_type", _MODEL_TYPES)
    for key, value in _FIXED.items():
        keys.check_fixed(key, value)
    heads = keys.integer("num_attention_heads")
    keys.check_fixed("num_key_value_heads", heads)
    theta, yarn = _rope(keys)
    try:
        sizes: dict[str, Any] = {ours: keys.integer(key) for ours, key in _INTEGERS}
        sizes |= {ours: keys.number(key) for ours, key in _NUMBERS}
        config = Config(
            **sizes,
            q_rank=None if keys.values.get("q_lora_rank") is None else keys.integer("q_lora_rank"),
            shared_experts=keys.integer("n_shared_experts", 0),
            mtp_depth=keys.integer("num_nextn_predict_layers", keys.integer("num_mtp_layers", 0)),
            latent_norm_eps=_LATENT_EPS,
            rope_theta=theta,
            yarn=yarn,
        )
    except BadConfig:
        raise
    except ValueError as error:
        raise BadConfig(f"{path} describes a model that cannot be: {error}") from error
    ids = {k: keys.values[k] for k in ("bos_token_id", "eos_token_id") if keys.values.get(k) is not None}
    return Released(config, _fp8_block(keys), ids)


def to_json(c: Config, dtype: str, token_ids: Mapping[str, Any]) -> dict[str, Any]:
    """The released form of a configuration, which every version of transformers reads.

    Args:
        dtype: of the weights that are not FP8, by its name in PyTorch.

    Raises:
        ValueError: if the released form cannot say what the configuration says.
    """
    if c.latent_norm_eps != _LATENT_EPS:
        raise ValueError(
            f"config.model.latent_norm_eps={c.latent_norm_eps} cannot be exported: the released form "
            "has no key for it and "
            f"readers use {_LATENT_EPS}."
        )
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "attention_dropout": 0.0,
        **{key: getattr(c, ours) for ours, key in (*_INTEGERS, *_NUMBERS)},
        **_FIXED,
        **token_ids,
        "ep_size": 1,
        "initializer_range": 0.02,
        "model_type": _MODEL_TYPES[0],
        "n_shared_experts": c.shared_experts,
        "num_key_value_heads": c.heads,
        "num_nextn_predict_layers": c.mtp_depth,
        "pretraining_tp": 1,
        "q_lora_rank": c.q_rank,
        "rope_scaling": None if c.yarn is None else _yarn_json(c.yarn),
        "rope_theta": c.rope_theta,
        "torch_dtype": dtype,
        "use_cache": True,
    }


def quantization_json(block: int) -> dict[str, Any]:
    """The quantization_config of FP8 weights with one scale per block."""
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [block, block],
    }


def from_record(record: Mapping[str, Any]) -> Config:
    """The configuration that a checkpoint of ours was recorded with (`dataclasses.asdict`, through JSON).

    Raises:
        ValueError: if the record lacks a field or has one too many.
    """
    yarn = record.get("yarn")
    fields = {f.name for f in dataclasses.fields(Config)}
    if set(record) - fields:
        raise ValueError(
            f"The checkpoint's model has {', '.join(sorted(set(record) - fields))}, unknown to this version: "
            "read it with the version that wrote it."
        )
    return Config(**{**record, "yarn": None if yarn is None else Yarn(**yarn)})


class _Keys:
    """The values of a config.json with the checks that each use of them needs."""

    def __init__(self, path: Path, values: Mapping[str, Any]):
        self.path, self.values = path, values

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._present(key, default)
        if type(value) is not int or value < 0:
            raise BadConfig(f"{self.path}: {key} is {value!r}, but must be an integer of 0 or more.")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._present(key, default)
        if type(value) not in (int, float) or not math.isfinite(value):
            raise BadConfig(f"{self.path}: {key} is {value!r}, but must be a finite number.")
        return value

    def check_fixed(self, key: str, only: Any) -> None:
        value = self.values.get(key)
        if value is not None and value != only:
            raise BadConfig(f"{self.path}: {key} is {value!r}, but only {only!r} can be converted.")

    def check_one_of(self, key: str, allowed: tuple[str, ...]) -> None:
        if self.values.get(key) not in allowed:
            raise BadConfig(
                f"{self.path}: {key} is {self.values.get(key)!r}, but only {' and '.join(allowed)} "
                "can be converted."
            )

    def _present(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        value = default if value is None else value
        if value is None:
            raise BadConfig(f"{self.path}: {key} is missing, and has no default that all checkpoints share.")
        return value


def _load(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise BadConfig(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise BadConfig(f"{path} is not JSON ({error}).") from error
    if not isinstance(values, dict):
        raise BadConfig(f"{path} holds a JSON {type(values).__name__}, not an object.")
    return values


def _rope(keys: _Keys) -> tuple[float, Yarn | None]:
    """Base and stretching of the rotary frequencies, from whichever form the file has."""
    old, new = keys.values.get("rope_scaling"), keys.values.get("rope_parameters")
    if not all(isinstance(form, dict | None) for form in (old, new)):
        raise BadConfig(f"{keys.path}: rope_scaling or rope_parameters is neither an object nor null.")
    merged = {**(new or {}), **(old or {})}
    inner = _Keys(keys.path, merged)
    theta = inner.number("rope_theta", keys.number("rope_theta", 10_000.0))
    kind = merged.get("rope_type", merged.get("type", "default"))
    for key, neutral in _ROPE_NEUTRAL.items():
        inner.check_fixed(key, neutral)
    if kind == "default":
        return theta, None
    if kind != "yarn":
        raise BadConfig(
            f"{keys.path}: the rope type is {kind!r}, but only 'default' and 'yarn' can be converted."
        )
    unknown = set(merged) - _YARN - set(_ROPE_NEUTRAL) - {"rope_type", "type", "rope_theta"}
    if unknown:
        raise BadConfig(
            f"{keys.path}: YaRN is given {', '.join(sorted(unknown))}, which cannot be converted."
        )
    yarn: dict[str, Any] = {
        "factor": inner.number("factor"),
        "original_length": inner.integer(
            "original_max_position_embeddings", keys.integer("max_position_embeddings")
        ),
        "beta_fast": inner.number("beta_fast", 32.0),
        "beta_slow": inner.number("beta_slow", 1.0),
        "mscale": inner.number("mscale", 0.0),
        "mscale_all_dim": inner.number("mscale_all_dim", 0.0),
    }
    try:
        return theta, Yarn(**yarn)
    except ValueError as error:
        raise BadConfig(f"{keys.path} describes a YaRN that cannot be: {error}") from error


def _yarn_json(y: Yarn) -> dict[str, Any]:
    mscales = {"mscale": y.mscale, "mscale_all_dim": y.mscale_all_dim}
    return {
        "beta_fast": y.beta_fast,
        "beta_slow": y.beta_slow,
        "factor": y.factor,
        **{key: value for key, value in mscales.items() if value},  # zero stands for an absent key
        "original_max_position_embeddings": y.original_length,
        "type": "yarn",
    }


def _fp8_block(keys: _Keys) -> tuple[int, int] | None:
    quantization = keys.values.get("quantization_config")
    if quantization is None:
        return None
    match quantization:
        case {"quant_method": "fp8", "weight_block_size": [int(rows), int(columns)]} if rows > 0 < columns:
            pass
        case _:
            raise BadConfig(
                f"{keys.path}: quantization_config is {quantization!r}, but only quant_method 'fp8' "
                "with a weight_block_size "
                "of two positive integers can be converted."
            )
    if quantization.get("fmt", "e4m3") != "e4m3":
        raise BadConfig(
            f"{keys.path}: FP8 weights of fmt {quantization['fmt']!r} cannot be converted, only 'e4m3'."
        )
    return rows, columns
