"""`python -m tools.bench_train [--config=NAME] [--rivals=NAMES] [--profile=DIR] [--results=FILE]`: the
training step, in each precision, beside transformers' on the same device.

All run forward, backward, clipping and AdamW on the same shapes. transformers (DeepseekV3ForCausalLM,
PyTorch) trains no multi-token prediction, so ours is timed with and without it. Every program has a process
of its own, and the device's memory with it; they take turns, several times, so that whatever else the machine
does meets all. Medians over all steps are compared. MFU counts FLOPs as DeepSeek does, without multi-token
prediction and recomputation, and is of the device's BF16 rate in every precision.

--config takes what `experiments.pretrain` takes. The default fills an H200: on a CPU choose a small one,
`--config=tiny --precisions=float32`. A profile says where ours spends its time (`tools.time_by_kind`).
"""

import dataclasses
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import flags
from ml_collections.config_dict import ConfigDict

from dsv3_jax.model import size
from dsv3_jax.training.metrics import peak_flops, write_atomically
from experiments import settings
from experiments.records import Refused, nearest
from experiments.run import PRECISIONS, Run, resolve
from tools import time_by_kind
from tools.train_programs import RIVALS, Program, ours

_PRECISIONS = flags.DEFINE_list("precisions", ["bfloat16", "fp8"], "Of ours; rivals multiply in the first.")
_RIVALS = flags.DEFINE_list("rivals", list(RIVALS), "What stands beside ours; empty for nothing.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Turns of each program.", lower_bound=1)
_STEPS = flags.DEFINE_integer("timed_steps", 10, "Timed steps of a turn.", lower_bound=1)
_PROFILE = flags.DEFINE_string("profile", None, "Where to write profiles of ours, made after the last turn.")
_RESULTS = flags.DEFINE_string("results", None, "Where to write what is printed, as JSON.")
_PROGRAM = flags.DEFINE_string("program", None, "What a process of this command runs; not for people.")

_WARM = 4  # steps before the clock starts: libraries that choose kernels, and allocators that learn
_PROFILED = 2  # steps


class Turn(NamedTuple):
    """What a process found out."""

    device: str
    seconds: list[float]  # of each step
    peak_bytes: int | None
    kinds: dict[str, float]  # seconds of a step by kind of work; empty without a profile


class Result(NamedTuple):
    """All turns of a program, or why there are none."""

    turns: list[Turn]
    note: str = ""

    @property
    def seconds(self) -> list[float]:
        """Those of all steps."""
        return [s for turn in self.turns for s in turn.seconds]


def main(name: str, config: ConfigDict) -> None:
    """Lets all programs take turns, prints a table, and writes JSON."""
    run = resolve(config)
    made = programs(run, _PRECISIONS.value, _RIVALS.value)
    if _PROGRAM.value is not None:
        print(json.dumps(measured(made[_PROGRAM.value]())._asdict()))
        return
    with tempfile.TemporaryDirectory() as cache:
        results = in_turns(list(made), _ROUNDS.value, partial(_in_a_process, cache))
    found = report(name, run, results)
    print("\n".join(lines(found)))
    if _RESULTS.value:
        write_atomically(Path(_RESULTS.value), json.dumps(found, indent=1).encode())
    if missing := [program for program, result in results.items() if result.note and program not in RIVALS]:
        raise SystemExit(f"{len(missing)} of our programs did not run ({'; '.join(missing)}): see above.")


def programs(run: Run, precisions: list[str], rivals: list[str]) -> dict[str, Callable[[], Program]]:
    """What makes each program, by the name that the table gives it.

    Raises:
        Refused: if there is no such precision or rival.
    """
    for flag, given, known in (("precisions", precisions, PRECISIONS), ("rivals", rivals, RIVALS)):
        for word in given:
            if word not in known:
                raise Refused(f"--{flag}={word} is none of {', '.join(known)}{nearest(word, list(known))}.")
    if not precisions:
        raise Refused(f"--precisions= leaves nothing of ours to time: give some of {', '.join(PRECISIONS)}.")
    made: dict[str, Callable[[], Program]] = {}
    without = dataclasses.replace(run, model=dataclasses.replace(run.model, mtp_depth=0))
    for precision in precisions:
        made[f"ours, {precision}"] = partial(ours, dataclasses.replace(run, precision=precision))
        if run.model.mtp_depth:
            made[f"ours, {precision}, no MTP"] = partial(
                ours, dataclasses.replace(without, precision=precision)
            )
    same = dataclasses.replace(without, precision=precisions[0])
    return made | {rival: partial(RIVALS[rival], same) for rival in rivals}


def measured(program: Program) -> Turn:
    """Times the steps of a program, and then profiles a few where that is asked for."""
    for _ in range(_WARM):
        program.once()
    seconds = []
    for _ in range(_STEPS.value):
        start = time.perf_counter()
        program.once()
        seconds.append(time.perf_counter() - start)
    peak, kinds = program.peak_bytes(), {}
    if _PROFILE.value and program.text:
        with jax.profiler.trace(_PROFILE.value):
            for _ in range(_PROFILED):
                program.once()
        total = time_by_kind.read(Path(_PROFILE.value), program.text)
        kinds = {kind: spent / _PROFILED for kind, spent in total.items()}
    return Turn(program.device, seconds, peak, kinds)


