"""`tiny` in half batches: small enough to train several times over in half an hour on two CPU cores.

python -m tools.precision_study
"""

from typing import Any

from ml_collections.config_dict import ConfigDict

from experiments.configs import tiny


def get_config() -> ConfigDict:
    """160 steps of 2048 tokens, at a quarter of the learning rate of `tiny`.

    At that of `tiny` runs that differ by rounding alone soon part: what differs then is where they have come
    to, and not how well they learn.
    """
    config: Any = tiny.get_config()
    config.train.update(steps=160, batch_size=2, evaluate_every=0)
    tokens = 160 * 2 * 1024
    config.recipe.update(learning_rate=1e-3, cosine_to=5e-5, final_learning_rate=5e-5)
    config.recipe.update(constant_until=0.3 * tokens, cosine_until=tokens, second_constant_until=tokens)
    config.recipe.update(mtp_until=0.7 * tokens, bias_until=0.95 * tokens)
    config.precision = "bfloat16"
    return config
