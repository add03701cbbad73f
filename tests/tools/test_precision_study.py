"""The study compares smoothed losses of the same step, and trains what it names."""

import jax
import numpy as np
import pytest

from dsv3_jax.ops import recompute
from experiments import settings
from experiments.run import resolve
from tests.conftest import mesh_of
from tools import fp8_variants
from tools import precision_study as study


def test_losses_are_smoothed_with_nine_tenths_of_what_was():
    np.testing.assert_allclose(study.smoothed(np.array([2.0, 1.0, 4.0])), [2.0, 1.9, 2.11])


def losses(shift):
    """All variants the same as BF16 but for FP8, which is `shift` per cent above it in the second half."""
    base = np.linspace(4, 3, 8)
    runs = {variant.name: [base.copy()] for variant in study.VARIANTS}
    runs["BF16"].append(base + 1)
    runs["FP8"] = [study_shifted(curve, shift) for curve in runs["BF16"]]
    return runs


def study_shifted(base, shift):
    """Losses whose smoothed curve is that of `base`, times 1 + shift per cent from the middle on."""
    wanted = study.smoothed(base) * np.where(np.arange(len(base)) < len(base) // 2, 1, 1 + shift / 100)
    return np.concatenate([wanted[:1], (wanted[1:] - study.DECAY * wanted[:-1]) / (1 - study.DECAY)])


@pytest.mark.parametrize("shift", [0.2, -0.3])
def test_differences_are_of_each_seed_over_the_second_half(shift):
    table = study.table(losses(shift))
    row = next(line for line in table if line.startswith("| FP8 |"))
    size = f"{abs(shift):.3f}%"
    assert row.split(" | ")[3:] == [size, f"{size} {size}", size, f"{shift:+.3f}% |"]


def test_the_picture_shows_every_variant():
    above, below = study.draw(losses(0.1), "some model").axes
    names = [variant.name for variant in study.VARIANTS]
    assert above.get_legend_handles_labels()[1] == names
    assert set(names[1:]) < set(below.get_legend_handles_labels()[1])


def test_a_variant_trains(tmp_path):
    config = settings.load("ablation")
    config.model.update(vocab=512, d_model=32, layers=1, dense_layers=0, heads=2, d_expert=32, experts=4)
    config.model.update(groups=1, top_groups=1, top_k=2, mtp_depth=0, q_rank=16, kv_rank=16)
    config.train.sequence_length = 64
    config.recipe.update(learning_rate=4e-3, warmup_steps=1)
    run = resolve(config)
    setup = run.setup._replace(ops=fp8_variants.reduced_sums(recompute.nothing))
    with jax.set_mesh(mesh_of(1, 1)):
        curve = study.train(run, setup, seed=0, steps=6, folder=tmp_path)
    assert np.isfinite(curve).all()
    assert curve[-1] < curve[0]
