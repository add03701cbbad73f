"""Converts weights: `python -m tools.convert from-hf SRC DST` and `python -m tools.convert to-hf SRC DST`."""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from rich.filesize import decimal

from dsv3_jax.config import Config
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.interop import config as released
from dsv3_jax.interop import fp8, names, shards, stage, tokenizer, transfer
from dsv3_jax.interop.safetensors import TYPES, Folder
from dsv3_jax.model import size
from dsv3_jax.training.restore import CheckpointError
from dsv3_jax.training.weight_stream import WeightReader, WeightWriter
from tools.byte_progress import shown

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
_WORKERS = flags.DEFINE_integer(
    "workers", os.cpu_count() or 1, "Files converted at once; each holds some bands of 32 MB.", lower_bound=1
)

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30}
_IDS = {"bos_token_id": 0, "eos_token_id": 1}  # as released, where nothing else is known

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
            from_hf(source, destination, jnp.dtype(_DTYPE.value), _WORKERS.value)
        else:
            form = FORMS[_DTYPE.value, _SCALES.value]
            to_hf(source, destination, form, bytes_of(_MAX_SHARD_SIZE.value), _WORKERS.value)
    except FileExistsError as error:
        sys.exit(str(error))
    except OSError as error:
        sys.exit(f"{error}. Repeat the command when that is mended: it goes on from what is complete.")
    except (ValueError, CheckpointError) as error:
        sys.exit(f"Nothing was written. {error}")


def from_hf(source: Path, destination: Path, dtype: jnp.dtype, workers: int = 1) -> None:
    """Reads a released folder and writes a checkpoint of ours; `stage.staged` says what a failure leaves.

    Args:
        workers: files that are converted at once.

    Raises:
        ValueError: naming the file, and the tensor or the key, that cannot be converted.
        FileExistsError: if the destination is not empty, or begun from another source or type.
    """
    described = released.read(source / "config.json")
    folder = Folder(source)
    plan = {"source": _identity(source, folder), "dtype": str(dtype)}
    with stage.staged(destination, plan) as staged:
        importer = transfer.Importer(folder, described.config, described.block)
        c = importer.config
        if TYPES[importer.widest()].itemsize > dtype.itemsize:
            print(f"Rounding {importer.widest()} weights to {dtype}; --dtype=float32 keeps them as they are.")
        record = {"converted": {"from": source.name, **described.token_ids}}
        model = dataclasses.asdict(c)
        with WeightWriter(staged.path, _abstract(c, dtype), config=record, model_config=model) as writer:
            staged.keep(lambda file, digests: writer.adopt(importer.places(file), digests))
            with shown(importer.sizes, staged.done) as advance:

                def make(file: str) -> dict[str, list[int]]:
                    digests = _Sums()
                    for piece in importer.pieces(file, dtype):
                        digests.add(piece.leaf, writer.write(piece.leaf, piece.at, piece.block))
                        advance(piece.read)
                    return digests.as_json()

                staged.run(importer.sizes, make, workers)
        for file in tokenizer.files_beside(source):
            shutil.copyfile(file, staged.path / file.name)
    further = f", {size.mtp_parameters(c):,} more for multi-token prediction" if c.mtp_depth else ""
    print(f"{destination}: {size.parameters(c):,} parameters{further}.")


