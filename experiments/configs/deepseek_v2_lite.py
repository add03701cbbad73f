"""The 15.7B model of the report's small ablations: DeepSeek-V2-Lite's sizes, DeepSeek-V3's routing.

    python -m experiments.pretrain --config=deepseek_v2_lite --config.mesh.data=8 --config.mesh.expert=8

The ablations of arXiv:2412.19437 (tables 4 and 5) trained such a model, 2.4B active, on 1.33T tokens;
learning rate and batch are those of arXiv:2405.04434, appendix B. Not run here: its shapes are checked
without memory.
"""

from ml_collections.config_dict import ConfigDict

from experiments.run import defaults


def get_config() -> ConfigDict:
    """DeepSeek-V3 with V2-Lite's sizes."""
    config = defaults()
    config.model.update(vocab=102_400, d_model=2048, layers=27, dense_layers=1, mtp_depth=0, heads=16)
    config.model.update(d_dense=10_944, d_expert=1408, experts=64, shared_experts=2, top_k=6, q_rank=None)
    config.model.update(groups=1, top_groups=1, route_scale=1.0)
    config.recipe.update(learning_rate=4.2e-4, cosine_to=4.2e-5, final_learning_rate=1.4e-5)
    config.recipe.update(constant_until=0.9e12, cosine_until=1.29e12, second_constant_until=1.31e12)
    config.recipe.update(mtp_until=0.9e12, bias_until=1.29e12, batch_ramp_tokens=0.0)
    config.train.update(steps=70_500, batch_size=4608)
    config.data.shards = 64
    return config
