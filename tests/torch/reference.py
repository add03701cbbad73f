"""Tiny models of transformers, the independent definition of what released weights mean."""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SEQUENCES, LENGTH = 3, 40


@dataclass(frozen=True)
class Case:
    """A configuration by what differs from the common tiny one, in released keys."""

    name: str
    keys: dict[str, Any]


_YARN = {
    "type": "yarn",
    "factor": 4.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 16,
}

CASES = (
    Case("plain", {}),
    Case("direct_query", {"q_lora_rank": None, "rms_norm_eps": 1e-5, "first_k_dense_replace": 0}),
    Case(
        "one_group",
        {
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 2,
            "routed_scaling_factor": 2.446,
            "rope_theta": 5e4,
        },
    ),
    Case("yarn_beyond", {"rope_scaling": _YARN, "first_k_dense_replace": 2, "rms_norm_eps": 1e-3}),
    Case(
        "yarn_below",
        {"rope_scaling": {**_YARN, "original_max_position_embeddings": 64}, "max_position_embeddings": 256},
    ),
    Case(
        "yarn_kimi",
        {
            "rope_scaling": {**_YARN, "beta_fast": 1, "factor": 8.0, "mscale": 0.707},
            "n_group": 1,
            "topk_group": 1,
            "n_routed_experts": 12,
        },
    ),
)

_TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "n_routed_experts": 16,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "kv_lora_rank": 12,
    "q_lora_rank": 20,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
    "max_position_embeddings": 64,
    "rope_theta": 1e4,
    "num_nextn_predict_layers": 1,
}


def tokens(seed: int = 0) -> np.ndarray:
    """Random ids, [SEQUENCES, LENGTH]."""
    return np.random.default_rng(seed).integers(0, _TINY["vocab_size"], (SEQUENCES, LENGTH))


def build(case: Case) -> Any:
    """A model in FP32 whose weights are large enough that logits differ, gains and expert biases included."""
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(sum(case.name.encode()))
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**{**_TINY, **case.keys})).eval()
    with torch.no_grad():
        for name, weight in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("e_score_correction_bias"):
                weight.normal_(0.0, 0.3)
            elif weight.ndim == 1 and "norm" in name:
                weight.normal_(1.0, 0.2)
            elif weight.ndim > 1:
                weight.normal_(0.0, weight.shape[-1] ** -0.5)
    return model


def log_probabilities(model: Any, ids: np.ndarray) -> np.ndarray:
    """log p of tokens 2..n, [SEQUENCES, LENGTH - 1]."""
    import torch

    with torch.no_grad():
        logits = model(torch.from_numpy(ids)).logits.float()
    chosen = torch.log_softmax(logits[:, :-1], -1).gather(-1, torch.from_numpy(ids)[:, 1:, None])
    return chosen[..., 0].numpy()


def load(directory: Path, model_class: Any = None, **options: Any) -> Any:
    """A model as transformers loads it from a folder, with all that it has to report about the loading."""
    import torch
    from transformers import DeepseekV3ForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, info = DeepseekV3ForCausalLM.from_pretrained(
            directory, dtype=torch.float32, output_loading_info=True, **options
        )
    return model.eval(), info


def released_form(directory: Path) -> None:
    """Rewrites the config.json of transformers 5 as released: rope_scaling and rope_theta on their own."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {**rope, "type": kind}
    path.write_text(json.dumps(config))
