"""Speed and memory of conversions at DeepSeek-V3's shapes: `python -m tools.bench_convert WORK_DIR`.

A released folder of one dense and one routed layer, random, is converted from-hf and to-hf, each in a fresh
process with each number of workers.
"""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from absl import app, flags
from rich.filesize import decimal

from dsv3_jax.config import Config
from dsv3_jax.interop import config as released
from dsv3_jax.interop import shards, transfer
from dsv3_jax.interop.safetensors import TYPES
from dsv3_jax.interop.shards import Slot
from experiments import settings
from experiments.run import resolve
from tools.convert import FORMS

_EXPERTS = flags.DEFINE_integer("experts", 256, "Fewer need less disk: 256 take 50 GB in all.", lower_bound=8)
_WORKERS = flags.DEFINE_list("convert_workers", ["1", "2"], "Numbers of workers to compare.")

_VOCAB = 1280  # small: the embedding is in no layer
_SHARD = 1_000_000_000  # bytes
_CHILD = """
import re
import sys
from pathlib import Path
from absl import flags
from tools import convert
flags.FLAGS(sys.argv[4:])
try:
    convert.main(sys.argv[:4])
finally:
    print("peak", 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]))
"""


def main(argv: list[str]) -> None:
    """Makes the folder and prints a line for each conversion."""
    if len(argv) != 2:
        raise app.UsageError("Give one argument, a directory to work in.")
    work = Path(argv[1])
    c = two_layers(_EXPERTS.value)
    write(work / "hf", c)
    total = sum(slot.size for slot in transfer.slots(c, FORMS["float8", "float32"]))
    print(f"{decimal(total)} in FP8, {os.cpu_count()} cores", flush=True)
    for workers in _WORKERS.value:
        for direction, source, result in (("from-hf", "hf", "ours"), ("to-hf", "ours", "back")):
            shutil.rmtree(work / result, ignore_errors=True)
            seconds, peak = convert(direction, work / source, work / result, workers)
            speed = decimal(int(total / seconds))
            print(
                f"{direction}, {workers} workers: {seconds:.1f} s, {speed}/s of FP8, peak {decimal(peak)}",
                flush=True,
            )


def two_layers(experts: int) -> Config:
    """DeepSeek-V3 with one dense and one routed layer."""
    c = resolve(settings.load("deepseek_v3")).model
    return dataclasses.replace(c, layers=2, dense_layers=1, mtp_depth=0, vocab=_VOCAB, experts=experts)


def write(directory: Path, c: Config) -> None:
    """A released folder with FP8 weights: random values, scales of one."""
    directory.mkdir(parents=True)
    form = FORMS["float8", "float32"]
    ids = {"bos_token_id": 0, "eos_token_id": 1}
    text = json.dumps({**released.to_json(c, form.torch_dtype, ids), **form.config_keys})
    (directory / "config.json").write_text(text, "utf-8")
    files = shards.named(transfer.slots(c, form), _SHARD)
    for file, slots in files.items():
        shards.write(directory / file, slots, ((slot.name, _values(slot)) for slot in slots))
    shards.write_index(directory, files)


def _values(slot: Slot) -> np.ndarray:
    if slot.dtype != "F8_E4M3":
        return np.ones(slot.shape, TYPES[slot.dtype])
    bits = np.frombuffer(np.random.default_rng(0).bytes(slot.size), np.uint8).reshape(slot.shape)
    return (bits & 0xF7).view(TYPES[slot.dtype])  # no NaN, which has all bits but the sign


def convert(direction: str, source: Path, destination: Path, workers: str) -> tuple[float, int]:
    """Seconds, and the most bytes resident, of one conversion in a process of its own."""
    dtype = "bfloat16" if direction == "from-hf" else "float8"
    options = [f"--workers={workers}", f"--dtype={dtype}", "--max_shard_size=1GB"]
    start = time.monotonic()
    run = subprocess.run(
        [sys.executable, "-c", _CHILD, direction, str(source), str(destination), "", *options],
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode:
        raise RuntimeError(f"{direction} failed: {run.stderr[-1000:]}")
    return time.monotonic() - start, int(re.findall(r"peak (\d+)", run.stdout)[-1])


if __name__ == "__main__":
    app.run(main)
