"""What a run writes down: a JSON line a logged step, TensorBoard events, and the best its device could do."""

import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

Values = Mapping[str, Any]  # names to scalars: Python's, NumPy's or JAX's

# Dense BF16 FLOP/s of one JAX device, from the vendors' data sheets: Google Cloud's page of each TPU version;
# NVIDIA's of A100, H100, H200 and DGX B200, whose figures with sparsity are halved. A device kind takes the
# first row that it starts with, so narrower names come first. A TPU7x chip is two devices, each with half of
# the chip's 2307e12.
_PEAK_FLOPS = (
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),
    ("TPU v6 lite", 918e12),
    ("TPU v6e", 918e12),
    ("TPU7x", 1153.5e12),
    ("NVIDIA A100", 312e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H100 NVL", 835e12),
    ("NVIDIA H100", 989e12),
    ("NVIDIA GH200", 989e12),
    ("NVIDIA H200 NVL", 835e12),
    ("NVIDIA H200", 989e12),
    ("NVIDIA B200", 2250e12),
)


class MetricsLog:
    """The lines of a metrics.jsonl file; a killed and resumed run has those of an uninterrupted one.

    Floats keep every digit (an FP32 value is written as the FP64 number it equals), so that losses can be
    compared bit for bit. JSON knows no NaN: values that are not finite are the strings "nan", "inf" and
    "-inf", which `float` reads. For the promise to hold, write all lines of a step before saving it, and
    call `resume` before the first line.
    """

    def __init__(self, path: Path):
        """Makes the folder; the file appears with its first line."""
        self._path = Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, step: int, values: Values) -> None:
        """Appends a line, in one piece."""
        line = {"step": step} | {name: _encoded(name, value) for name, value in values.items()}
        with open(self._path, "ab", buffering=0) as file:
            file.write(json.dumps(line, allow_nan=False).encode() + b"\n")

    def read(self) -> list[dict[str, Any]]:
        """All lines so far, non-finite numbers as floats again."""
        return [line for _, line in self._lines()]

    def resume(self, step: int) -> None:
        """Drops lines after a step, and a last line that a kill tore, by one atomic replacement."""
        if self._path.exists():
            kept = [raw for raw, line in self._lines() if line["step"] <= step]
            write_atomically(self._path, b"".join(kept))

    def _lines(self) -> list[tuple[bytes, dict[str, Any]]]:
        if not self._path.exists():
            return []
        raw = self._path.read_bytes().splitlines(keepends=True)
        found = []
        for number, text in enumerate(raw, start=1):
            try:
                if not text.endswith(b"\n"):
                    raise ValueError("the line has no end")
                line = json.loads(text)
                found.append((text, {"step": int(line["step"])} | {k: _decoded(v) for k, v in line.items()}))
            except (ValueError, TypeError, KeyError) as error:
                if number < len(raw):
                    raise ValueError(
                        f"{self._path}:{number}: {text[:80]!r} is no metrics line ({error}); "
                        "delete the line, or move the file away to start a new one."
                    ) from None
        return found


class EventLog:
    """TensorBoard events of the same values; events after the step resumed from are hidden from view."""

    def __init__(self, directory: Path, step: int):
        """Opens a new event file, after a step (0 at the start of a run)."""
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise ModuleNotFoundError(
                "TensorBoard events need the package tensorboardX, which is not installed: "
                "run pip install 'dsv3-jax[tensorboard]', or train without them."
            ) from None
        self._writer = SummaryWriter(str(directory), purge_step=step + 1)

    def write(self, step: int, values: Values) -> None:
        """Adds a point to the curve of each number."""
        for name, value in values.items():
            if not isinstance(value, str):
                self._writer.add_scalar(name, np.asarray(value).item(), step)

    def close(self) -> None:
        """Writes out what is still in memory."""
        self._writer.close()


def peak_flops(device_kind: str) -> float | None:
    """Dense BF16 FLOP/s of a device of this kind, or None where no data sheet says so, as for CPUs."""
    return next((flops for kind, flops in _PEAK_FLOPS if device_kind.startswith(kind)), None)


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces a file so that readers and kills see the old content or the new, never a part."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # before the rename, or a power cut could leave an empty file
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _encoded(name: str, value: Any) -> Any:
    if isinstance(value, str):
        return value
    array = np.asarray(value)
    if array.ndim:
        raise ValueError(f"Metric {name} has shape {array.shape}, but a line holds scalars: reduce it first.")
    scalar = array.item()
    return str(scalar) if isinstance(scalar, float) and not math.isfinite(scalar) else scalar


def _decoded(value: Any) -> Any:
    return float(value) if value in ("nan", "inf", "-inf") else value
