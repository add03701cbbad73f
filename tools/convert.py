"""Converts weights: `python -m tools.convert from-hf SRC DST` and `python -m tools.convert to-hf SRC DST`."""

import dataclasses
import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from absl import app, flags, logging
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from dsv3_jax.config import Config
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.interop import config as released
from dsv3_jax.interop import fp8, shards, tokenizer, transfer
from dsv3_jax.interop.safetensors import TYPES, Folder
from dsv3_jax.model import size
from dsv3_jax.training.restore import CheckpointError
from dsv3_jax.training.weight_stream import WeightReader, WeightWriter

_DTYPE = flags.DEFINE_enum(
    "dtype",
    "bfloat16",
    ["bfloat16", "float32", "float8"],
    "The type of the result's weights; float8 is for to-hf only. The expert bias is always FP32.",
)
_MAX_SHARD_SIZE = flags.DEFINE_string("max_shard_size", "5GB", "to-hf: the most that a file holds.")
_SCALES = flags.DEFINE_enum(
    "scale_format", "float32", ["float32", "ue8m0"], "to-hf with float8: any scales, or powers of two."
)

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30}
_IDS = {"bos_token_id": 0, "eos_token_id": 1}  # as released, where nothing else is known
_SECONDS = 10.0  # between lines where there is no terminal

Item = TypeVar("Item")


class Direction(NamedTuple):
    """A command."""

    run: Callable[[Path, Path], None]
    types: tuple[str, ...]


def main(argv: list[str]) -> None:
    """Converts in the direction that the first argument names."""
    if len(argv) != 4 or argv[1] not in _DIRECTIONS:
        raise app.UsageError(
            f"{' '.join(argv[1:]) or 'Nothing'} was given, but this takes: {{from-hf|to-hf}} SRC DST."
        )
    direction = _DIRECTIONS[argv[1]]
    logging.set_verbosity(logging.WARNING)
    if _DTYPE.value not in direction.types:
        raise app.UsageError(
            f"--dtype={_DTYPE.value} is not for {argv[1]}: choose {' or '.join(direction.types)}."
        )
    try:
        direction.run(Path(argv[2]), Path(argv[3]))
    except (ValueError, OSError, CheckpointError) as error:
        sys.exit(f"Nothing was written. {error}")


def from_hf(source: Path, destination: Path) -> None:
    """Reads a released folder and writes a checkpoint of ours, or nothing.

    Raises:
        ValueError: naming the file, and the tensor or the key, that cannot be converted.
        FileExistsError: if the destination is not empty.
    """
    with shards.staged(destination) as stage:
        described = released.read(source / "config.json")
        importer = transfer.Importer(Folder(source), described.config, described.block)
        c, dtype = importer.config, jnp.dtype(_DTYPE.value)
        if TYPES[importer.widest()].itemsize > dtype.itemsize:
            print(
                f"Rounding {importer.widest()} weights to {dtype}; --dtype=float32 would keep them as "
                "they are."
            )
        record = {"converted": {"from": source.name, **described.token_ids}}
        model = dataclasses.asdict(c)
        with WeightWriter(stage, _abstract(c, dtype), config=record, model_config=model) as writer:
            pieces = transfer.ahead(importer.pieces(dtype))
            for piece in _shown(pieces, importer.size, lambda piece: piece.read):
                writer.write(piece.leaf, piece.at, piece.block)
        for file in tokenizer.files_beside(source):
            shutil.copyfile(file, stage / file.name)
    print(
        f"{destination}: {size.parameters(c):,} parameters, "
        f"{size.mtp_parameters(c) if c.mtp_depth else 0:,} more for MTP."
    )


