"""The pretraining of a toy whose context then grows as DeepSeek-V3's: 128 tokens, later 1024 and 4096.

    python -m tools.long_context

It has what DeepSeek-V3 has but multi-token prediction, and is half as wide and deep as `tiny`: three phases
take minutes on two CPU cores. Its text is the standard library with needles in it
(`dsv3_jax/data/needles.py`), which take a long context to be told.
"""

from typing import Any

from ml_collections.config_dict import ConfigDict

from experiments.configs import tiny


def get_config() -> ConfigDict:
    """`tiny`, narrower and shallower, on short sequences."""
    config: Any = tiny.get_config()
    config.model.update(vocab=512, d_model=64, layers=2, heads=4, mtp_depth=0, max_length=128)
    config.model.update(d_nope=16, d_rope=8, d_value=16, q_rank=32, kv_rank=32, d_dense=128)
    config.model.update(d_expert=32, experts=4, top_k=1, groups=2, top_groups=1)
    config.recipe.init_std = 0.1
    steps = 3000
    tokens = steps * 16 * 128
    config.recipe.update(learning_rate=6e-3, warmup_steps=50, cosine_to=6e-4, final_learning_rate=6e-4)
    config.recipe.update(constant_until=0.7 * tokens, cosine_until=tokens, second_constant_until=tokens)
    config.recipe.update(mtp_until=tokens, bias_until=0.95 * tokens)
    config.data.sources = ({"path": "stdlib+needles", "weight": 1.0, "text_key": "text"},)
    config.data.fill_in_middle_rate = 0.0  # it would move needles about
    # Every sequence of a batch is of another document: the weights would learn the letter of a single one.
    config.data.shards = 16
    config.train.update(steps=steps, batch_size=16, sequence_length=128, evaluate_every=1000)
    config.checkpoint.every = 500
    return config
