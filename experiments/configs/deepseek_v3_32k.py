r"""DeepSeek-V3 from 4K to 32K: the first phase of its extension (arXiv:2412.19437, section 4.3).

    python -m experiments.pretrain --config=deepseek_v3_32k --config.start_from=DIR --config.mesh... \
        --config.data...

DIR is the work directory of `deepseek_v3`, or its converted weights. 1000 steps of 1920 sequences, 62.9M
tokens each as in pretraining; this and the next phase, `deepseek_v3_128k`, took 119K GPU-hours on H800. Not
run here.
"""

from typing import Any

from ml_collections.config_dict import ConfigDict

from dsv3_jax.config import Yarn
from experiments.configs import deepseek_v3
from experiments.records import section


def get_config() -> ConfigDict:
    """DeepSeek-V3 with YaRN, at 32,768 tokens."""
    config: Any = extended(deepseek_v3.get_config(), Yarn())
    config.train.update(steps=1000, batch_size=1920, sequence_length=32_768)
    config.data.shards = 64
    return config


def extended(config: Any, yarn: Yarn) -> Any:
    """A config of pretraining, changed to go on at its final learning rate with stretched positions.

    Not published are lambda, gamma and what became of the optimiser's moments. Here lambda and gamma stay
    what they were at the end of pretraining (0.1 and 0), and moments begin anew, as released weights come
    without them.
    """
    config.model.yarn, config.model.max_length = section(yarn), int(yarn.factor * yarn.original_length)
    over = dict.fromkeys(("constant_until", "cosine_until", "second_constant_until"), 0.0)
    config.recipe.update(over, warmup_steps=0, batch_ramp_tokens=0.0, mtp_until=0.0, bias_until=0.0)
    return config
