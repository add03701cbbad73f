"""Weights read a part at a time: those of the whole, verified, and never beside what is made of them."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import mesh
from dsv3_jax.model import size
from dsv3_jax.model.cached import Served
from dsv3_jax.ops.held import in_fp8
from dsv3_jax.training import arrays, manifest
from dsv3_jax.training.restore import CheckpointError, load_parts, load_weights
from dsv3_jax.training.weight_stream import WeightWriter
from tests.conftest import SMALL, mesh_of, parts_of

NAME = "model.routed.ffn.shared.down"
C = dataclasses.replace(SMALL, d_model=64, d_expert=64, layers=6)


def wanted():
    bias = jax.ShapeDtypeStruct((C.balanced_layers, C.experts), jnp.float32)
    return {"model": size.abstract(C), "bias": bias}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Weights whose every matrix is its own, on disk."""
    directory = tmp_path_factory.mktemp("saved") / "weights"
    rng = np.random.default_rng(0)
    with jax.set_mesh(mesh_of(1, 1)):
        tree = wanted()
    with WeightWriter(directory, tree, config={}, model_config={}) as writer:
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            writer.write(name, (), rng.normal(size=leaf.shape).astype(leaf.dtype))
    return directory


@pytest.mark.parametrize("shape", [(1, 1), (2, 2)])
def test_rows_are_those_of_the_whole_wherever_they_lie(shape, saved):
    with jax.set_mesh(mesh_of(*shape)):
        whole = load_weights(saved, wanted())
        want = Served.of(parts_of(**whole), C, jnp.float32, in_fp8)
        got = load_parts(saved, wanted(), lambda read: Served.of(read, C, jnp.float32, in_fp8))
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert mesh.spec(a) == mesh.spec(b) and a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a.astype(jnp.float32)), np.asarray(b.astype(jnp.float32)))


def test_no_more_than_one_layer_of_training_is_there_at_once(saved):
    others = sum(x.nbytes for x in jax.live_arrays())
    found = []

    def build(read):
        def watched(select, row=None):
            found.append(sum(x.nbytes for x in jax.live_arrays()) - others)
            return read(select, row)

        return Served.of(watched, C, jnp.bfloat16, in_fp8)

    with jax.set_mesh(mesh_of(1, 1)):
        served = load_parts(saved, wanted(), build)
    held = sum(x.nbytes for x in jax.tree.leaves(served))
    assert len(found) == 1 + C.layers + C.mtp_depth
    assert max(found) < 1.01 * held  # of what was read before little is left but what was made of it


def test_an_older_step_is_read_if_a_row_of_the_newest_is_damaged(saved, tmp_path):
    for step in (1, 2):
        path = shutil.copytree(saved / "0", tmp_path / str(step))
        record = dataclasses.replace(manifest.read(path), step=step)
        (path / manifest.META / manifest.META_FILE).write_text(json.dumps(record.to_json()))
    calls = []

    def build(read):
        calls.append(Served.of(read, C, jnp.float32, in_fp8))
        return calls[-1]

    with jax.set_mesh(mesh_of(1, 1)):
        exchange_two_layers(tmp_path / "2")
        assert load_parts(tmp_path, wanted(), build) is calls[1]
        exchange_two_layers(tmp_path / "1")
        with pytest.raises(CheckpointError, match=r"model/model.routed.ffn.shared.* do not match"):
            load_parts(tmp_path, wanted(), build)
    assert len(calls) == 4


def exchange_two_layers(step):
    """Each is intact and in the wrong place: only digests tell."""
    leaf = manifest.read(step).arrays["model"][NAME]
    array = arrays.open_array(step / "model" / NAME, leaf, arrays.WRITING)
    array[:2].write(np.asarray(array[:2].read().result())[::-1]).result()


def test_what_was_not_asked_for_does_not_verify(saved):
    with jax.set_mesh(mesh_of(1, 1)), pytest.raises(CheckpointError, match=r"model/bias.* do not match"):
        load_parts(saved, wanted(), lambda read: read(lambda w: w["model"]))
    with jax.set_mesh(mesh_of(1, 1)), pytest.raises(CheckpointError, match="model/model.dense"):
        load_parts(saved, wanted(), lambda read: [read(lambda w: w["model"].routed, n) for n in range(2)])
