"""Streams of weights between released tensors and our leaves, in bands that bound the memory."""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from dsv3_jax.config import Config
from dsv3_jax.interop import fp8, names
from dsv3_jax.interop.names import Storage, Tensor
from dsv3_jax.interop.safetensors import TYPES, BadFile, Folder
from dsv3_jax.interop.shards import Slot

_BAND = 32 << 20  # bytes of a band in FP32
_SHOWN = 20  # problems listed before the rest is only counted

_FP8 = "F8_E4M3"
_BF16, _F32 = TYPES["BF16"], TYPES["F32"]

_log = logging.getLogger(__name__)

Index = tuple[int | slice, ...]


class Piece(NamedTuple):
    """A block of one of our leaves."""

    leaf: str
    at: Index
    block: np.ndarray
    read: int  # bytes of the source that it took


class Form(NamedTuple):
    """How exported weights are stored; the expert bias is FP32 in every form."""

    dtype: str  # a key of TYPES, for tensors that are not FP8
    torch_dtype: str
    rounding: fp8.Rounding | None  # of block scales, or None for no FP8
    config_keys: Mapping[str, Any]  # that config.json has for this form


class Importer:
    """A released checkpoint whose tensors were found to be those of its configuration."""

    def __init__(self, source: Folder, c: Config, block: tuple[int, int] | None):
        """Checks everything that headers say.

        Where the configuration announces multi-token prediction but no such tensor is there (transformers
        saves none), the main model is taken alone, with a warning.

        Raises:
            BadFile: with a line for each tensor that is missing, unknown, or of another shape or type.
        """
        self.source, self.block = source, block or (fp8.BLOCK, fp8.BLOCK)
        self.config = _without_absent_mtp(source, c)
        self._tensors = {t.name: t for t in names.tensors(self.config)}
        self._copies = {t.name: t for t in names.copies(self.config)}
        self._by_file: dict[str, list[str]] = {}
        for name, entry in source.entries.items():
            self._by_file.setdefault(entry.file.name, []).append(name)
        problems = [*self._missing(), *self._unfit(fp8_announced=block), *self._unknown()]
        if problems:
            more = len(problems) - _SHOWN
            tail = [f"... and {more} more."] if more > 0 else []
            raise BadFile("\n".join([*problems[:_SHOWN], *tail]))

    @property
    def sizes(self) -> dict[str, int]:
        """The files, and the bytes of tensors in each."""
        entries = self.source.entries
        return {
            file: sum(_nbytes(entries[name].shape, entries[name].dtype) for name in own)
            for file, own in sorted(self._by_file.items())
        }

    def widest(self) -> str:
        """The type of the widest weight, the expert bias apart."""
        stored = (t for t in self._tensors.values() if t.kind.storage is not Storage.EXACT)
        return max({self.source.entries[t.name].dtype for t in stored}, key=lambda d: TYPES[d].itemsize)

    def pieces(self, file: str, dtype: np.dtype) -> Iterator[Piece]:
        """The weights of one file in the given type, the expert bias in FP32.

        Raises:
            BadFile: at a value that is not finite, a scale that is not above zero, or a copy that differs
                from what it copies.
        """
        for name in self._within(file):
            if name in self._tensors:
                yield from self._converted(self._tensors[name], dtype)
            elif name in self._copies:
                self._check_copy(self._copies[name])

    def places(self, file: str) -> Iterator[tuple[str, Index]]:
        """Where `pieces` puts the weights of one file: the leaf and the index of each block."""
        for name in self._within(file):
            if (t := self._tensors.get(name)) is not None:
                for rows in _bands(t.shape, self.block[0]):
                    yield t.leaf, _place(t, rows)

    def _within(self, file: str) -> list[str]:
        """The tensors of one file, to read forwards."""
        return sorted(self._by_file[file], key=lambda name: self.source.entries[name].start)

    def _converted(self, t: Tensor, dtype: np.dtype) -> Iterator[Piece]:
        target = _F32 if t.kind.storage is Storage.EXACT else dtype
        for rows in _bands(t.shape, self.block[0]):
            raw = self.source.read(t.name, rows)
            wide = self._dequantised(t, raw, rows) if raw.dtype == fp8.E4M3 else raw
            block = _cast(wide, target)
            if not _finite(block):
                raise BadFile(
                    f"The tensor {t.name} in {self._file(t.name)} is NaN or infinite as {target} within rows "
                    f"{rows.start}..{rows.stop}; the file is damaged or its training failed."
                )
            placed = np.ascontiguousarray(t.kind.layout.turn(block))
            yield Piece(t.leaf, _place(t, rows), placed, raw.nbytes)

    def _dequantised(self, t: Tensor, raw: np.ndarray, rows: slice) -> np.ndarray:
        first, last = rows.start // self.block[0], fp8.blocks(rows.stop, self.block[0])
        scale = self.source.read(t.scale, slice(first, last)).astype(np.float32)
        if not fp8.usable(scale):
            raise BadFile(
                f"The tensor {t.scale} in {self._file(t.scale)} has scales that are not finite or not "
                "above zero, within "
                f"rows {first}..{last}; the file is damaged."
            )
        return fp8.dequantise(raw, scale, self.block)

    def _check_copy(self, t: Tensor) -> None:
        original = next(o.name for o in self._tensors.values() if o.leaf == t.leaf)
        for rows in _bands(t.shape, 1):
            if self.source.read(t.name, rows).tobytes() != self.source.read(original, rows).tobytes():
                raise BadFile(
                    f"The tensor {t.name} in {self._file(t.name)} differs from {original}, which it "
                    "must copy because both "
                    "are one in our model: remove it from the checkpoint to use the shared one."
                )

    def _missing(self) -> Iterator[str]:
        for name in self._tensors:
            if name not in self.source.entries:
                yield f"The tensor {name} is missing from {self.source.listing}."

    def _unfit(self, fp8_announced: tuple[int, int] | None) -> Iterator[str]:
        for t in (*self._tensors.values(), *self._copies.values()):
            entry = self.source.entries.get(t.name)
            if entry is None:
                continue
            if entry.shape != t.shape:
                yield (
                    f"The tensor {t.name} in {entry.file} has the shape {list(entry.shape)}, but the "
                    "configuration gives "
                    f"{list(t.shape)}."
                )
            elif entry.dtype == _FP8 and len(t.shape) == 2 and t.name in self._tensors:
                yield from (
                    self._unfit_scale(t)
                    if fp8_announced
                    else (
                        f"The tensor {t.name} in {entry.file} is FP8, but config.json has no "
                        "quantization_config.",
                    )
                )
            elif entry.dtype not in ("BF16", "F32"):
                yield f"The tensor {t.name} in {entry.file} is {entry.dtype}, where BF16 or F32 is needed."

    def _unfit_scale(self, t: Tensor) -> Iterator[str]:
        scale, need = self.source.entries.get(t.scale), _scale_shape(t.shape, self.block)
        if scale is None:
            yield f"The tensor {t.scale} is missing from {self.source.listing}, though {t.name} is FP8."
        elif scale.shape != need or scale.dtype not in ("F32", "F8_E8M0"):
            yield (
                f"The tensor {t.scale} in {scale.file} is {scale.dtype}{list(scale.shape)}, but F32 "
                f"or F8_E8M0 {list(need)} "
                f"is needed for blocks of {self.block[0]} x {self.block[1]}."
            )

    def _unknown(self) -> Iterator[str]:
        scales = {t.scale for t in self._tensors.values() if self._type(t.name) == _FP8}
        known = self._tensors.keys() | self._copies.keys() | scales
        for name, entry in self.source.entries.items():
            if name not in known and not names.is_ignored(name):
                yield f"The tensor {name} in {entry.file} has no place in the model that config.json "
                "describes."

    def _type(self, name: str) -> str | None:
        entry = self.source.entries.get(name)
        return entry and entry.dtype

    def _file(self, name: str) -> str:
        return str(self.source.entries[name].file)


