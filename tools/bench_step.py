"""`python -m tools.bench_step [--config=NAME] [--steps=N]`: the training step beside transformers' on the
same machine.

Both run forward, backward, clipping and AdamW in FP32 on the same shapes and threads, one after the other in
turns, so that whatever else the machine does meets both. transformers (DeepseekV3ForCausalLM, PyTorch) trains
no multi-token prediction, so ours is timed with and without it. The ratio compares the medians.
"""

import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np
from absl import flags
from ml_collections.config_dict import ConfigDict

from dsv3_jax.data.packing import Rows
from dsv3_jax.training import step
from dsv3_jax.training.step import State
from experiments import batches, settings
from experiments.run import Run, make_mesh, resolve

_STEPS = flags.DEFINE_integer("steps", 15, "Timed steps of each.", lower_bound=1)
_WARM = 4  # steps before the clock starts: compilation, and allocators that learn


def main(name: str, config: ConfigDict) -> None:
    """Prints seconds a step and ratios, and a JSON line."""
    run = resolve(config)
    without = dataclasses.replace(run, model=dataclasses.replace(run.model, mtp_depth=0))
    with jax.set_mesh(make_mesh(run)):
        programs = {
            "ours": _ours(run),
            "ours without MTP": _ours(without),
            "transformers (no MTP)": _transformers(run),
        }
        seconds: dict[str, list[float]] = {program: [] for program in programs}
        for turn in range(_WARM + _STEPS.value):
            for program, once in programs.items():
                start = time.perf_counter()
                once()
                if turn >= _WARM:
                    seconds[program].append(time.perf_counter() - start)
    medians = {program: statistics.median(times) for program, times in seconds.items()}
    rival = medians["transformers (no MTP)"]
    tokens = run.train.batch_size * run.train.sequence_length
    for program, median in medians.items():
        spread = f"{min(seconds[program]):.3f} to {max(seconds[program]):.3f}"
        print(
            f"{program:22s} {median:7.3f} s a step ({spread}), {1 / median:6.3f} steps/s, "
            f"{tokens / median:8.0f} tokens/s, {rival / median:5.2f} times transformers"
        )
    print(json.dumps({"config": name, "cores": os.cpu_count(), "seconds": medians}))


def _rows(run: Run) -> np.ndarray:
    shape = run.train.batch_size, run.train.sequence_length + 1
    return np.random.default_rng(0).integers(0, run.model.vocab, shape, dtype=np.int32)


def _ours(run: Run) -> Callable[[], None]:
    setup, tokens = run.setup, _rows(run)
    batch = batches.training_batch(Rows(tokens, np.ones_like(tokens)), run.pipeline.microbatches)
    state = jax.jit(lambda key: State.init(key, setup))(jax.random.key(0))

    def once():
        nonlocal state
        state, metrics = step.step(state, batch, setup=setup)
        jax.block_until_ready((state, metrics))

    return once


def _transformers(run: Run) -> Callable[[], None]:
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.set_num_threads(os.cpu_count() or 1)
    c, r = run.model, run.recipe
    sizes = DeepseekV3Config(
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
    model = DeepseekV3ForCausalLM(sizes).float().train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=r.learning_rate, betas=(r.beta1, r.beta2), weight_decay=r.weight_decay
    )
    tokens = torch.from_numpy(_rows(run).astype(np.int64))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]

    def once():
        optimizer.zero_grad()
        logits = model(input_ids=inputs, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), r.clip_norm)
        optimizer.step()

    return once


if __name__ == "__main__":
    settings.run(main)
