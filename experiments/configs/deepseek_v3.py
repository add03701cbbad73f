"""DeepSeek-V3: 671B parameters, 37B active, with the report's recipe (arXiv:2412.19437, section 4.2).

    python -m experiments.pretrain --config=deepseek_v3 --config.mesh.pipeline=16 --config.mesh.expert=64 \
        --config.pipeline.schedule=dualpipe --config.pipeline.microbatches=240 ...

The report trained it on 2048 H800 for 2664K GPU-hours. Not run here: its shapes are checked without memory.
"""

from ml_collections.config_dict import ConfigDict

from experiments.run import defaults


def get_config() -> ConfigDict:
    """Every default is DeepSeek-V3's."""
    config = defaults()
    config.data.shards = 256
    return config
