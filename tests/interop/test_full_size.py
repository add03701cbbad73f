"""DeepSeek-V3 at its full size: every name, shape and byte of the release, from headers alone."""

from collections import Counter

from dsv3_jax.interop import shards, transfer
from experiments import settings
from experiments.run import resolve
from tools.convert import FORMS

SLOTS = transfer.slots(resolve(settings.load("deepseek_v3")).model, FORMS["float8", "float32"])


def test_the_float8_form_has_the_released_number_of_tensors_and_bytes():
    # The total_size and the weight_map of deepseek-ai/DeepSeek-V3's index, multi-token prediction included.
    assert len({slot.name for slot in SLOTS}) == len(SLOTS) == 91_991
    assert sum(slot.size for slot in SLOTS) == 688_574_839_360


def test_shards_of_five_gigabytes_hold_all_of_it():
    files = shards.named(SLOTS, 5 * 10**9)
    assert [slot for own in files.values() for slot in own] == SLOTS
    assert max(sum(slot.size for slot in own) for own in files.values()) <= 5 * 10**9
    assert Counter(slot.dtype for slot in SLOTS)["F8_E4M3"] == sum(s.name.endswith("_inv") for s in SLOTS)
