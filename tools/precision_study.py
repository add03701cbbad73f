"""`python -m tools.precision_study [--config=NAME] [--steps=N] [--seeds=N] [--out=DIR]`: FP8 beside BF16.

Trains one model in BF16 and in FP8 from the same weights on the same tokens, once for each seed, and, with
the first seed, in FP8 as the report's ablations do worse (with gradients in 128 x 128 blocks, and with sums
of 14 bits) and in FP32, which shows how far rounding alone takes two runs apart. Compared are training
losses of the same step, smoothed as in the report (arXiv:2412.19437, appendix B.1). Writes losses.json, a
table and a picture.
"""

import dataclasses
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from absl import flags
from jaxtyping import Float
from matplotlib.figure import Figure
from ml_collections.config_dict import ConfigDict

from dsv3_jax import ops
from dsv3_jax.data.loader import train_loader
from dsv3_jax.data.tokenizer import default_tokenizer
from dsv3_jax.model import size
from dsv3_jax.ops import Ops
from dsv3_jax.training import step
from dsv3_jax.training.metrics import write_atomically
from dsv3_jax.training.step import State
from experiments import batches, settings
from experiments.run import RECOMPUTE, Run, make_mesh, resolve
from tools import fp8_variants

_STEPS = flags.DEFINE_integer("steps", None, "Of each run; config.train.steps unless given.", lower_bound=2)
_SEEDS = flags.DEFINE_integer("seeds", 3, "Weights and orders of tokens to compare on.", lower_bound=1)
_OUT = flags.DEFINE_string("out", "runs/precision_study", "The folder to write to.")

DECAY = 0.9  # of the mean that losses are smoothed by
ACCEPTED = 0.25  # per cent, what the report stays below
_BASE, _FP8 = "BF16", "FP8"

Losses = Float[np.ndarray, " steps"]


class Variant(NamedTuple):
    """One way to train."""

    name: str
    operations: Callable[..., Ops]
    every_seed: bool
    colour: str


VARIANTS = (
    Variant(_BASE, ops.bfloat16, True, "#1f2937"),
    Variant(_FP8, ops.fp8, True, "#1f6fb4"),
    Variant("FP32", ops.float32, False, "#64748b"),
    Variant("FP8, gradients in 128 x 128", fp8_variants.block_gradients, False, "#d9480f"),
    Variant("FP8, sums of 14 bits", fp8_variants.reduced_sums, False, "#7c3aed"),
)


def main(name: str, config: ConfigDict) -> None:
    """Trains all variants and writes what came out."""
    run, out, start = resolve(config), Path(_OUT.value), time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    steps = _STEPS.value or run.train.steps
    losses = {}
    with jax.set_mesh(make_mesh(run)):
        for variant in VARIANTS:
            # One for all seeds, so that their step is compiled once.
            setup = run.setup._replace(ops=variant.operations(RECOMPUTE[run.recompute]))
            seeds = range(_SEEDS.value if variant.every_seed else 1)
            losses[variant.name] = [train(run, setup, seed, steps, out) for seed in seeds]
            done = ", ".join(f"{smoothed(curve)[-1]:.4f}" for curve in losses[variant.name])
            print(f"{variant.name}: {done} after {time.monotonic() - start:.0f} s", flush=True)
    text = "\n".join((_heading(name, run, steps, time.monotonic() - start), *table(losses)))
    print(text)
    write_atomically(out / "table.md", f"{text}\n".encode())
    curves = {variant: [c.tolist() for c in runs] for variant, runs in losses.items()}
    write_atomically(out / "losses.json", json.dumps({"config": name, "losses": curves}).encode())
    draw(losses, name).savefig(out / "precision.png", format="png")
    print(f"\nCurves and the picture are in {out}.")


