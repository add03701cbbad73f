"""The sizes of public models are those that transformers computes without memory."""

import json

import pytest

from dsv3_jax.config import Config
from dsv3_jax.interop import config as released
from dsv3_jax.model import size

MOONLIGHT = Config(
    vocab=163840,
    d_model=2048,
    layers=27,
    dense_layers=1,
    mtp_depth=0,
    heads=16,
    q_rank=None,
    d_dense=11264,
    d_expert=1408,
    experts=64,
    shared_experts=2,
    top_k=6,
    groups=1,
    top_groups=1,
    route_scale=2.446,
    norm_eps=1e-5,
    rope_theta=50000.0,
    max_length=8192,
)


@pytest.mark.parametrize("c", [Config(), MOONLIGHT], ids=["deepseek_v3", "moonlight_16b"])
def test_parameters_are_as_many_as_transformers_allocates(c, tmp_path):
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    (tmp_path / "config.json").write_text(json.dumps(released.to_json(c, "bfloat16", {})))
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(DeepseekV3Config.from_pretrained(tmp_path))
    biases = [b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")]
    assert size.parameters(c) == sum(w.numel() for w in (*model.parameters(), *biases))
