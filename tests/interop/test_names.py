"""The table of names is complete: every element of ours once, and every tensor of the released checkpoint."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from dsv3_jax.config import Config
from dsv3_jax.interop import names, transfer
from dsv3_jax.model import size
from dsv3_jax.training import manifest
from tests.interop.released import DIRECT, TINY
from tools import convert

CASES = {
    "tiny": TINY,
    "direct_query": DIRECT,
    "two_depths": replace(TINY, mtp_depth=2, dense_layers=0),
    "all_dense": replace(TINY, dense_layers=3, mtp_depth=0),
    "no_shared_experts": replace(TINY, shared_experts=0),
}


@pytest.mark.parametrize("c", CASES.values(), ids=CASES)
def test_every_element_of_our_weights_comes_from_exactly_one_tensor(c):
    bias = jax.ShapeDtypeStruct((c.balanced_layers, c.experts), np.float32)
    tree = {"model": size.abstract(c), "bias": bias}
    counts = {name: np.zeros(leaf.shape, np.int8) for name, leaf in manifest.flatten(tree).items()}
    for t in names.tensors(c):
        rows = slice(0, t.shape[0])
        taken = counts[t.leaf][(*t.at, *t.kind.layout.place(rows, t.shape[0]))]
        assert t.kind.layout.turn(taken).shape == t.shape, t.name
        taken += 1
    assert all(np.all(count == 1) for count in counts.values())


def test_names_do_not_repeat():
    found = [t.name for t in (*names.tensors(TINY), *names.copies(TINY))]
    assert len(found) == len(set(found))


def test_the_fp8_form_of_deepseek_v3_has_the_tensors_and_bytes_of_the_released_files():
    slots = transfer.slots(Config(), convert.FORMS["float8", "float32"])
    assert len(slots) == 91_991
    assert sum(slot.size for slot in slots) == 688_574_839_360


def test_the_mtp_layer_of_deepseek_v3_has_as_many_tensors_as_released():
    slots = transfer.slots(Config(), convert.FORMS["float8", "float32"])
    assert sum(slot.name.startswith("model.layers.61.") for slot in slots) == 1564
