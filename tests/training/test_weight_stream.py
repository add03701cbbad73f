"""Weights written piece by piece are an ordinary checkpoint, and a failure leaves nothing behind."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax import P

from dsv3_jax.training import weight_stream
from dsv3_jax.training.checkpoint import Checkpoints
from dsv3_jax.training.manifest import Damaged
from dsv3_jax.training.restore import CheckpointError, load_weights, read_meta
from dsv3_jax.training.weight_stream import WeightReader, WeightWriter

AXES = ("pipeline", "data", "expert")


def make_mesh(*sizes):
    return jax.make_mesh(sizes, AXES, devices=jax.devices()[: int(np.prod(sizes))])


def init():
    experts = jax.random.normal(
        jax.random.key(0), (3, 4, 8, 16), jnp.bfloat16, out_sharding=P(None, "expert", "data")
    )
    return {
        "model": {
            "experts": experts,
            "norm": jax.random.normal(jax.random.key(1), (8,)),
            "scale": jnp.float32(2),
        },
        "bias": [jnp.zeros((0, 4)), jnp.ones((3, 4))],
    }


def writer(directory):
    weights = jax.eval_shape(init)
    return WeightWriter(directory, weights, config={"source": "a test"}, model_config={"layers": 3})


@pytest.fixture(autouse=True)
def mesh():
    with jax.set_mesh(make_mesh(1, 4, 2)):
        yield


@pytest.fixture(scope="module")
def weights():
    with jax.set_mesh(make_mesh(1, 1, 1)):
        return jax.tree.map(np.asarray, jax.jit(init)())


def write(stream, weights):
    for layer in range(3):
        for expert in range(4):
            stream.write("model.experts", (layer, expert), weights["model"]["experts"][layer, expert])
        stream.write("bias.1", (slice(layer, layer + 1),), weights["bias"][1][layer : layer + 1])
    stream.write("model.norm", (), weights["model"]["norm"])
    stream.write("model.scale", (), weights["model"]["scale"])


@pytest.fixture
def written(tmp_path, weights):
    with writer(tmp_path / "out") as stream:
        write(stream, weights)
    return tmp_path / "out"


def same(left, right):
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return all(a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 4, 2), (1, 2, 4)])
def test_what_was_written_loads_bit_for_bit_on_any_mesh(sizes, written, weights):
    with jax.set_mesh(make_mesh(*sizes)):
        assert same(load_weights(written, jax.eval_shape(init)), weights)


def test_orbax_alone_reads_what_was_written(written, weights):
    read = ocp.PyTreeCheckpointer().restore(written / "0" / "model")
    np.testing.assert_array_equal(read["model.experts"], weights["model"]["experts"])
    meta = ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore(written / "0" / "meta")
    assert meta["model_config"] == {"layers": 3}


def test_each_block_has_a_file_of_its_own(written):
    files = list((written / "0" / "model" / "model.experts" / "c").rglob("0"))
    assert len([f for f in files if f.is_file()]) == 12


def test_the_record_names_where_the_weights_came_from(written):
    meta = read_meta(written)
    assert (meta.step, meta.config, meta.data) == (0, {"source": "a test"}, {})


def test_a_run_cannot_be_resumed_from_weights_alone(written):
    with Checkpoints(written, keep=1, config={}, model_config={"layers": 3}) as checkpoints:
        with pytest.raises(ValueError, match="no training state"):
            checkpoints.restore_newest(jax.eval_shape(init), {"step": jnp.int32(0)})


def test_a_failure_half_way_leaves_nothing(tmp_path, weights):
    with pytest.raises(KeyError, match="stop"), writer(tmp_path / "a" / "b") as stream:
        stream.write("model.norm", (), weights["model"]["norm"])
        raise KeyError("stop")
    assert not list(tmp_path.iterdir())


def test_weights_that_are_incomplete_are_refused_and_removed(tmp_path, weights):
    with pytest.raises(ValueError, match="model.experts has 1536 elements but 128 were written"):
        with writer(tmp_path / "out") as stream:
            stream.write("model.experts", (0, 0), weights["model"]["experts"][0, 0])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("second", [(0, 0), (0,), (slice(0, 1), slice(0, 2)), (slice(0, 3), 0, slice(7, 8))])
def test_an_element_written_twice_is_refused(tmp_path, weights, second):
    experts = weights["model"]["experts"]
    with pytest.raises(ValueError, match="written before"), writer(tmp_path / "out") as stream:
        stream.write("model.experts", (0, 0), experts[0, 0])
        stream.write("model.experts", second, experts[second])


@pytest.mark.parametrize(
    ("name", "index", "block", "sentence"),
    [
        ("model.nrm", (), np.zeros(8, np.float32), "model.nrm is no array"),
        ("model.norm", (), np.zeros(7, np.float32), r"float32\[8\] but a block of float32\[7\]"),
        ("model.norm", (), np.zeros(8, np.float16), r"float32\[8\] but a block of float16\[8\]"),
        ("model.norm", (8,), np.zeros((), np.float32), "does not select a block"),
        ("model.norm", (slice(0, 8, 2),), np.zeros(4, np.float32), "does not select a block"),
        ("model.norm", (0, 0), np.zeros((), np.float32), "has 1 axes but 2 indices"),
    ],
)
def test_blocks_that_do_not_fit_are_refused_by_name(tmp_path, name, index, block, sentence):
    with pytest.raises(ValueError, match=sentence), writer(tmp_path / "out") as stream:
        stream.write(name, index, block)


def test_an_existing_checkpoint_is_not_overwritten(written):
    with pytest.raises(FileExistsError, match="already holds a checkpoint"), writer(written):
        pass
    WeightReader(written).verify()


def test_leftovers_of_a_killed_writer_are_not_a_checkpoint(tmp_path, weights):
    stream = writer(tmp_path / "out")
    stream.__enter__()
    stream.write("model.norm", (), weights["model"]["norm"])
    with pytest.raises(FileNotFoundError):
        load_weights(tmp_path / "out", jax.eval_shape(init))
    with writer(tmp_path / "out") as again:
        write(again, weights)
    assert os.listdir(tmp_path / "out") == ["0"]


def test_the_reader_gives_back_every_block(written, weights):
    reader = WeightReader(written)
    assert set(reader.names) == {"bias.0", "bias.1", "model.experts", "model.norm", "model.scale"}
    assert reader.shape("bias.0") == (0, 4) and reader.dtype("model.experts") == jnp.bfloat16
    experts = weights["model"]["experts"]
    for index in [(), (1,), (2, 3), (slice(1, 3), 0, slice(2, 5)), (0, slice(1, 2))]:
        np.testing.assert_array_equal(reader.read("model.experts", index), experts[index])
    assert reader.read("bias.0", ()).shape == (0, 4)
    assert reader.read("model.scale", ()) == np.float32(2)


@pytest.mark.parametrize("limit", [1 << 26, 64])
def test_verifying_by_chunks_finds_any_damage_in_what_a_run_saved(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(weight_stream, "_CHUNK", limit)
    with Checkpoints(tmp_path, keep=1, config={}, model_config={}) as checkpoints:
        checkpoints.save(1, jax.jit(init)(), {}, {})
    reader = WeightReader(tmp_path)
    reader.verify()
    (tmp_path / "1" / "model" / "model.experts" / "c" / "0" / "1" / "3" / "0").unlink()
    with pytest.raises(Damaged, match=r"model\.experts do not match"):
        reader.verify()


def test_a_flipped_byte_in_a_block_is_found_when_it_is_read(written):
    path = next(f for f in Path(written / "0" / "model" / "model.norm" / "c").rglob("*") if f.is_file())
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)
    with pytest.raises(Damaged, match=r"model\.norm"):
        WeightReader(written).read("model.norm", ())
    with pytest.raises(CheckpointError, match=r"model\.norm"):
        load_weights(written, jax.eval_shape(init))


def test_large_blocks_are_cut_into_files_of_bounded_size(tmp_path, monkeypatch, weights):
    monkeypatch.setattr(weight_stream, "_CHUNK", 64)
    with writer(tmp_path) as stream:
        write(stream, weights)
    sizes = [f.stat().st_size for f in (tmp_path / "0" / "model").rglob("c/**/*") if f.is_file()]
    assert max(sizes) <= 64 + 4  # with its checksum
    assert same(load_weights(tmp_path, jax.eval_shape(init)), weights)
