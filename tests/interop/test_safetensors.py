"""The reader agrees with the safetensors package and refuses everything damaged; the writer is read by it."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from dsv3_jax.interop import safetensors, shards
from dsv3_jax.interop.safetensors import INDEX, TYPES, BadFile, Folder
from dsv3_jax.interop.shards import Slot
from dsv3_jax.interop.transfer import Importer
from tests.interop import released
from tests.interop.released import TINY


def values(dtype, shape=(3, 5), seed=0):
    raw = np.random.default_rng(seed).integers(0, 2, (*shape, TYPES[dtype].itemsize), np.uint8)
    return raw.reshape(*shape[:-1], -1).view(TYPES[dtype]).reshape(shape)


def raw_file(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(start, end, shape=None, dtype="U8"):
    return {"dtype": dtype, "shape": shape or [end - start], "data_offsets": [start, end]}


@pytest.mark.parametrize("dtype", TYPES)
def test_every_type_is_read_as_the_package_wrote_it(tmp_path, dtype):
    array = values(dtype)
    save_file({"a": array, "b": array[:1]}, tmp_path / "model.safetensors")
    folder = Folder(tmp_path)
    for rows in (slice(0, 3), slice(1, 2), slice(2, 3)):
        assert folder.read("a", rows).tobytes() == array[rows].tobytes()
    assert folder.entries["b"].shape == (1, 5) and folder.entries["b"].dtype == dtype


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["F32", "BF16", "F8_E4M3"]), st.integers(1, 9), st.integers(1, 9)),
        min_size=1,
        max_size=12,
    ),
    st.integers(1, 300),
)
def test_shards_hold_all_tensors_in_order_within_the_size_and_aligned(tmp_path_factory, tensors, most):
    directory = tmp_path_factory.mktemp("shards")
    arrays = {f"t{i}": values(d, (r, c), i) for i, (d, r, c) in enumerate(tensors)}
    slots = [Slot(n, d, a.shape) for (n, a), (d, _, _) in zip(arrays.items(), tensors, strict=True)]
    bands = ((name, array[row : row + 1]) for name, array in arrays.items() for row in range(len(array)))
    files = shards.named(slots, most)
    for file, own in files.items():
        shards.write(directory / file, own, itertools.islice(bands, sum(slot.shape[0] for slot in own)))
    shards.write_index(directory, files)
    found = released.bytes_by_tensor(directory)
    assert {n: data for n, (_, _, data) in found.items()} == {n: a.tobytes() for n, a in arrays.items()}
    index = json.loads((directory / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in arrays.values())
    assert list(index["weight_map"]) == list(arrays)
    for part in shards.split(slots, most):
        assert len(part) == 1 or sum(slot.size for slot in part) <= most
    for name, place in Folder(directory).entries.items():
        assert place.start % arrays[name].itemsize == 0


def test_the_package_reads_what_the_writer_wrote(tmp_path):
    arrays = {"x": values("F32"), "y": values("BF16", (2, 2))}
    slots = [Slot("y", "BF16", (2, 2)), Slot("x", "F32", (3, 5))]
    shards.write(tmp_path / "x.safetensors", slots, ((n, arrays[n]) for n in ("y", "x")))
    with safe_open(tmp_path / "x.safetensors", "np") as f:
        assert f.metadata() == {"format": "pt"}
        for name, array in arrays.items():
            assert f.get_tensor(name).tobytes() == array.tobytes()


BAD_HEADERS = {
    "length_beyond_the_file": (b"\xff" * 8 + b"{}", "truncated"),
    "length_of_2_to_62": ((1 << 62).to_bytes(8, "little") + b"{}", "truncated"),
    "empty_file": (b"", "truncated"),
    "no_json": (b"\x02" + b"\0" * 7 + b"{x", "JSON"),
    "no_utf8": (b"\x02" + b"\0" * 7 + b"\xff\xfe", "JSON"),
    "a_list": (b"\x02" + b"\0" * 7 + b"[]", "list"),
}


@pytest.mark.parametrize(("data", "named"), BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_a_file_without_a_header_is_refused_by_name(tmp_path, data, named):
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(BadFile, match=rf"model\.safetensors.*{named}"):
        Folder(tmp_path)


BAD_ENTRIES = {
    "overlap": ({"a": entry(0, 4), "b": entry(2, 8)}, "begins at byte 2"),
    "gap": ({"a": entry(0, 4), "b": entry(5, 8)}, "begins at byte 5"),
    "beyond_the_end": ({"a": entry(0, 9)}, "ends at byte 9"),
    "data_of_nobody": ({"a": entry(0, 7)}, "1 bytes of data"),
    "size_other_than_shape": ({"a": entry(0, 8, [9])}, "9 bytes"),
    "negative": ({"a": entry(-8, 0, [8])}, "cannot be"),
    "huge_shape": ({"a": entry(0, 8, [1 << 62, 4])}, "cannot be"),
    "boolean_shape": ({"a": entry(0, 8, [True, 8])}, "cannot be"),
    "unknown_type": ({"a": entry(0, 8, dtype="F3")}, "unknown type 'F3'"),
    "further_key": ({"a": entry(0, 8) | {"run": "me"}}, "something else"),
    "no_object": ({"a": 7}, "something else"),
    "bad_metadata": ({"a": entry(0, 8), "__metadata__": {"x": 1}}, "__metadata__"),
    "duplicate": (b'{"a":%s,"a":%s}' % ((json.dumps(entry(0, 8)).encode(),) * 2), "'a' occurs twice"),
}


@pytest.mark.parametrize(("header", "named"), BAD_ENTRIES.values(), ids=BAD_ENTRIES)
def test_an_entry_that_cannot_be_is_refused_by_file(tmp_path, header, named):
    raw_file(tmp_path / "model.safetensors", header, bytes(8))
    with pytest.raises(BadFile, match=f"{named}") as error:
        Folder(tmp_path)
    assert str(tmp_path / "model.safetensors") in str(error.value)


@pytest.fixture
def sharded(tmp_path):
    for name in ("a", "b"):
        save_file({name: values("F32")}, tmp_path / f"{name}.safetensors")
    return tmp_path


def index(directory, weights):
    (directory / INDEX).write_text(json.dumps({"weight_map": weights}))


BAD_INDICES = {
    "parent": ({"a": "../a.safetensors"}, r"\.\./a\.safetensors"),
    "absolute": ({"a": "/etc/a.safetensors"}, "/etc/a"),
    "hidden": ({"a": ".a.safetensors"}, "no name"),
    "other_suffix": ({"a": "a.bin"}, "a.bin"),
    "no_text": ({"a": 1}, "no name"),
    "missing_files": ({"a": "a.safetensors", "x": "x.safetensors", "y": "y.safetensors"}, "x.*y.safetensors"),
    "unlisted_file": ({"a": "a.safetensors"}, "does not list b.safetensors"),
    "wrong_file": ({"a": "b.safetensors", "b": "a.safetensors"}, "tensor a into b.safetensors"),
    "unlisted_tensor": ({"a": "a.safetensors", "x": "b.safetensors"}, "tensor x"),
    "nothing": ({}, "no weight_map"),
}


@pytest.mark.parametrize(("weights", "named"), BAD_INDICES.values(), ids=BAD_INDICES)
def test_an_index_that_disagrees_or_points_elsewhere_is_refused(sharded, weights, named):
    index(sharded, weights)
    with pytest.raises(BadFile, match=named) as error:
        Folder(sharded)
    assert INDEX in str(error.value)


def test_a_tensor_that_the_index_leaves_out_is_named(sharded):
    save_file({"b": values("F32"), "c": values("F32")}, sharded / "b.safetensors")
    index(sharded, {"a": "a.safetensors", "b": "b.safetensors"})
    with pytest.raises(BadFile, match="tensor c, which .*index"):
        Folder(sharded)


def test_a_tensor_in_two_shards_is_refused(sharded):
    save_file({"a": values("F32"), "b": values("F32")}, sharded / "b.safetensors")
    index(sharded, {"a": "a.safetensors", "b": "b.safetensors"})
    with pytest.raises(BadFile, match="tensor a is in .* and again in"):
        Folder(sharded)


def test_shards_without_an_index_are_refused(sharded):
    with pytest.raises(BadFile, match="a.safetensors, b.safetensors but no model.safetensors.index.json"):
        Folder(sharded)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_a_pickle_is_named_and_not_opened(tmp_path, name):
    (tmp_path / name).mkdir()  # would raise if it were opened
    with pytest.raises(BadFile, match=f"{name} is a pickle"):
        Folder(tmp_path)


def test_a_file_cut_after_it_was_opened_is_refused_by_tensor(tmp_path):
    save_file({"a": values("F32")}, tmp_path / "model.safetensors")
    folder = Folder(tmp_path)
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:-1])
    with pytest.raises(BadFile, match="ends within the tensor a"):
        folder.read("a", slice(0, 3))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("fuzz") / "released"
    released.write(directory, released.tensors(TINY), released.config(TINY))
    return directory


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_corrupted_header_is_refused_or_harmless(whole, tmp_path_factory, data):
    """No corruption changes a name, shape, type or place unnoticed, or ends in an error that is not ours."""
    original = (whole / "model.safetensors").read_bytes()
    length = 8 + int.from_bytes(original[:8], "little")
    corrupt = bytearray(original)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, length - 1))
        match data.draw(st.sampled_from(["flip", "digit", "cut", "insert"])):
            case "flip":
                corrupt[at] ^= data.draw(st.integers(1, 255))
            case "digit":
                corrupt[at] = data.draw(st.sampled_from(b'0123456789[]{},:"'))
            case "cut":
                del corrupt[at : at + data.draw(st.integers(1, 40))]
            case "insert":
                corrupt[at:at] = data.draw(st.binary(min_size=1, max_size=8))
    path = tmp_path_factory.mktemp("corrupt") / "model.safetensors"
    path.write_bytes(corrupt)
    try:
        found = Importer(Folder(path.parent), TINY, None).source.entries
    except BadFile as error:
        assert "model.safetensors" in str(error)
        return
    wanted = safetensors.read_header(whole / "model.safetensors")
    shift = len(corrupt) - len(original)
    assert {n: (e.dtype, e.shape, e.start - shift) for n, e in found.items()} == {
        n: (e.dtype, e.shape, e.start) for n, e in wanted.items()
    }
