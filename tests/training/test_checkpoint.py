"""Checkpoints come back bit for bit on any mesh, and damage is never restored."""

import hashlib
import json
import logging
import os
import random
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import struct
from jax import P

from dsv3_jax.training import manifest
from dsv3_jax.training.checkpoint import Checkpoints
from dsv3_jax.training.manifest import Damaged, check_same_model
from dsv3_jax.training.restore import CheckpointError, load_weights, read_meta

AXES = ("pipeline", "data", "expert")
MODEL = {"layers": 2, "ranks": {"q": 4, "kv": None}}


@struct.dataclass
class Toy:
    """A model in miniature: a stack, a gain, a stack that is absent."""

    w: Any
    norm: Any
    mtp: Any


def make_mesh(*sizes):
    return jax.make_mesh(sizes, AXES, devices=jax.devices()[: int(np.prod(sizes))])


def init(seed=0):
    k = jax.random.split(jax.random.key(seed), 3)
    w = jax.random.normal(k[0], (2, 4, 8, 4), jnp.bfloat16, out_sharding=P(None, "expert", "data", None))
    weights = {
        "model": Toy(w, jax.random.normal(k[1], (8,)), None),
        "bias": [jnp.zeros((0, 4)), jnp.ones((3, 4))],
    }
    rest = {
        "mu": jax.tree.map(lambda x: x.astype(jnp.float32) * 2, weights),
        "step": jnp.int32(seed),
        "key": jax.random.bits(k[2], (2,)),
    }
    return weights, rest


def abstract():
    return jax.eval_shape(init, 0)


def opened(directory, keep=3, model=MODEL):
    return Checkpoints(directory, keep=keep, config={"model": model, "seed": 0}, model_config=model)