def to_hf(source: Path, destination: Path) -> None:
    """Reads a checkpoint of ours and writes a folder in the released form, or nothing.

    Raises:
        ValueError: naming what cannot be converted.
        FileExistsError: if the destination is not empty.
    """
    form, most = _form(), _bytes(_MAX_SHARD_SIZE.value)
    with shards.staged(destination) as stage:
        reader = WeightReader(source)
        c = released.from_record(reader.meta.model_config)
        ids = {**_IDS, **_token_ids(reader, source)}
        slots = transfer.slots(c, form)
        config = released.to_json(c, form.torch_dtype, ids)
        if form.rounding is not None:
            config["quantization_config"] = (
                released.quantization_json(fp8.BLOCK) | _SCALE_FORMATS[_SCALES.value].keys
            )
        reader.verify()
        bands = transfer.ahead(transfer.bands(reader.read, c, form))
        total = sum(slot.size for slot in slots)
        shards.write(stage, slots, _shown(bands, total, lambda band: band[1].nbytes), most)
        _write_json(stage / "config.json", config)
        _write_json(stage / "generation_config.json", ids)
        for file in tokenizer.files_beside(source):
            shutil.copyfile(file, stage / tokenizer.exported_name(file))
    print(f"{destination}: {len(slots):,} tensors, {decimal(total)}.")


_DIRECTIONS = {
    "from-hf": Direction(from_hf, ("bfloat16", "float32")),
    "to-hf": Direction(to_hf, ("bfloat16", "float32", "float8")),
}


class _Scales(NamedTuple):
    rounding: fp8.Rounding
    keys: dict[str, str]  # that quantization_config has besides


_SCALE_FORMATS = {
    "float32": _Scales(fp8.as_it_is, {}),
    "ue8m0": _Scales(fp8.to_power_of_two, {"scale_fmt": "ue8m0"}),
}


def _form() -> transfer.Form:
    return {
        "bfloat16": transfer.Form("BF16", "bfloat16", None),
        "float32": transfer.Form("F32", "float32", None),
        "float8": transfer.Form("BF16", "bfloat16", _SCALE_FORMATS[_SCALES.value].rounding),
    }[_DTYPE.value]


def _abstract(c: Config, dtype: jnp.dtype) -> dict[str, Any]:
    """The tree that a checkpoint holds, weights in one type."""
    model = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), size.abstract(c))
    return {"model": model, "bias": jax.ShapeDtypeStruct((c.balanced_layers, c.experts), jnp.float32)}


def _token_ids(reader: WeightReader, source: Path) -> dict[str, Any]:
    """What a conversion recorded, or else what the tokenizer beside the checkpoint says."""
    recorded = reader.meta.config.get("converted")
    if recorded is not None:
        return {key: recorded[key] for key in _IDS if key in recorded}
    try:
        text = Tokenizer.load(tokenizer.find(source))
    except FileNotFoundError:
        return {}
    return {"eos_token_id": text.eos} | ({} if text.bos is None else {"bos_token_id": text.bos})


def _shown(items: Iterable[Item], total: int, bytes_of: Callable[[Item], int]) -> Iterator[Item]:
    """The same items, while a bar, or a line now and then, says how far they are."""
    console = Console()
    if not console.is_terminal:
        yield from _lines(items, total, bytes_of)
        return
    columns = (BarColumn(bar_width=None), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, expand=True) as bar:
        task = bar.add_task("", total=total)
        for item in items:
            yield item
            bar.advance(task, bytes_of(item))


def _lines(items: Iterable[Item], total: int, bytes_of: Callable[[Item], int]) -> Iterator[Item]:
    start = shown = time.monotonic()
    done = 0
    for item in items:
        yield item
        done += bytes_of(item)
        now = time.monotonic()
        if now - shown > _SECONDS:
            shown = now
            print(f"{decimal(done)} of {decimal(total)}, {decimal(int(done / (now - start)))}/s", flush=True)
    seconds = max(time.monotonic() - start, 1e-9)
    print(f"{decimal(done)} in {seconds:.1f} seconds, {decimal(int(done / seconds))}/s", flush=True)


def _bytes(text: str) -> int:
    """A size as people write it: 5GB, 512MiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?I?)B?", text.strip().upper())
    if not match or match[2] not in _UNITS or (count := int(float(match[1]) * _UNITS[match[2]])) < 1:
        raise ValueError(f"--max_shard_size={text} is no size: write it as 5GB or 512MiB.")
    return count


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", "utf-8")


if __name__ == "__main__":
    app.run(main)
