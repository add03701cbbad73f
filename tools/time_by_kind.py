"""Where a profiled program spends its time, by kind of work: from JAX's trace and the text of the program.

The trace (Chrome's trace event format, which `jax.profiler.trace` writes) says which instruction of the
program ran when. The text says what the instruction is, and in which of our files it was traced.
"""

import gzip
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tools.planning import hlo
from tools.planning.hlo import Instruction

# A fusion is of the first of these kinds that anything in it is.
KINDS = ("all-to-all", "other collectives", "attention", "matmul", "quantize", "optimizer", "rest")
_FILES = {  # of whatever was traced there; the first that fits counts
    "attention": r"/pallas_kernels/mla_attention/",
    "matmul": r"/pallas_kernels/(grouped|fp8)_matmul/",
    "quantize": r"/pallas_kernels/(quantize/|scaled\.py)",
    "inside": r"/dsv3_jax/pipeline/execute\.py",  # losses and gradients: all that is not above is "rest"
    "optimizer": r"/dsv3_jax/training/",
}
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "collective-broadcast")
_PRODUCTS = r'custom_call_target="[^"]*(?:gemm|matmul|dot)'
_FUSED = ("fusion", "call", "async-start", "custom-call")  # what is called runs as one; loops show their own


class Span(NamedTuple):
    """An instruction at work on one line of the trace; microseconds."""

    start: float
    seconds: float
    instruction: str


def read(folder: Path, text: str) -> dict[str, float]:
    """Seconds by kind, all kinds of KINDS, summed over devices and, on a CPU, threads.

    Args:
        folder: what was given to `jax.profiler.trace`; the newest trace in it counts.
        text: of the program, as `as_text()` of a compiled one gives it.

    Raises:
        ValueError: if there is no trace, or none of its instructions is in the text.
    """
    files = sorted(folder.glob("plugins/profile/*/*.trace.json.gz"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise ValueError(f"{folder} holds no *.trace.json.gz: give the folder that jax.profiler.trace got.")
    with gzip.open(files[-1]) as file:
        events = json.load(file)["traceEvents"]
    return by_kind(events, text)


def by_kind(events: Iterable[Mapping[str, Any]], text: str) -> dict[str, float]:
    """The same of the events of a trace."""
    kind = kinds(text)
    spent: dict[str, float] = defaultdict(float)
    for line in spans(events):
        for name, seconds in alone(line).items():
            spent[name] += seconds
    known = {name: seconds for name, seconds in spent.items() if name in kind}
    if not known:
        raise ValueError(
            f"None of the {len(spent)} instructions in the trace is one of the program's {len(kind)}: "
            "give the text of the program that ran."
        )
    return {k: sum(seconds for name, seconds in known.items() if kind[name] == k) for k in KINDS}


def lines(spent: Mapping[str, float]) -> list[str]:
    """A table: seconds, and the share of all."""
    total = sum(spent.values()) or 1.0
    return [f"  {kind:18s} {seconds:9.4f} s {seconds / total:6.1%}" for kind, seconds in spent.items()]


def spans(events: Iterable[Mapping[str, Any]]) -> Iterator[list[Span]]:
    """The instructions of each line. Where a device has a line of its instructions, the only one of it."""
    named, found = {}, defaultdict(list)
    for event in events:
        place = event.get("pid"), event.get("tid")
        if event.get("ph") == "M" and event["name"] == "thread_name":
            named[place] = event["args"]["name"]
        elif event.get("ph") == "X":
            found[place].append(event)
    listed = {pid for (pid, _), name in named.items() if name == "XLA Ops"}
    for place, of_line in found.items():
        whole = named.get(place) == "XLA Ops"
        if whole or place[0] not in listed:
            names = ((e, e.get("args", {}).get("hlo_op", e["name"] if whole else None)) for e in of_line)
            yield [Span(e["ts"], e.get("dur", 0.0) / 1e6, name) for e, name in names if name]


def alone(line: Iterable[Span]) -> dict[str, float]:
    """Seconds of each instruction without those that run inside it, as the body of a loop does."""
    spent: dict[str, float] = defaultdict(float)
    around: list[Span] = []
    for span in sorted(line, key=lambda s: (s.start, -s.seconds)):
        while around and around[-1].start + 1e6 * around[-1].seconds <= span.start:
            around.pop()
        if around:
            spent[around[-1].instruction] -= span.seconds
        spent[span.instruction] += span.seconds
        around.append(span)
    return spent


def kinds(text: str) -> dict[str, str]:
    """The kind of every instruction of a program."""
    module, files = hlo.parse(text), _files(text)
    within: dict[str, set[str]] = {}  # of a computation

    def of(instruction: Instruction) -> set[str]:
        found = {_own(instruction, files)}
        if instruction.opcode in _FUSED:
            found |= {kind for name in instruction.called for kind in within.get(name, ())}
        return found

    first: dict[str, str] = {}
    for computation in module.computations.values():  # those that are called come first
        sets = {name: of(instruction) for name, instruction in computation.instructions.items()}
        within[computation.name] = set().union(*sets.values())
        first |= {name: min(found, key=KINDS.index) for name, found in sets.items()}
    return first


def _own(instruction: Instruction, files: Mapping[str, str]) -> str:
    opcode = re.sub("-(start|done|update)$", "", instruction.opcode)
    if opcode in ("all-to-all", "ragged-all-to-all"):
        return "all-to-all"
    if opcode in _COLLECTIVES:
        return "other collectives"
    frame = re.search(r"stack_frame_id=(\d+)", instruction.rest)
    place = files.get(frame[1], "") if frame else ""
    kind = next((kind for kind, pattern in _FILES.items() if re.search(pattern, place)), "rest")
    if kind == "attention":
        return kind
    if opcode in ("dot", "convolution", "ragged-dot") or re.search(_PRODUCTS, instruction.rest):
        return "matmul"
    return "rest" if kind == "inside" else kind


def _files(text: str) -> dict[str, str]:
    """Of each stack frame the files of all calls that led to it, in one text."""
    tables = text[: text.find("\n%")]
    name = dict(
        re.findall(r'^(\d+) "(.*)"$', tables.partition("\nFileNames\n")[2].partition("\n\n")[0], re.M)
    )
    location = dict(re.findall(r"^(\d+) \{file_name_id=(\d+)", tables, re.M))
    frames = re.findall(r"^(\d+) \{file_location_id=(\d+)(?: parent_frame_id=(\d+))?\}", tables, re.M)
    # XLA prints the number of a parent one too high; the first frame, which has none, shows whether it does.
    shift = 1 if frames and frames[0][2] == frames[0][0] else 0
    chains: dict[str, str] = {}
    for frame, place, parent in frames:
        before = chains.get(str(int(parent or 0) - shift), "")
        chains[frame] = f"{before}\n{name.get(location.get(place, ''), '')}"
    return chains
