"""The training steps that `tools.bench_train` times: ours, and transformers' in PyTorch."""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from dsv3_jax.data.packing import Rows
from dsv3_jax.training import step
from dsv3_jax.training.step import State
from experiments import batches
from experiments.run import Run, make_mesh


class Program(NamedTuple):
    """A training step at work: forward, backward, clipping and AdamW."""

    once: Callable[[], None]  # returns when the device is done
    device: str  # the name that its maker gives it
    peak_bytes: Callable[[], int | None]  # that were allocated at once so far; None where nobody counts
    text: str  # of the program that XLA made; empty where another did


def ours(run: Run) -> Program:
    """The step of a run on tokens that are always the same; sets the mesh of this process."""
    jax.set_mesh(make_mesh(run))
    setup, tokens, device = run.setup, _tokens(run), jax.devices()[0]
    batch = batches.training_batch(Rows(tokens, np.ones_like(tokens)), run.pipeline.microbatches)
    state = jax.jit(lambda key: State.init(key, setup))(jax.random.key(0))
    compiled = step.step.lower(state, batch, setup=setup).compile()

    def once():
        nonlocal state
        state, metrics = compiled(state, batch)
        jax.block_until_ready((state, metrics))

    def peak_bytes() -> int | None:
        return (device.memory_stats() or {}).get("peak_bytes_in_use")

    return Program(once, device.device_kind, peak_bytes, compiled.as_text() or "")


def transformers(run: Run) -> Program:
    """DeepseekV3ForCausalLM, which trains no multi-token prediction, as it comes."""
    return _transformers(run, lambda model: model)


def transformers_compiled(run: Run) -> Program:
    """The same through torch.compile."""
    import torch

    return _transformers(run, torch.compile)


RIVALS = {"transformers": transformers, "transformers_compiled": transformers_compiled}


def _transformers(run: Run, compiled: Callable[[Any], Any]) -> Program:
    """In BF16 with FP32 master weights, as Megatron and DeepSpeed keep them, or in FP32 where the run is.

    Autocast, the other usual way, leaves transformers' grouped products in the type of the weights.
    """
    import torch
    from transformers import DeepseekV3ForCausalLM

    torch.set_num_threads(os.cpu_count() or 1)
    device, narrow = "cuda" if torch.cuda.is_available() else "cpu", run.precision != "float32"
    with torch.device(device):
        model = DeepseekV3ForCausalLM(_sizes(run)).float().train()
    masters = weights = list(model.parameters())
    if narrow:
        masters = [w.detach().clone().requires_grad_() for w in weights]
        model = model.bfloat16()
    r, forward = run.recipe, compiled(model)
    optimizer = torch.optim.AdamW(
        masters, r.learning_rate, (r.beta1, r.beta2), r.epsilon, r.weight_decay, fused=True
    )
    tokens = torch.from_numpy(_tokens(run)).long().to(device)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]

    def once():
        logits = forward(input_ids=inputs, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten()).backward()
        del logits
        if narrow:
            for master, weight in zip(masters, weights, strict=True):
                if weight.grad is not None:
                    master.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, r.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        if narrow:
            with torch.no_grad():
                for weight, master in zip(weights, masters, strict=True):
                    weight.copy_(master)
        if device == "cuda":
            torch.cuda.synchronize()

    def peak_bytes() -> int | None:
        return torch.cuda.max_memory_allocated() if device == "cuda" else None

    return Program(once, torch.cuda.get_device_name() if device == "cuda" else "cpu", peak_bytes, "")


def _sizes(run: Run):
    from transformers import DeepseekV3Config

    c = run.model
    return DeepseekV3Config(
        vocab_size=c.vocab,
        hidden_size=c.d_model,
        intermediate_size=c.d_dense,
        moe_intermediate_size=c.d_expert,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        num_key_value_heads=c.heads,
        n_shared_experts=c.shared_experts,
        n_routed_experts=c.experts,
        routed_scaling_factor=c.route_scale,
        kv_lora_rank=c.kv_rank,
        q_lora_rank=c.q_rank,
        qk_rope_head_dim=c.d_rope,
        v_head_dim=c.d_value,
        qk_nope_head_dim=c.d_nope,
        n_group=c.groups,
        topk_group=c.top_groups,
        num_experts_per_tok=c.top_k,
        first_k_dense_replace=c.dense_layers,
        max_position_embeddings=c.max_length,
        num_mtp_layers=0,
    )


def _tokens(run: Run) -> np.ndarray:
    shape = run.train.batch_size, run.train.sequence_length + 1
    return np.random.default_rng(0).integers(0, run.model.vocab, shape, dtype=np.int32)
