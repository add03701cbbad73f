"""Kimi-K2: 1T parameters, 33B active, on DeepSeek-V3's architecture with more experts and fewer heads.

Sizes of the released checkpoint; the recipe is DeepSeek-V3's. Not run here: its shapes are checked without
memory.
"""

from typing import Any

from ml_collections.config_dict import ConfigDict

from experiments.configs import deepseek_v3


def get_config() -> ConfigDict:
    """DeepSeek-V3 with Kimi-K2's sizes."""
    config: Any = deepseek_v3.get_config()
    config.model.update(vocab=163_840, heads=64, dense_layers=1, experts=384, groups=1, top_groups=1)
    config.model.update(route_scale=2.827, rope_theta=50_000.0, mtp_depth=0)
    return config