def train(run: Run, setup: step.Setup, seed: int, steps: int, folder: Path) -> Losses:
    """The main model's training loss at every step; the seed chooses weights and order of tokens."""
    tokenizer = default_tokenizer(folder, run.model.vocab)
    loader = train_loader(dataclasses.replace(run.data, seed=seed), tokenizer, run.train.sequence_length)
    state = jax.jit(lambda key: State.init(key, setup))(jax.random.key(seed))
    losses = []
    for _ in range(steps):
        batch = batches.training_batch(loader.next(run.train.batch_size), run.pipeline.microbatches)
        state, metrics = step.step(state, batch, setup=setup)
        losses.append(float(metrics.main_loss))
    loader.close()
    return np.array(losses)


def smoothed(losses: Losses) -> Losses:
    """The running mean in which every loss counts a tenth, and what was before nine."""
    means = [losses[0]]
    for loss in losses[1:]:
        means.append(DECAY * means[-1] + (1 - DECAY) * loss)
    return np.array(means)


def differences(losses: dict[str, list[Losses]], variant: str) -> list[Losses]:
    """Per cent by which the smoothed losses of each seed lie above those of BF16."""
    pairs = zip(losses[variant], losses[_BASE], strict=False)  # some variants have fewer seeds
    return [100 * (smoothed(mine) / smoothed(base) - 1) for mine, base in pairs]


def table(losses: dict[str, list[Losses]]) -> list[str]:
    """Markdown: for each variant its difference from BF16 over the second half of training."""
    lines = [
        "| | seeds | final loss | mean difference | by seed | largest | signed mean |",
        "|---|---|---|---|---|---|---|",
    ]
    for variant, runs in losses.items():
        final = np.mean([smoothed(curve)[-1] for curve in runs])
        halves = [d[len(d) // 2 :] for d in differences(losses, variant)]
        means = [float(np.mean(np.abs(half))) for half in halves]
        figures = [
            f"{np.mean(means):.3f}%",
            " ".join(f"{mean:.3f}%" for mean in means),
            f"{np.max(np.abs(halves)):.3f}%",
            f"{np.mean(halves):+.3f}%",
        ]
        cells = figures if variant != _BASE else ["", "", "", ""]
        lines.append(f"| {variant} | {len(runs)} | {final:.4f} | {' | '.join(cells)} |")
    return lines


def draw(losses: dict[str, list[Losses]], name: str) -> Figure:
    """Smoothed losses (nats per token), and below them how far each variant is from BF16."""
    figure = Figure(figsize=(8, 7), dpi=130, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[1, 1.4])
    for v in VARIANTS:
        runs = losses[v.name]
        steps = np.arange(1, len(runs[0]) + 1)
        above.plot(steps, smoothed(runs[0]), color=v.colour, label=v.name)
        if v.name != _BASE:
            of_seeds = differences(losses, v.name)
            for curve in of_seeds if len(of_seeds) > 1 else ():
                below.plot(steps, curve, color=v.colour, alpha=0.35, linewidth=0.8)
            below.plot(steps, np.mean(of_seeds, axis=0), color=v.colour, linewidth=2, label=v.name)
    below.axhspan(-ACCEPTED, ACCEPTED, color="#e5e7eb", zorder=0, label=f"within {ACCEPTED}%")
    below.axhline(0, color="#1f2937", linewidth=0.8)
    above.set(ylabel="training loss of the first seed", title=f"{name}: FP8 beside BF16 on the same tokens")
    below.set(xlabel="step", ylabel="smoothed loss above that of BF16 (%)")
    for axes in (above, below):
        axes.grid(color="#e5e7eb", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    return figure


def _heading(name: str, run: Run, steps: int, seconds: float) -> str:
    tokens = run.train.batch_size * run.train.sequence_length
    return (
        f"{name}: {size.parameters(run.model) / 1e6:.1f}M parameters, {steps} steps of {tokens} tokens; "
        f"{seconds / 60:.1f} minutes on {os.cpu_count()} cores ({jax.devices()[0].device_kind}), "
        f"jax {jax.__version__}, Python {platform.python_version()}.\n"
    )


if __name__ == "__main__":
    settings.run(main, default="ablation")
