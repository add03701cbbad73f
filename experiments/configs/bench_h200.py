"""Three layers of DeepSeek-V3 with 16 of its 256 experts: a training step that fills one H200.

    python -m tools.bench_train --config=bench_h200

For its speed, not for what it learns. Every width is the report's, and so is the number of experts that a
token visits. Fewer are the layers (none of them dense, as 58 of 61 are not), the experts, of which one card
of the report's run holds still fewer, and the words, as embedding and head are shared by fewer layers. That
is 3.0B parameters and another 1.0B of multi-token prediction. At 12 bytes for each (FP32 weights and
gradients, moments in BF16), 2 for what is multiplied, and what the layers keep, 255 kB a token in BF16,
16,384 tokens need some 75 of its 141 GB beside what XLA works in. An H100 takes
`--config.train.batch_size=1`.
"""

from ml_collections.config_dict import ConfigDict

from experiments.run import defaults


def get_config() -> ConfigDict:
    """DeepSeek-V3 with fewer layers, experts and words."""
    config = defaults()
    config.model.update(layers=3, dense_layers=0, mtp_depth=1, experts=16, vocab=16_384)
    config.train.update(batch_size=4, sequence_length=4096)
    config.recipe.batch_ramp_tokens = 0.0
    return config