def slots(c: Config, form: Form) -> list[Slot]:
    """The released tensors of a configuration as a form stores them, in the order of `bands`."""
    out = []
    for t in _exported(c):
        if _in_blocks(t, form):
            out.append(Slot(t.name, _FP8, t.shape))
            out.append(Slot(t.scale, "F32", _scale_shape(t.shape, (fp8.BLOCK, fp8.BLOCK))))
        else:
            out.append(Slot(t.name, "F32" if t.kind.storage is Storage.EXACT else form.dtype, t.shape))
    return out


def bands(
    read: Callable[[Tensor, Index], np.ndarray], wanted: Collection[str], c: Config, form: Form
) -> Iterator[tuple[str, np.ndarray]]:
    """The wanted ones of the released tensors of a model, band by band.

    Args:
        read: gives the block of a tensor's leaf at an index.
        wanted: names; a scale may be wanted without its weight.

    Raises:
        ValueError: at a value that is not finite in the form's type.
    """
    for t in _exported(c):
        if t.name not in wanted and t.scale not in wanted:
            continue
        scales = []
        for rows in _bands(t.shape, fp8.BLOCK):
            block = t.kind.layout.turn(read(t, _place(t, rows)))
            if _in_blocks(t, form):
                assert form.rounding is not None
                block, scale = fp8.quantise(_checked(t, block, _F32), form.rounding)
                scales.append(scale)
            else:
                block = _checked(t, block, _F32 if t.kind.storage is Storage.EXACT else TYPES[form.dtype])
            if t.name in wanted:
                yield t.name, block
        if t.scale in wanted:
            yield t.scale, np.concatenate(scales)


