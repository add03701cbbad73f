"""Converts weights: `python -m tools.convert from-hf SRC DST` and `python -m tools.convert to-hf SRC DST`."""

import dataclasses
import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

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

_TYPES = {"from-hf": ("bfloat16", "float32"), "to-hf": ("bfloat16", "float32", "float8")}

_FLOAT32 = transfer.Form("F32", "float32", None, {})
_BFLOAT16 = transfer.Form("BF16", "bfloat16", None, {})
_FLOAT8 = released.quantization_json(fp8.BLOCK)

FORMS = {  # by --dtype and --scale_format
    **{("float32", scales): _FLOAT32 for scales in ("float32", "ue8m0")},
    **{("bfloat16", scales): _BFLOAT16 for scales in ("float32", "ue8m0")},
    ("float8", "float32"): transfer.Form("BF16", "bfloat16", fp8.as_it_is, {"quantization_config": _FLOAT8}),
    ("float8", "ue8m0"): transfer.Form(
        "BF16", "bfloat16", fp8.to_power_of_two, {"quantization_config": {**_FLOAT8, "scale_fmt": "ue8m0"}}
    ),
}

Item = TypeVar("Item")


def main(argv: list[str]) -> None:
    """Converts in the direction that the first argument names."""
    if len(argv) != 4 or argv[1] not in _TYPES:
        raise app.UsageError(
            f"{' '.join(argv[1:]) or 'Nothing'} was given, but this takes: {{from-hf|to-hf}} SRC DST."
        )
    if _DTYPE.value not in _TYPES[argv[1]]:
        raise app.UsageError(
            f"--dtype={_DTYPE.value} is not for {argv[1]}: choose {' or '.join(_TYPES[argv[1]])}."
        )
    logging.set_verbosity(logging.WARNING)
    source, destination = Path(argv[2]), Path(argv[3])
    try:
        if argv[1] == "from-hf":
            from_hf(source, destination, jnp.dtype(_DTYPE.value))
        else:
            form = FORMS[_DTYPE.value, _SCALES.value]
            to_hf(source, destination, form, bytes_of(_MAX_SHARD_SIZE.value))
    except (ValueError, OSError, CheckpointError) as error:
        sys.exit(f"Nothing was written. {error}")


def from_hf(source: Path, destination: Path, dtype: jnp.dtype) -> None:
    """Reads a released folder and writes a checkpoint of ours, or nothing.

    Raises:
        ValueError: naming the file, and the tensor or the key, that cannot be converted.
        FileExistsError: if the destination is not empty.
    """
    with shards.staged(destination) as stage:
        described = released.read(source / "config.json")
        importer = transfer.Importer(Folder(source), described.config, described.block)
        c = importer.config
        if TYPES[importer.widest()].itemsize > dtype.itemsize:
            print(f"Rounding {importer.widest()} weights to {dtype}; --dtype=float32 keeps them as they are.")
        record = {"converted": {"from": source.name, **described.token_ids}}
        model = dataclasses.asdict(c)
        with WeightWriter(stage, _abstract(c, dtype), config=record, model_config=model) as writer:
            pieces = transfer.ahead(importer.pieces(dtype))
            for piece in _shown(pieces, importer.size, lambda piece: piece.read):
                writer.write(piece.leaf, piece.at, piece.block)
        for file in tokenizer.files_beside(source):
            shutil.copyfile(file, stage / file.name)
    further = f", {size.mtp_parameters(c):,} more for multi-token prediction" if c.mtp_depth else ""
    print(f"{destination}: {size.parameters(c):,} parameters{further}.")


def to_hf(source: Path, destination: Path, form: transfer.Form, max_shard_size: int) -> None:
    """Reads a checkpoint of ours and writes a folder in the released form, or nothing.

    Args:
        max_shard_size: bytes of tensors in a file.

    Raises:
        ValueError: naming what cannot be converted.
        FileExistsError: if the destination is not empty.
    """
    with shards.staged(destination) as stage:
        reader = WeightReader(source)
        c = released.from_record(reader.meta.model_config)
        ids = {**_IDS, **_token_ids(reader, source)}
        config = {**released.to_json(c, form.torch_dtype, ids), **form.config_keys}
        reader.verify()
        slots = transfer.slots(c, form)
        total = sum(slot.size for slot in slots)
        bands = _shown(transfer.ahead(transfer.bands(reader.read, c, form)), total, lambda b: b[1].nbytes)
        shards.write(stage, slots, bands, max_shard_size)
        _write_json(stage / "config.json", config)
        _write_json(stage / "generation_config.json", ids)
        files = tokenizer.files_beside(source)
        for file in files:
            shutil.copyfile(file, stage / tokenizer.exported_name(file))
        if files and all(file.name != tokenizer.SETTINGS for file in files):
            text = Tokenizer.load(tokenizer.find(source))
            _write_json(stage / tokenizer.SETTINGS, _settings(text, c.max_length))
    print(f"{destination}: {len(slots):,} tensors, {decimal(total)}.")


def _settings(text: Tokenizer, max_length: int) -> dict[str, Any]:
    """What transformers has to know of a run's tokenizer.

    There is no bos_token: a run's documents follow each other's end, so that is what a text comes after.
    """
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": text.decode([text.eos]),
        "pad_token": text.decode([text.pad]),
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }


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


def _shown(items: Iterable[Item], total: int, size_of: Callable[[Item], int]) -> Iterator[Item]:
    """The same items, while a bar, or a line now and then, says how far they are."""
    console = Console()
    if not console.is_terminal:
        yield from _lines(items, total, size_of)
        return
    columns = (BarColumn(bar_width=None), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, expand=True) as bar:
        task = bar.add_task("", total=total)
        for item in items:
            yield item
            bar.advance(task, size_of(item))


def _lines(items: Iterable[Item], total: int, size_of: Callable[[Item], int]) -> Iterator[Item]:
    start = shown = time.monotonic()
    done = 0
    for item in items:
        yield item
        done += size_of(item)
        now = time.monotonic()
        if now - shown > _SECONDS:
            shown = now
            print(f"{decimal(done)} of {decimal(total)}, {decimal(int(done / (now - start)))}/s", flush=True)
    seconds = max(time.monotonic() - start, 1e-9)
    print(f"{decimal(done)} in {seconds:.1f} seconds, {decimal(int(done / seconds))}/s", flush=True)


def bytes_of(text: str) -> int:
    """A size as people write it: 5GB, 512MiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?I?)B?", text.strip().upper())
    if not match or match[2] not in _UNITS or (count := int(float(match[1]) * _UNITS[match[2]])) < 1:
        raise ValueError(f"--max_shard_size={text} is no size: write it as 5GB or 512MiB.")
    return count


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", "utf-8")


if __name__ == "__main__":
    app.run(main)
