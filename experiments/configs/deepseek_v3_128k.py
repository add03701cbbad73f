r"""DeepSeek-V3 from 32K to 128K: the second phase of its extension (arXiv:2412.19437, section 4.3).

    python -m experiments.pretrain --config=deepseek_v3_128k --config.start_from=DIR \
        --config.mesh.pipeline=16 --config.mesh.expert=64 --config.mesh.context=64 \
        --config.pipeline.microbatches=240 --config.pipeline.waiting=0 --config.recompute=experts \
        --config.dispatch.room=1.25 --config.data...

DIR is the work directory of `deepseek_v3_32k`. 1000 steps of 480 sequences, which 64 devices share two at a
time. Not run here: its step is compiled for 1024 absent chips of TPU v5p, by `python -m tools.plan`.
"""

from typing import Any

from ml_collections.config_dict import ConfigDict

from experiments.configs import deepseek_v3_32k


def get_config() -> ConfigDict:
    """The first phase with sequences four times as long, and a quarter as many."""
    config: Any = deepseek_v3_32k.get_config()
    config.train.update(batch_size=480, sequence_length=131_072)
    config.data.shards = 32
    return config
