"""`python -m tools.long_context [--workdir=DIR] [--json=FILE] [--png=FILE]`: a context grows, and is used.

Trains `toy_128`, then `toy_1k` and `toy_4k` from each other's weights, the report's extension in small
(arXiv:2412.19437, section 4.3), each as `experiments.pretrain` does: what was trained before is not trained
again, and what was stopped goes on. Then shows, for the first model without and with YaRN and for what each
phase made of it, the loss by position and which needles it finds (`tools/probes.py`).
"""

import dataclasses
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from dsv3_jax.data import corpus
from dsv3_jax.data.documents import BadDocument, Skipped
from dsv3_jax.data.loader import validation_rows
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.interop import tokenizer
from dsv3_jax.pipeline.objective import Batch, targets
from dsv3_jax.training import runtime
from dsv3_jax.training.metrics import write_atomically
from dsv3_jax.training.restore import CheckpointError, load_weights, read_meta
from experiments import pretrain, settings
from experiments.run import Run, make_mesh, resolve
from experiments.weights import weights_of
from tools.probe_report import Measured, Scale, draw, table
from tools.probes import Haystack, Subject, grid, log_probabilities, loss_by_position

_PHASES = flags.DEFINE_list("phases", ["toy_128", "toy_1k", "toy_4k"], "Configs, from short to long.")
_ROWS = flags.DEFINE_integer("rows", 32, "Sequences that the loss is measured on.", lower_bound=1)
_NEEDLES = flags.DEFINE_integer("needles", 16, "Of each length and depth.", lower_bound=1)
_JSON = flags.DEFINE_string("json", None, "Where to write the figures; report.json in the folder of runs.")
_PNG = flags.DEFINE_string("png", None, "Where to draw them; report.png in the folder of runs.")
flags.declare_key_flag("workdir")  # of experiments.pretrain: here the folder of all runs

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
_FOLDER = "runs/long_context"


def main(argv: Sequence[str]) -> None:
    """Trains what is missing, measures, and writes what came out."""
    if len(argv) > 1:
        raise app.UsageError(f"{argv[1]!r} is no flag; see --help.")
    logging.set_verbosity(logging.WARNING)
    folder = Path(flags.FLAGS.workdir or _FOLDER)
    try:
        runs = train(_PHASES.value, folder)
        found, scale = measure(runs)
    except (ValueError, OSError, BadDocument, CheckpointError, runtime.Diverged) as error:
        sys.exit(str(error))
    print("\n" + "\n".join(table(found, scale)))
    report = _record(found, scale)
    write_atomically(Path(_JSON.value or folder / "report.json"), json.dumps(report, indent=1).encode())
    draw(Path(_PNG.value or folder / "report.png"), found, scale)


def train(phases: Sequence[str], folder: Path) -> dict[Path, Run]:
    """Each phase from the weights of the one before; the work directories and what was trained in them.

    Raises:
        ValueError: if a work directory holds a run of other settings.
    """
    runs: dict[Path, Run] = {}
    for name in phases:
        config, workdir = settings.load(name), folder / Path(name).stem
        config.start_from = str(list(runs)[-1]) if runs else None
        run = resolve(config)
        if _steps(workdir, config.to_dict()) < run.train.steps:
            pretrain.pretrain(workdir.name, config, workdir)
        if _steps(workdir, config.to_dict()) < run.train.steps:
            sys.exit(f"{workdir} is not trained to its end; the same command goes on from there.")
        runs[workdir] = run
    return runs


def _steps(workdir: Path, config: dict[str, Any]) -> int:
    """How many steps of this config were trained so far."""
    try:
        meta = read_meta(workdir)
    except FileNotFoundError:
        return 0
    if meta.config != json.loads(json.dumps(config)):
        raise ValueError(f"{workdir} holds a run of other settings: choose another --workdir, or delete it.")
    return meta.step


def measure(runs: dict[Path, Run]) -> tuple[list[Measured], Scale]:
    """All models at the lengths of the last phase."""
    first, *further = runs
    last = list(runs.values())[-1]
    short, long = runs[first].train.sequence_length, last.train.sequence_length
    lengths = [short << n for n in range((long // short).bit_length())]
    scale = Scale([0, *lengths], lengths, DEPTHS)
    text = Tokenizer.load(tokenizer.find(first))
    rows = validation_rows(last.data, text, long, _ROWS.value)
    haystack = Haystack(_held_out(last), text)
    plain = dataclasses.replace(last.model, yarn=runs[first].model.yarn)
    looked_at = {first.name: (first, plain), f"{first.name} with YaRN": (first, last.model)}
    looked_at |= {workdir.name: (workdir, last.model) for workdir in further}
    found, wanted = [], np.asarray(targets(Batch(*map(jnp.asarray, rows))))
    with jax.set_mesh(make_mesh(last)):
        for name, (workdir, c) in looked_at.items():
            weights = load_weights(workdir, weights_of(c, read_meta(workdir)))
            subject = Subject(weights["model"], weights["bias"], c, last.setup.ops)
            scores = log_probabilities(subject, rows)
            losses = loss_by_position(scores, wanted, scale.edges)
            found.append(Measured(name, losses, grid(subject, haystack, lengths, DEPTHS, _NEEDLES.value)))
            print(f"{name}: measured", flush=True)
    return found, scale


def _held_out(run: Run) -> str:
    """The text of all validation documents."""
    data, text = run.data, []
    for source in data.sources:
        opened = corpus.open_source(
            source.path, source.text_key, data.max_document_bytes, data.on_bad, Skipped()
        )
        _, documents = corpus.split(opened, data.validation_fraction)
        text += [documents[n] for n in range(len(documents))]
    return "".join(text)


def _record(found: Sequence[Measured], scale: Scale) -> dict[str, Any]:
    return {
        "phases": _PHASES.value,
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "cores": os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "rows": _ROWS.value,
        "needles": _NEEDLES.value,
        **scale._asdict(),
        "losses": {m.name: m.losses for m in found},
        "recall": {m.name: m.recall.tolist() for m in found},
    }


if __name__ == "__main__":
    app.run(main)