def in_turns(names: list[str], rounds: int, turn: Callable[[str, int], Turn | str]) -> dict[str, Result]:
    """The results of all programs.

    Args:
        names: of the programs.
        rounds: how often each has its turn.
        turn: runs a program that has so many turns left after this one; says in words why it could not, and
            then it has no more.
    """
    results = {name: Result([]) for name in names}
    for left in reversed(range(rounds)):
        for name in names:
            if not results[name].note:
                found = turn(name, left)
                if isinstance(found, Turn):
                    results[name].turns.append(found)
                else:
                    results[name] = Result([], found)
    return results


def _in_a_process(cache: str, name: str, left: int) -> Turn | str:
    """This command with the same arguments, for one program; what it compiles is kept for its next turn."""
    command = [sys.executable, "-m", "tools.bench_train", *sys.argv[1:], f"--program={name}"]
    if left:
        command.append("--profile=")
    caches = {"JAX_COMPILATION_CACHE_DIR": f"{cache}/jax", "TORCHINDUCTOR_CACHE_DIR": f"{cache}/torch"}
    done = subprocess.run(command, capture_output=True, text=True, env=caches | os.environ)
    if done.returncode == 0:
        return Turn(**json.loads(done.stdout.splitlines()[-1]))
    sys.stderr.write(done.stderr)
    last = (done.stderr.strip() or "it said nothing").splitlines()[-1]
    return f"not run (exit {done.returncode}): {last[:160]}"


def report(name: str, run: Run, results: Mapping[str, Result]) -> dict[str, Any]:
    """What JSON holds. Times are seconds; MFU is null where no data sheet names the device, as on a CPU."""
    return {
        "config": name,
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in ("jax", "jaxlib", "torch", "transformers")},
        "cores": os.cpu_count(),
        "device": next((turn.device for result in results.values() for turn in result.turns), None),
        "parameters": size.parameters(run.model),
        "mtp_parameters": size.mtp_parameters(run.model) if run.model.mtp_depth else 0,
        "tokens_a_step": run.train.batch_size * run.train.sequence_length,
        "flops_a_token": size.flops_per_token(run.model, run.train.sequence_length),
        "programs": {program: _figures(program, run, result) for program, result in results.items()},
    }


def _figures(program: str, run: Run, result: Result) -> dict[str, Any]:
    if not result.turns:
        return {"note": result.note}
    median = statistics.median(result.seconds)
    speed = run.train.batch_size * run.train.sequence_length / median
    devices = 1 if program in RIVALS else run.mesh.pipeline * run.mesh.data * run.mesh.expert
    peak = peak_flops(result.turns[0].device)
    flops = speed * size.flops_per_token(run.model, run.train.sequence_length)
    return {
        "seconds": [turn.seconds for turn in result.turns],
        "median": median,
        "tokens_per_second": speed,
        "mfu": flops / (peak * devices) if peak else None,
        "peak_bytes": max((turn.peak_bytes for turn in result.turns if turn.peak_bytes), default=None),
        "kinds": result.turns[-1].kinds,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def lines(found: Mapping[str, Any]) -> list[str]:
    """A report for people: a line for each program, and of each profile one for each kind of work."""
    versions = ", ".join(f"{package} {number}" for package, number in found["versions"].items() if number)
    out = [
        f"{found['config']} on {found['device']} ({found['cores']} cores of the host, {versions}, "
        f"Python {found['python']}, {found['date']})",
        f"{found['parameters'] / 1e9:.3g}B parameters and {found['mtp_parameters'] / 1e9:.3g}B of MTP, "
        f"{found['tokens_a_step']} tokens a step, {found['flops_a_token'] / 1e9:.4g} GFLOP a token",
    ]
    programs = found["programs"]
    rivals = [
        figures["median"] for name, figures in programs.items() if name in RIVALS and "median" in figures
    ]
    for name, figures in programs.items():
        if "note" in figures:
            out.append(f"{name:26s} {figures['note']}")
            continue
        steps = [s for turn in figures["seconds"] for s in turn]
        mfu, peak = figures["mfu"], figures["peak_bytes"]
        out.append(
            f"{name:26s} {figures['median']:8.4f} s a step ({min(steps):.4f} to {max(steps):.4f}), "
            f"{figures['tokens_per_second']:9.0f} tokens/s"
            + (f", MFU {mfu:.1%}" if mfu is not None else "")
            + (f", at most {peak / 1e9:.1f} GB" if peak is not None else "")
            + (
                f", {min(rivals) / figures['median']:.2f} times the faster rival"
                if rivals and name not in RIVALS
                else ""
            )
        )
    for name, figures in programs.items():
        if kinds := figures.get("kinds"):
            out += ["", f"Seconds of a step by kind of work, {name}:", *time_by_kind.lines(kinds)]
    return out


if __name__ == "__main__":
    settings.run(main, default="bench_h200")