def to_hf(
    source: Path, destination: Path, form: transfer.Form, max_shard_size: int, workers: int = 1
) -> None:
    """Reads a checkpoint of ours and writes a folder in the released form, with SHA256SUMS of its shards.

    The digests of the source are verified as it is read. `stage.staged` says what a failure leaves.

    Args:
        max_shard_size: bytes of tensors in a file.
        workers: files that are written at once.

    Raises:
        ValueError: naming what cannot be converted.
        FileExistsError: if the destination is not empty, or begun from another source or form.
    """
    reader = WeightReader(source)
    c = released.from_record(reader.meta.model_config)
    ids = {**_IDS, **_token_ids(reader, source)}
    config = {**released.to_json(c, form.torch_dtype, ids), **form.config_keys}
    plan = {"source": reader.meta.to_json()["sha256"], "form": config, "max_shard_size": max_shard_size}
    slots = transfer.slots(c, form)
    files = shards.named(slots, max_shard_size)
    with stage.staged(destination, plan) as staged:
        staged.keep(lambda file, record: _sha256(staged.path / file) == record["sha256"])
        copies = {t.name for t in names.copies(c)}
        with shown({f: sum(s.size for s in own) for f, own in files.items()}, staged.done) as advance:

            def make(file: str) -> dict[str, Any]:
                wanted, digests = {slot.name for slot in files[file]}, _Sums()

                def read(t: names.Tensor, index: transfer.Index) -> np.ndarray:
                    block = reader.read(t.leaf, index)
                    if t.name in wanted and t.name not in copies:  # so that each element counts once
                        digests.add(t.leaf, reader.words(t.leaf, index, block))
                    return block

                bands = transfer.bands(read, wanted, c, form)
                shards.write(staged.path / file, files[file], _told(bands, advance))
                return {"sha256": _sha256(staged.path / file), "read": digests.as_json()}

            staged.run(files, make, workers)
        reader.compare(_Sums.total(reader.names, [record["read"] for record in staged.done.values()]))
        shards.write_index(staged.path, files)
        sums = "".join(f"{staged.done[file]['sha256']}  {file}\n" for file in files)
        (staged.path / "SHA256SUMS").write_text(sums, "utf-8")
        _write_json(staged.path / "config.json", config)
        _write_json(staged.path / "generation_config.json", ids)
        _copy_tokenizer(source, staged.path, c)
    print(f"{destination}: {len(slots):,} tensors, {decimal(sum(slot.size for slot in slots))}.")


def _copy_tokenizer(source: Path, destination: Path, c: Config) -> None:
    """With settings for those who read only these, where the source has none."""
    files = tokenizer.files_beside(source)
    for file in files:
        shutil.copyfile(file, destination / tokenizer.exported_name(file))
    if files and all(file.name != tokenizer.SETTINGS for file in files):
        text = Tokenizer.load(tokenizer.find(source))
        _write_json(destination / tokenizer.SETTINGS, _settings(text, c.max_length))


class _Sums:
    """Digests of parts of arrays, by name, modulo 2^32."""

    def __init__(self):
        self._words: dict[str, np.ndarray] = {}

    def add(self, name: str, words: Any) -> None:
        self._words[name] = self._words.get(name, np.zeros(2, np.uint32)) + np.asarray(words, np.uint32)

    def as_json(self) -> dict[str, list[int]]:
        return {name: words.tolist() for name, words in self._words.items()}

    @classmethod
    def total(cls, leaves: Iterable[str], parts: Iterable[dict[str, list[int]]]) -> dict[str, np.ndarray]:
        """The sums of parts; zero for a leaf that has none."""
        sums = cls()
        for leaf in leaves:
            sums.add(leaf, [0, 0])
        for part in parts:
            for name, words in part.items():
                sums.add(name, words)
        return sums._words


def _identity(source: Path, folder: Folder) -> dict[str, Any]:
    """What changes if any file of a released folder does: reading 700 GB for a digest would take too long."""
    files = {entry.file for entry in folder.entries.values()} | {source / "config.json"}
    return {f.name: [f.stat().st_size, f.stat().st_mtime_ns] for f in sorted(files)}


def _sha256(path: Path) -> str:
    """The digest of a file, or nothing if it is not there."""
    if not path.exists():
        return ""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _told(
    bands: Iterable[tuple[str, np.ndarray]], advance: Callable[[int], None]
) -> Iterator[tuple[str, np.ndarray]]:
    for name, band in bands:
        yield name, band
        advance(band.nbytes)


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
