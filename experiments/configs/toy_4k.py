"""`toy_1k` from 1024 to 4096 tokens, as `deepseek_v3_128k` goes on from 32,768 to 131,072.

python -m experiments.pretrain --config=toy_4k --config.start_from=runs/toy_1k
"""

from typing import Any

from ml_collections.config_dict import ConfigDict

from experiments.configs import toy_1k


def get_config() -> ConfigDict:
    """The first phase with sequences four times as long, and a quarter as many."""
    config: Any = toy_1k.get_config()
    config.data.shards = 1
    config.train.update(batch_size=1, sequence_length=4096)
    return config
