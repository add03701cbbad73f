"""Moonlight-16B-A3B: 16B parameters, 3B active, on DeepSeek-V3's architecture without a query latent.

    python -m experiments.pretrain --config=moonlight_16b --config.mesh.data=8 --config.mesh.expert=8

Sizes of the released checkpoint; the schedule's lengths are scaled from the report to its 5.7T tokens.
Not run here: its shapes are checked without memory.
"""

from ml_collections.config_dict import ConfigDict

from experiments.run import defaults


def get_config() -> ConfigDict:
    """DeepSeek-V3 with Moonlight's sizes."""
    config = defaults()
    config.model.update(vocab=163_840, d_model=2048, layers=27, dense_layers=1, mtp_depth=0, heads=16)
    config.model.update(d_dense=11_264, d_expert=1408, experts=64, shared_experts=2, top_k=6)
    config.model.update(groups=1, top_groups=1, route_scale=2.446, rope_theta=50_000.0, norm_eps=1e-5)
    config.model.update(q_rank=None, max_length=8192)
    config.recipe.update(learning_rate=4.2e-4, cosine_to=4.2e-5, final_learning_rate=1.4e-5)
    config.recipe.update(constant_until=3.8e12, cosine_until=5.5e12, second_constant_until=5.63e12)
    config.recipe.update(mtp_until=3.8e12, bias_until=5.5e12, batch_ramp_tokens=0.0)
    config.train.update(steps=340_000, batch_size=4096)
    config.data.shards = 64
    return config
