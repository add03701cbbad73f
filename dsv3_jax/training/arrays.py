"""One array of a checkpoint as a zarr3 directory: opened with suspicion, read shard by shard."""

import json
import math
import os
import stat
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from jax import P
from jax.sharding import NamedSharding

from dsv3_jax.training.manifest import Damaged, Leaf

_IN_FLIGHT = 2 << 30  # bytes of host memory that reads under way may need
_MAX_HEADER = 1 << 20  # bytes of one array's zarr.json

READING = {"read": True, "write": False}
WRITING = {"read": True, "write": True}

_Span = tuple[tuple[int, int], ...]  # first element and end along each axis


class _Reading(NamedTuple):
    """An array on its way from disk to the devices."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    sharding: jax.sharding.Sharding
    spans: dict[Any, _Span]  # of each local device
    requests: dict[_Span, Any]  # None where there is nothing to read
    size: int  # bytes


def read(
    item_directory: Path, leaves: Mapping[str, Leaf], wanted: Mapping[str, Any], row: int | None = None
) -> dict[str, jax.Array]:
    """Arrays of an item, laid out as the wanted abstract arrays say; a process reads only its own shards.

    Args:
        leaves: what is stored, already checked against `wanted`.
        wanted: abstract arrays; one without a sharding is replicated over the mesh that is set.
        row: along the first axis, of which each array then has one; None for all.

    Raises:
        Damaged: if an array is missing, unreadable or not what `leaves` says; digests are not checked here.
    """
    arrays: dict[str, jax.Array] = {}
    under_way: deque[_Reading] = deque()
    for name, abstract in wanted.items():
        under_way.append(_start(item_directory, name, leaves[name], _concrete(abstract.sharding), row))
        while sum(r.size for r in under_way) > _IN_FLIGHT:
            _finish(under_way.popleft(), arrays)
    while under_way:
        _finish(under_way.popleft(), arrays)
    return arrays


def open_array(directory: Path, leaf: Leaf, access: Mapping[str, Any] = READING) -> ts.TensorStore:
    """An array, after its header was found to say exactly what is expected.

    Args:
        access: `READING`, or `WRITING` for an array that is not complete yet.

    Raises:
        Damaged: if it is missing, unreadable, a link, or has another shape or type.
    """
    header = directory / "zarr.json"
    try:
        if directory.is_symlink() or not stat.S_ISREG(header.lstat().st_mode):
            raise Damaged(f"{header} is a link or no file.")
        if header.stat().st_size > _MAX_HEADER:
            raise Damaged(f"{header} is larger than {_MAX_HEADER} bytes.")
        _check_header(header, json.loads(header.read_text(encoding="utf-8")), leaf)
        return ts.open(_spec(directory), open=True, **access).result()
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, Damaged):
            raise
        raise Damaged(f"{header} cannot be opened: {_first_line(error)}") from error


def create_array(directory: Path, leaf: Leaf, chunk: tuple[int, ...]) -> ts.TensorStore:
    """A new array on disk, in files of one chunk each that carry their own checksum."""
    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    if jnp.dtype(leaf.dtype).itemsize == 1:
        codecs[0] = {"name": "bytes"}
    metadata = {
        "shape": list(leaf.shape),
        "data_type": leaf.dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
        "codecs": codecs,
    }
    return ts.open({**_spec(directory), "metadata": metadata}, create=True, delete_existing=True).result()


def refuse_links(directory: Path) -> None:
    """Refuses a directory that contains anything but directories and plain files: reading must not leave it.

    Raises:
        Damaged: naming the link, pipe or device, or the directory if it cannot be listed.
    """
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    refuse_links(Path(entry.path))
                elif not entry.is_file(follow_symlinks=False):
                    raise Damaged(f"{entry.path} is a link or a device; a checkpoint holds plain files only.")
    except OSError as error:
        raise Damaged(f"{directory} cannot be listed: {error}.") from error


def read_block(array: ts.TensorStore, index: Any, name: str) -> np.ndarray:
    """A part of an array in host memory.

    Raises:
        Damaged: if a file of it cannot be decoded.
    """
    return _result(array[index].read(), name)


def _spec(directory: Path) -> dict[str, Any]:
    return {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{directory.resolve()}/"}}


def _check_header(path: Path, header: Any, leaf: Leaf) -> None:
    """What tensorstore would accept but an array of ours never is."""
    chunk = header["chunk_grid"]["configuration"]["chunk_shape"]
    if header["shape"] != list(leaf.shape) or header["data_type"] != leaf.dtype:
        raise Damaged(
            f"{path} describes {header['data_type']}{header['shape']} "
            f"but {leaf.dtype}{list(leaf.shape)} was saved."
        )
    # A chunk is decoded as a whole, so its size is memory that a few bytes of text could claim.
    if any(c > max(n, 1) for c, n in zip(chunk, leaf.shape, strict=True)) or header.get(
        "storage_transformers"
    ):
        raise Damaged(
            f"{path} describes chunks larger than the array, or a transformation that is never written."
        )


def _start(
    item_directory: Path, name: str, leaf: Leaf, sharding: jax.sharding.Sharding, row: int | None
) -> _Reading:
    """Requests each distinct shard of this process once."""
    shape, dtype = leaf.shape if row is None else (1, *leaf.shape[1:]), jnp.dtype(leaf.dtype)
    spans = {d: _span(i, shape) for d, i in sharding.addressable_devices_indices_map(shape).items()}
    requests: dict[_Span, Any] = dict.fromkeys(spans.values())
    if 0 not in shape:
        array = open_array(item_directory / name, leaf)
        if row is not None:
            array = array[ts.d[0].translate_by[-row]]  # the row's number becomes 0
        requests = {span: array[tuple(slice(*s) for s in span)].read() for span in requests}
    size = sum(math.prod(stop - start for start, stop in span) for span in requests)
    return _Reading(name, shape, dtype, sharding, spans, requests, size * dtype.itemsize)


def _finish(reading: _Reading, arrays: dict[str, jax.Array]) -> None:
    """Waits for an array's shards and puts them on their devices."""
    parts = {
        span: np.zeros([stop - start for start, stop in span], reading.dtype)
        if request is None
        else _result(request, reading.name)
        for span, request in reading.requests.items()
    }
    shards = [jax.device_put(parts[span], device) for device, span in reading.spans.items()]
    arrays[reading.name] = jax.make_array_from_single_device_arrays(reading.shape, reading.sharding, shards)


def _span(index: Any, shape: tuple[int, ...]) -> _Span:
    return tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))


def _concrete(sharding: Any) -> jax.sharding.Sharding:
    """Abstract evaluation leaves shardings on an abstract mesh, or none on scalars that a library made."""
    mesh = jax.sharding.get_mesh()
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, jax.sharding.Mesh):
        return sharding
    if isinstance(sharding, NamedSharding) or sharding is None:
        spec = P() if sharding is None else sharding.spec
        if not mesh.empty:
            return NamedSharding(mesh, spec)
        if all(entry is None for entry in spec):
            return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        raise ValueError(
            f"An array laid out as {spec} needs a mesh: restore it under `with jax.set_mesh(mesh)`."
        )
    return sharding


def _result(request: Any, name: str) -> np.ndarray:
    try:
        return np.asarray(request.result())
    except (OSError, ValueError, RuntimeError) as error:
        raise Damaged(f"The array {name} cannot be read: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    text = str(error) or type(error).__name__
    return text.splitlines()[0][:300]
