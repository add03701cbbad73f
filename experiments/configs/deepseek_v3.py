"""DeepSeek-V3: 671B parameters, 37B active, with the report's recipe (arXiv:2412.19437, section 4.2).

    python -m experiments.pretrain --config=deepseek_v3 --config.mesh.pipeline=16 --config.mesh.expert=64 \
        --config.pipeline.microbatches=240 --config.pipeline.waiting=0 --config.recompute=experts \
        --config.dispatch.room=1.25 --config.data...

on 1024 chips of TPU v5p or, with `--config.precision=fp8`, 512 of tpu7x, best in a slice of 4x4x32, in which
64 devices have the fastest links; `python -m tools.plan` takes the same keys and says what that needs. The
report trained it on 2048 H800 for 2664K GPU-hours. Not run here: its step is compiled for absent chips.
"""

from ml_collections.config_dict import ConfigDict

from experiments.run import defaults


def get_config() -> ConfigDict:
    """Every default is DeepSeek-V3's."""
    config = defaults()
    config.data.shards = 256
    config.pipeline.schedule = "dualpipe"  # the fastest over 16 ranks, by tools.plan
    return config
