"""`toy_128` from 128 to 1024 tokens, as `deepseek_v3_32k` goes on from 4096 to 32,768.

python -m experiments.pretrain --config=toy_1k --config.start_from=runs/toy_128
"""

from typing import Any

from ml_collections.config_dict import ConfigDict

from dsv3_jax.config import Yarn
from experiments.configs import toy_128
from experiments.configs.deepseek_v3_32k import extended


def get_config() -> ConfigDict:
    """YaRN with the report's factor of 40, and twice as many tokens a step as before."""
    config: Any = extended(toy_128.get_config(), Yarn(original_length=128))
    config.data.shards = 4
    config.train.update(steps=250, batch_size=4, sequence_length=1024)
    return config