def _without_absent_mtp(source: Folder, c: Config) -> Config:
    prefixes = tuple(names.mtp_prefix(c, i) for i in range(c.mtp_depth))
    if not prefixes or any(n.startswith(prefixes) and not names.is_ignored(n) for n in source.entries):
        return c
    _log.warning(
        "%s announces %d MTP layers but has no tensor of them: importing the main model alone, with "
        "mtp_depth=0.",
        source.directory,
        c.mtp_depth,
    )
    return replace(c, mtp_depth=0)


def _exported(c: Config) -> Iterator[Tensor]:
    yield from names.tensors(c)
    yield from names.copies(c)


def _place(t: Tensor, rows: slice) -> Index:
    """Where rows of a released tensor are in its leaf."""
    return (*t.at, *t.kind.layout.place(rows, t.shape[0]))


def _in_blocks(t: Tensor, form: Form) -> bool:
    return form.rounding is not None and t.kind.storage is Storage.BLOCKS


def _scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    return tuple(fp8.blocks(n, b) for n, b in zip(shape, block, strict=True))


def _bands(shape: tuple[int, ...], step: int) -> Iterator[slice]:
    """Rows in bands of a bounded size that begin at multiples of `step`.

    They are as even as that allows: then the bands of two tensors that share a leaf seldom share a chunk.
    """
    row = 4 * int(np.prod(shape[1:]))
    most = max(1, _BAND // (row * step)) * step
    rows = fp8.blocks(fp8.blocks(shape[0], fp8.blocks(shape[0], most)), step) * step
    for start in range(0, shape[0], rows):
        yield slice(start, min(start + rows, shape[0]))


def _nbytes(shape: tuple[int, ...], dtype: str) -> int:
    return int(np.prod(shape, dtype=np.int64)) * TYPES[dtype].itemsize


def _cast(block: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """To another type, rounding to nearest; what does not fit becomes infinite and is refused after."""
    with np.errstate(over="ignore", invalid="ignore"):
        return block.astype(dtype, copy=False)


def _checked(t: Tensor, block: np.ndarray, dtype: np.dtype) -> np.ndarray:
    out = _cast(block, dtype)
    if not _finite(out):
        raise ValueError(
            f"The array {t.leaf}{list(t.at)} is NaN or infinite as {dtype}, so {t.name} cannot be "
            "exported: choose another "
            "checkpoint, or --dtype=float32 if only BF16 is too narrow."
        )
    return out


def _finite(block: np.ndarray) -> bool:
    """Whether all values are finite, from their exponents: ml_dtypes tests elements one by one."""
    bits, exponent = (
        (block.view(np.uint16), 0x7F80) if block.dtype == _BF16 else (block.view(np.uint32), 0x7F800000)
    )
    return not np.any((bits & exponent) == exponent)