def same(left, right):
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return all(a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


@pytest.fixture(autouse=True)
def mesh():
    with jax.set_mesh(make_mesh(1, 4, 2)):
        yield


@pytest.fixture(scope="module")
def states():
    with jax.set_mesh(make_mesh(1, 4, 2)):
        make = jax.jit(init)
        return {seed: make(seed) for seed in (0, 10, 20, 30)}


@pytest.fixture(scope="module")
def saved(states, tmp_path_factory):
    """A directory with steps 10 and 20; copy it before changing anything."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    with jax.set_mesh(make_mesh(1, 4, 2)), opened(directory) as checkpoints:
        for step in (10, 20):
            checkpoints.save(step, *states[step], {"0": f"position {step}"})
    return directory


@pytest.fixture
def copy(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def restore(directory, **options):
    with opened(directory, **options) as checkpoints:
        return checkpoints.restore_newest(*abstract())


@pytest.mark.parametrize("sizes", [(1, 4, 2), (1, 1, 1), (1, 2, 4), (2, 1, 2), (1, 8, 1)])
def test_a_step_comes_back_bit_for_bit_on_any_mesh(sizes, saved, states):
    mesh = make_mesh(*sizes)
    with jax.set_mesh(mesh):
        found = restore(saved)
        assert found is not None and found.meta.step == 20
        assert same((found.weights, found.rest), states[20])
        assert found.weights["model"].w.sharding == jax.NamedSharding(mesh, P(None, "expert", "data", None))
        assert found.rest["step"].sharding.is_fully_replicated


def test_the_record_holds_config_data_and_versions(saved):
    meta = read_meta(saved)
    assert meta.config == {"model": MODEL, "seed": 0} and meta.model_config == MODEL
    assert meta.data == {"0": "position 20"} and meta.versions["jax"] == jax.__version__
    assert meta.arrays["model"]["model.w"].shape == (2, 4, 8, 4)


def test_nothing_saved_is_nothing_restored(tmp_path):
    assert restore(tmp_path / "run" / "checkpoints") is None


def test_a_run_killed_before_its_first_save_completed_starts_anew_and_cleans_up(tmp_path):
    (tmp_path / "10.orbax-checkpoint-tmp" / "model").mkdir(parents=True)
    assert restore(tmp_path) is None
    assert not list(tmp_path.iterdir())


def test_only_the_newest_steps_are_kept(tmp_path, states):
    with opened(tmp_path, keep=2) as checkpoints:
        for step in (0, 10, 20, 30):
            checkpoints.save(step, *states[step], {})
        checkpoints.wait()
        assert sorted(os.listdir(tmp_path)) == ["20", "30"]


def test_foreign_files_are_neither_read_nor_removed(copy, states):
    (copy / "notes.txt").write_text("mine")
    (copy / "0040").mkdir()
    (copy / "50").write_text("a file, not a step")
    found = restore(copy, keep=1)
    assert found is not None and found.meta.step == 20
    with opened(copy, keep=1) as checkpoints:
        checkpoints.restore_newest(*abstract())
        checkpoints.save(30, *states[30], {})
    assert sorted(os.listdir(copy)) == ["0040", "30", "50", "notes.txt"]


def test_a_step_that_was_restored_or_saved_is_not_saved_again(copy, states):
    with opened(copy) as checkpoints:
        checkpoints.restore_newest(*abstract())
        before = (copy / "20" / "meta" / "metadata").stat()
        checkpoints.save(20, *states[20], {})
        checkpoints.wait()
        assert (copy / "20" / "meta" / "metadata").stat() == before


def test_a_step_from_elsewhere_is_not_overwritten(copy, states):
    with opened(copy) as checkpoints, pytest.raises(ValueError, match="20 exists"):
        checkpoints.save(20, *states[20], {})


def test_keeping_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="config.checkpoint.keep=0"):
        opened(tmp_path, keep=0)


def test_donating_the_state_right_after_a_save_does_not_change_what_is_saved(tmp_path):
    state = jax.jit(lambda: {"w": jnp.full((512, 1024, 4), 1.0)})()
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    with opened(tmp_path) as checkpoints:
        for i in range(3):
            checkpoints.save(i, state, {}, {})
            for _ in range(4):
                state = step(state)
        checkpoints.wait()
        found = checkpoints.restore_newest(jax.eval_shape(lambda: state), {})
    assert found is not None and found.meta.step == 2
    np.testing.assert_array_equal(found.weights["w"], np.full((512, 1024, 4), 9.0, np.float32))


# Damage.


def damaged_outcome(directory, states):
    """Restores after damage to step 20: returns the step that came back, after checking that it is exact."""
    try:
        with opened(directory) as checkpoints:
            found = checkpoints.restore_newest(*states[0])  # arrays say as much as abstract ones
    except CheckpointError:
        return None
    assert found is not None
    assert same((found.weights, found.rest), states[found.meta.step])
    assert found.meta.data == {"0": f"position {found.meta.step}"}
    return found.meta.step


def files(step):
    return sorted(p for p in step.rglob("*") if p.is_file())


@pytest.mark.slow
def test_a_hundred_flipped_bytes_over_all_files_are_never_restored(saved, states, tmp_path):
    choose = random.Random(0)
    outcomes = []
    for i in range(100):
        directory = Path(shutil.copytree(saved, tmp_path / str(i)))
        every = files(directory / "20")
        path = every[i % len(every)]
        content = bytearray(path.read_bytes())
        content[choose.randrange(len(content))] ^= 1 << choose.randrange(8)
        path.write_bytes(content)
        outcomes.append(damaged_outcome(directory, states))
        shutil.rmtree(directory)
    assert set(outcomes) == {10, 20}  # 20 where the byte belongs to nothing that is read
    assert outcomes.count(10) > 50


@pytest.mark.parametrize(
    "harm", [os.unlink, lambda p: os.truncate(p, p.stat().st_size // 2), lambda p: os.truncate(p, 0)]
)
def test_truncated_and_missing_files_of_every_kind_fall_back(saved, states, tmp_path, harm):
    kinds = {p.name if "c" not in p.parts else "chunk": p.relative_to(saved) for p in files(saved / "20")}
    outcomes = {}
    for kind, path in kinds.items():
        directory = Path(shutil.copytree(saved, tmp_path / kind))
        harm(directory / path)
        outcomes[kind] = damaged_outcome(directory, states)
    assert {k: outcomes[k] for k in ("chunk", "zarr.json", "metadata")} == dict.fromkeys(
        ("chunk", "zarr.json", "metadata"), 10
    )
    assert None not in outcomes.values()


def test_a_skipped_step_is_named_with_the_reason_and_moved_out_of_the_way(copy, states, caplog):
    shutil.rmtree(copy / "20" / "training" / "step")
    with caplog.at_level(logging.WARNING), opened(copy) as checkpoints:
        found = checkpoints.restore_newest(*abstract())
        assert found is not None and found.meta.step == 10
        checkpoints.save(20, *states[20], {"0": "position 20"})
    assert "20: " in caplog.text and "training/step/zarr.json" in caplog.text
    assert sorted(os.listdir(copy)) == ["10", "20", "20.damaged"]
    assert damaged_outcome(copy, states) == 20


def test_swapped_arrays_of_one_shape_are_found(copy, states):
    mu = copy / "20" / "training"
    os.rename(mu / "mu.model.w", mu / "aside")
    shutil.copytree(copy / "10" / "training" / "mu.model.w", mu / "mu.model.w")
    assert damaged_outcome(copy, states) == 10


def test_no_step_left_is_an_error_and_not_a_new_run(copy):
    for step in ("10", "20"):
        (copy / step / "meta" / "metadata").unlink()
    with pytest.raises(CheckpointError, match="none verifies.*20.*10"):
        restore(copy)
    assert sorted(os.listdir(copy)) == ["10", "20"]


def test_a_link_out_of_the_checkpoint_is_refused(copy, tmp_path, states):
    chunk = copy / "20" / "model" / "model.norm" / "c" / "0"
    os.rename(chunk, tmp_path / "outside")
    chunk.symlink_to(tmp_path / "outside")
    assert damaged_outcome(copy, states) == 10


def test_a_header_that_claims_huge_chunks_is_refused_before_memory_is_taken(copy, states):
    header = copy / "20" / "model" / "model.norm" / "zarr.json"
    described = json.loads(header.read_text())
    described["chunk_grid"]["configuration"]["chunk_shape"] = [1 << 40]
    header.write_text(json.dumps(described))
    assert damaged_outcome(copy, states) == 10


def reseal(step, change):
    """Rewrites the record of a step as a stranger could, with a right digest."""
    path = step / "meta" / "metadata"
    body = json.loads(path.read_text())
    del body["sha256"]
    change(body)
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    path.write_text(json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), **body}))


@pytest.mark.parametrize("name", ["../../10/model/model.norm", "/etc/passwd", "..", "a//b", ""])
def test_a_record_that_names_arrays_outside_its_directory_is_refused(copy, name):
    reseal(copy / "20", lambda b: b["arrays"]["model"].update({name: b["arrays"]["model"]["model.norm"]}))
    with pytest.raises(Damaged, match="name or shape"):
        manifest.read(copy / "20")


# Another model.


def test_another_model_config_is_refused_naming_keys_and_both_values(saved):
    with pytest.raises(ValueError, match=r"config\.model\.ranks\.q is 8 but the checkpoint has 4\.") as error:
        restore(saved, model={**MODEL, "ranks": {"q": 8, "kv": None}, "new": 1})
    assert "config.model.new is 1 but the checkpoint has absent." in str(error.value)
    assert "layers" not in str(error.value)


def test_the_same_config_with_tuples_is_the_same_model():
    check_same_model({"a": [1, 2], "b": 1.5}, {"a": (1, 2), "b": 1.5})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda w: {**w, "bias": [w["bias"][0], jnp.ones((3, 5))]},
         "bias.1 is float32[3, 4] in the checkpoint but float32[3, 5]"),
        (lambda w: {**w, "bias": [w["bias"][0], jnp.ones((3, 4), "bfloat16")]},
         "bias.1 is float32[3, 4] in the checkpoint but bfloat16[3, 4]"),
        (lambda w: {**w, "more": jnp.ones(1)}, "more is not in the checkpoint"),
        (lambda w: {"model": w["model"]}, "bias.1 is in the checkpoint but unknown here"),
    ],
)  # fmt: skip
def test_other_arrays_are_refused_by_name_and_nothing_falls_back(saved, change, sentence):
    weights, rest = abstract()
    with opened(saved) as checkpoints, pytest.raises(ValueError) as error:
        checkpoints.restore_newest(change(weights), rest)
    assert sentence in str(error.value)
    assert sorted(os.listdir(saved)) == ["10", "20"]


# Loading weights alone.


@pytest.mark.parametrize("place", ["checkpoints", ".", "checkpoints/20"])
def test_weights_load_from_a_run_its_checkpoints_or_one_step(copy, states, place):
    shutil.rmtree(copy / "20" / "training")
    assert same(load_weights(copy.parent / place, abstract()[0]), states[20][0])


def test_weights_of_a_damaged_step_come_from_the_one_before(copy, states):
    (copy / "20" / "model" / "bias.1" / "zarr.json").unlink()
    assert same(load_weights(copy, abstract()[0]), states[10][0])
    assert sorted(os.listdir(copy)) == ["10", "20"]
    with pytest.raises(CheckpointError, match="bias.1"):
        load_weights(copy / "20", abstract()[0])


def test_a_directory_without_checkpoints_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        load_weights(tmp_path, abstract()[0])


def test_orbax_alone_reads_the_weights_too(saved, states):
    leaves = ("bias.1", "model.w", "model.norm")
    plain = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in leaves}
    read = ocp.PyTreeCheckpointer().restore(saved / "20" / "model", restore_args=plain)
    np.testing.assert_array_equal(np.asarray(read["model.w"]), np.asarray(states[20][0]["model"].w))
