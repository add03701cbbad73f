"""config.json: both forms are read, what is not computed here is refused, export keeps everything."""

import json
from dataclasses import asdict, replace

import pytest

from dsv3_jax.config import Config, Yarn
from dsv3_jax.interop import config as released
from dsv3_jax.interop.config import BadConfig
from tests.interop.released import DIRECT, TINY

V3 = {  # deepseek-ai/DeepSeek-V3, without the keys that say nothing about the architecture
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}

ODD = replace(TINY, yarn=Yarn(mscale=0.7), shared_experts=0)


@pytest.fixture
def read(tmp_path):
    def read(keys):
        path = tmp_path / "config.json"
        path.write_text(keys if isinstance(keys, str) else json.dumps(keys))
        return released.read(path)

    return read


def test_the_released_configuration_is_that_of_the_defaults(read):
    found = read(V3)
    assert found.config == Config(yarn=Yarn(), max_length=163840)
    assert found.block == (128, 128)
    assert found.token_ids == {"bos_token_id": 0, "eos_token_id": 1}


def test_the_newer_rotary_form_says_the_same(read):
    rope = {**V3["rope_scaling"], "rope_type": "yarn", "rope_theta": 10000.0}
    newer = {k: v for k, v in V3.items() if k not in ("rope_scaling", "rope_theta")}
    assert read(newer | {"rope_parameters": rope}) == read(V3)


def test_kimi_k2_is_read_with_its_equal_betas(read):
    rope = {**V3["rope_scaling"], "beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0}
    keys = {**V3, "model_type": "kimi_k2", "rope_scaling": rope, "n_group": 1, "topk_group": 1}
    c = read(keys | {"num_nextn_predict_layers": 0}).config
    assert (c.yarn, c.groups, c.mtp_depth) == (Yarn(factor=32.0, beta_fast=1.0), 1, 0)


def test_absent_mscales_stay_absent(read):
    c = read(V3 | {"rope_scaling": {"type": "yarn", "factor": 4.0}}).config
    assert c.yarn == Yarn(factor=4.0, original_length=163840, mscale=0.0, mscale_all_dim=0.0)
    again = released.to_json(c, "bfloat16", {})["rope_scaling"]
    assert "mscale" not in again and "mscale_all_dim" not in again


@pytest.mark.parametrize("c", [TINY, DIRECT, Config(), ODD])
def test_what_is_exported_is_read_back(read, c):
    assert read(released.to_json(c, "bfloat16", {})).config == c


@pytest.mark.parametrize("c", [TINY, ODD])
def test_a_recorded_configuration_comes_back(c):
    assert released.from_record(json.loads(json.dumps(asdict(c)))) == c


def test_a_record_of_a_later_version_is_refused_by_key():
    with pytest.raises(ValueError, match="unheard_of"):
        released.from_record({"unheard_of": 1})


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("scoring_func", "softmax", "scoring_func"),
        ("topk_method", "greedy", "topk_method"),
        ("hidden_act", "gelu", "hidden_act"),
        ("attention_bias", True, "attention_bias"),
        ("tie_word_embeddings", True, "tie_word_embeddings"),
        ("norm_topk_prob", False, "norm_topk_prob"),
        ("moe_layer_freq", 2, "moe_layer_freq"),
        ("rope_interleave", False, "rope_interleave"),
        ("num_key_value_heads", 8, "num_key_value_heads"),
        ("model_type", "deepseek_v2", "model_type"),
        ("model_type", None, "model_type"),
        ("rope_scaling", {"type": "linear", "factor": 2.0}, "'linear'"),
        ("rope_scaling", {"type": "yarn", "factor": 2.0, "attention_factor": 1.5}, "attention_factor"),
        ("rope_scaling", {"type": "yarn", "factor": 2.0, "surprise": 1}, "surprise"),
        ("rope_scaling", {"type": "yarn"}, "factor"),
        ("rope_scaling", {"type": "yarn", "factor": -1.0}, "factor"),
        ("rope_scaling", [1], "rope_scaling"),
        ("quantization_config", {"quant_method": "compressed-tensors"}, "quantization_config"),
        (
            "quantization_config",
            {"quant_method": "fp8", "weight_block_size": [0, 128]},
            "quantization_config",
        ),
        ("quantization_config", {"quant_method": "fp8"}, "quantization_config"),
        (
            "quantization_config",
            {"quant_method": "fp8", "fmt": "e5m2", "weight_block_size": [128, 128]},
            "'e5m2'",
        ),
        ("hidden_size", "7168", "hidden_size"),
        ("hidden_size", True, "hidden_size"),
        ("hidden_size", None, "hidden_size"),
        ("vocab_size", -1, "vocab_size"),
        ("rms_norm_eps", float("nan"), "rms_norm_eps"),
        ("n_group", None, "n_group"),
        ("n_group", 7, "groups"),
        ("topk_group", 9, "top_groups"),
    ],
)
def test_what_is_not_computed_here_is_refused_naming_the_file(read, key, value, named):
    with pytest.raises(BadConfig, match=rf"config\.json.*{named}"):
        read(V3 | {key: value})


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "\ud800"])
def test_what_is_no_json_object_is_refused_naming_the_file(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(BadConfig, match=r"config\.json"):
        released.read(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(BadConfig, match=r"config\.json cannot be read"):
        released.read(tmp_path / "config.json")


def test_an_epsilon_that_the_released_form_cannot_say_is_not_exported():
    with pytest.raises(ValueError, match="latent_norm_eps=0.001"):
        released.to_json(replace(TINY, latent_norm_eps=1e-3), "bfloat16", {})
