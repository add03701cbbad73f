"""`tiny` in half batches: small enough to train several times over in half an hour on two CPU cores.

python -m tools.precision_study
"""

from typing import Any

from ml_collections.config_dict import ConfigDict

from experiments.configs import tiny


def get_config() -> ConfigDict:
    """200 steps of 2048 tokens, on the schedule of `tiny`."""
    config: Any = tiny.get_config()
    config.train.update(steps=200, batch_size=2, evaluate_every=0)
    tokens = 200 * 2 * 1024
    config.recipe.update(constant_until=0.3 * tokens, cosine_until=tokens, second_constant_until=tokens)
    config.recipe.update(mtp_until=0.7 * tokens, bias_until=0.95 * tokens)
    config.precision = "bfloat16"
    return config
