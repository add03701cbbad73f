"""About 100M parameters: for one accelerator, or for patience.

    python -m experiments.pretrain --config=small

Not run to its end here; the tests train its smaller sibling, `tiny`.
"""

from typing import Any

from ml_collections.config_dict import ConfigDict

from experiments.configs import tiny


def get_config() -> ConfigDict:
    """`tiny`, wider and deeper, in BF16."""
    config: Any = tiny.get_config()
    config.model.update(vocab=16_384, d_model=512, layers=8, heads=8, d_nope=64, d_rope=32, d_value=64)
    config.model.update(q_rank=256, kv_rank=128, d_dense=1536, d_expert=192, experts=32)
    config.recipe.init_std = 0.0225  # 0.006 * sqrt(7168 / 512)
    config.recipe.update(learning_rate=1e-3, warmup_steps=500, constant_until=1.2e9, cosine_until=2.0e9)
    config.recipe.update(cosine_to=1e-4, second_constant_until=2.0e9, final_learning_rate=1e-4)
    config.recipe.update(mtp_until=1.2e9, bias_until=2.0e9, bias_speed=1e-3)
    config.train.update(steps=30_000, batch_size=64, evaluate_every=1000)
    config.train.evaluation_sequences = 128
    config.checkpoint.every = 1000
    config.precision, config.recompute = "bfloat16", "norms_and_up_projections"
    return config
