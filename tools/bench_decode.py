"""`python -m tools.bench_decode [--checkpoint=DIR] [--batches=1,8] [--results=FILE]`: greedy text, timed.

Our engine is timed with and without drafts by multi-token prediction, and beside transformers' generate.

All have the same weights in FP32 and the same prompts, the middles of files of the standard library, and give
the same number of tokens. They take turns, several times after one that compiles; medians are compared, and
counts of tokens that differ from ours without drafts. A model's own tokenizer is needed beside its weights.
"""

import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import app, flags, logging

from dsv3_jax import mesh, ops
from dsv3_jax.config import Config
from dsv3_jax.data import corpus
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.inference.engine import Engine, generated
from dsv3_jax.inference.request import Counts, Limits, Request
from dsv3_jax.interop import tokenizer
from dsv3_jax.interop.config import from_record
from dsv3_jax.model.cached import Served
from dsv3_jax.training.metrics import write_atomically
from dsv3_jax.training.restore import CheckpointError, read_meta
from experiments.weights import served
from tools import convert

_CHECKPOINT = flags.DEFINE_string("checkpoint", "runs/tiny", "A run's work directory, or converted weights.")
_BATCHES = flags.DEFINE_list("batches", ["1", "8"], "Texts at once.")
_PROMPT = flags.DEFINE_integer("prompt_tokens", 64, "Tokens of a prompt.", lower_bound=1)
_TOKENS = flags.DEFINE_integer("new_tokens", 128, "Tokens that each gives.", lower_bound=1)
_TURNS = flags.DEFINE_integer("turns", 3, "Timed turns of each.", lower_bound=1)
_RESULTS = flags.DEFINE_string("results", None, "Where to write what is printed, as JSON.")

Prompts = list[list[int]]
Program = Callable[[Prompts], tuple["Turn", Counts | None]]


class Turn(NamedTuple):
    """What a run of all prompts gave."""

    seconds: float
    tokens: list[list[int]]


def main(argv: Sequence[str]) -> None:
    """Prints a table."""
    if len(argv) > 1:
        raise app.UsageError(f"{argv[1]!r} is no flag; see --help.")
    logging.set_verbosity(logging.WARNING)
    try:
        with jax.set_mesh(mesh.make_mesh(1, jax.device_count(), 1)), tempfile.TemporaryDirectory() as folder:
            found = measured(Path(_CHECKPOINT.value), Path(folder))
    except (ValueError, OSError, CheckpointError) as error:
        sys.exit(f"Nothing was measured. {error}")
    print("\n".join(lines(found)))
    if _RESULTS.value:
        write_atomically(Path(_RESULTS.value), json.dumps(found, indent=1).encode())


def measured(checkpoint: Path, folder: Path) -> dict[str, Any]:
    """All figures; the folder is for weights in transformers' form."""
    meta = read_meta(checkpoint)
    c = from_record(meta.model_config)
    model = served(checkpoint, c, meta, ops.float32())
    text = Tokenizer.load(tokenizer.find(checkpoint))
    theirs = _transformers(checkpoint, folder)
    rows = {}
    for batch in map(int, _BATCHES.value):
        prompts = _prompts(text, batch)
        programs: dict[str, Program] = {"ours": _ours(model, c, batch, 0)}
        if c.mtp_depth:
            programs["ours, drafts"] = _ours(model, c, batch, 1)
        if theirs is not None:
            programs["transformers"] = theirs
        rows[str(batch)] = _compare(programs, prompts)
    return {
        "model": str(checkpoint.name),
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("jax", "torch", "transformers")},
        "cores": os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "prompt_tokens": _PROMPT.value,
        "new_tokens": _TOKENS.value,
        "batches": rows,
    }


def _compare(programs: dict[str, Program], prompts: Prompts) -> dict[str, Any]:
    turns: dict[str, list[Turn]] = {name: [] for name in programs}
    counts: dict[str, Counts | None] = {}
    for turn in range(1 + _TURNS.value):
        for name, program in programs.items():
            done, counts[name] = program(prompts)
            if turn:
                turns[name].append(done)
    reference = np.array(turns["ours"][0].tokens)
    out = {}
    for name, made in turns.items():
        median, found = statistics.median(turn.seconds for turn in made), counts[name]
        out[name] = {
            "seconds": [turn.seconds for turn in made],
            "tokens_per_second": reference.size / median,
            "tokens_that_differ": int(np.sum(np.array(made[0].tokens) != reference)),
            "acceptance": found.acceptance if found and found.drafts else None,
            "tokens_per_step": found.tokens_per_step if found else None,
        }
    return out


def _ours(model: Served, c: Config, batch: int, drafts: int) -> Program:
    devices = jax.device_count()
    length = _PROMPT.value + _TOKENS.value
    slots = -(-batch // devices) * devices
    limits = Limits(slots=slots, length=length, part=512, steps=32, drafts=drafts)
    engine = Engine(model, c, ops.float32(), limits)

    def run(prompts: Prompts) -> tuple[Turn, Counts]:
        start = time.perf_counter()
        results = generated(engine, [Request(prompt=p, most=_TOKENS.value) for p in prompts])
        return Turn(time.perf_counter() - start, [tokens for tokens, _ in results]), engine.counts

    return run


def _transformers(checkpoint: Path, folder: Path) -> Program | None:
    """None where it is not installed."""
    if not _version("torch") or not _version("transformers"):
        return None
    import torch
    from transformers import DeepseekV3ForCausalLM

    torch.set_num_threads(os.cpu_count() or 1)
    convert.to_hf(checkpoint, folder / "hf", convert.FORMS["float32", "float32"], 5_000_000_000)
    model: Any = DeepseekV3ForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")

    def run(prompts: Prompts) -> tuple[Turn, None]:
        ids = torch.tensor(prompts, device=model.device)
        count = _TOKENS.value
        start = time.perf_counter()
        with torch.no_grad():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        tokens = out[:, ids.shape[1] :].tolist()
        return Turn(time.perf_counter() - start, tokens), None

    return run


def _prompts(text: Tokenizer, count: int) -> Prompts:
    library, prompts = corpus.standard_library(2_000_000), []
    for number in range(len(library)):
        ids = text.encode(library[number]).tolist()
        middle = len(ids) // 2
        if len(ids) >= 2 * _PROMPT.value:
            prompts.append(ids[middle : middle + _PROMPT.value])
        if len(prompts) == count:
            break
    return prompts


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def lines(found: dict[str, Any]) -> list[str]:
    """For people."""
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items() if number)
    out = [
        f"{found['new_tokens']} tokens after {found['prompt_tokens']}, greedy, FP32, on {found['device']} "
        f"({found['cores']} cores of the host, {versions}, Python {found['python']}, {found['date']})"
    ]
    for batch, programs in found["batches"].items():
        rival = programs.get("transformers", {}).get("tokens_per_second")
        plain = programs["ours"]["tokens_per_second"]
        for name, row in programs.items():
            speed, drafts = row["tokens_per_second"], row["acceptance"]
            out.append(
                f"batch {batch:3s} {name:14s} {speed:9.1f} tokens/s"
                + (f", {speed / rival:.2f} times transformers" if rival and name != "transformers" else "")
                + (f", {speed / plain:.2f} times plain" if drafts is not None else "")
                + (f", {drafts:.1%} of drafts right" if drafts is not None else "")
                + (f", {row['tokens_per_step']:.2f} tokens a step" if drafts is not None else "")
                + (f", {row['tokens_that_differ']} tokens differ" if name != "ours" else "")
            )
    return out


if __name__ == "__main__":
    app.run(main)
