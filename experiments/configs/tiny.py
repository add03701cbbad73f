"""Everything DeepSeek-V3 has, at a size that learns on two CPU cores in five minutes.

    python -m experiments.pretrain

Trains on the Python standard library's own text and ends below a bigram model of the same tokens.
"""

from ml_collections.config_dict import ConfigDict

from experiments.run import defaults


def get_config() -> ConfigDict:
    """DeepSeek-V3 with every width, count and length scaled down."""
    config = defaults()
    config.model.update(vocab=2048, d_model=128, layers=4, dense_layers=1, heads=8, max_length=1024)
    config.model.update(d_nope=16, d_rope=8, d_value=16, q_rank=64, kv_rank=32, d_dense=384)
    config.model.update(d_expert=96, experts=16, top_k=4, groups=4, top_groups=2)
    # The report's deviation at its width: products of narrower matrices shrink without this, and learn late.
    config.recipe.init_std = 0.045  # 0.006 * sqrt(7168 / 128)
    tokens = 210 * 4 * 1024
    config.recipe.update(learning_rate=4e-3, warmup_steps=20, batch_ramp_tokens=0.0)
    config.recipe.update(constant_until=0.3 * tokens, cosine_until=tokens, cosine_to=2e-4)
    config.recipe.update(second_constant_until=tokens, final_learning_rate=2e-4)
    # A run of 210 steps has to find its balance faster than one of 210,000.
    config.recipe.update(mtp_until=0.7 * tokens, bias_until=0.95 * tokens, bias_speed=5e-3)
    config.train.update(steps=210, batch_size=4, sequence_length=1024)
    config.train.update(evaluate_every=70, evaluation_sequences=32)
    config.checkpoint.update(every=70, keep=2)
    config.precision, config.recompute, config.moments = "float32", "nothing", "float32"
    return config
