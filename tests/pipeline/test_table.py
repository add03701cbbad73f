"""A table read slot by slot does what its schedule says, and overwrites nothing that is still to be read."""

import numpy as np
import pytest
from hypothesis import given

from dsv3_jax.pipeline.catalogue import SCHEDULES
from dsv3_jax.pipeline.schedule import peak_in_flight
from dsv3_jax.pipeline.table import NONE, SENDERS, table
from tests.pipeline.test_schedule import quick, schedules


class Rank:
    """What a device would hold, with names in place of arrays."""

    def __init__(self, pools):
        self.mail, self.kept, self.waiting = ([("nothing", NONE, NONE)] * size for size in pools)


def cell(row, slot, rank):
    return {field: int(values[slot, rank]) for field, values in row._asdict().items()}


def play(schedule):
    """Runs a table; what is read must be what the model's own order of stages asks for."""
    whole, pools = table(schedule)
    ranks = [Rank(pools) for _ in range(schedule.ranks)]
    done = []
    for slot in range(len(whole.forward.stage)):
        made = [[("nothing", NONE, NONE)] * 2 for _ in ranks]  # output, and gradient of input
        for rank, memory in enumerate(ranks):
            forward, backward, weight = (cell(row, slot, rank) for row in whole[:3])
            # A pair's forward and backward run together: a forward must not write over what is read now.
            if (stage := forward["stage"]) != NONE:
                microbatch = forward["microbatch"]
                x = memory.mail[forward["mail"]] if stage else None
                assert x == (("output", stage - 1, microbatch) if stage else None)
                memory.kept[forward["kept"]] = ("kept", stage, microbatch)
                made[rank][0] = ("output", stage, microbatch)
                done.append(("forward", stage, microbatch))
            if (stage := backward["stage"]) != NONE:
                microbatch, last = backward["microbatch"], stage == schedule.stages - 1
                g = memory.mail[backward["mail"]]
                assert g == (("output", stage, microbatch) if last else ("gradient", stage + 1, microbatch))
                assert memory.kept[backward["kept"]] == ("kept", stage, microbatch)
                made[rank][1] = ("gradient", stage, microbatch)
                if backward["waiting"] != NONE:
                    memory.waiting[backward["waiting"]] = ("waiting", stage, microbatch)
                else:
                    done.append(("weight", stage, microbatch))
            if (stage := weight["stage"]) != NONE:
                assert memory.waiting[weight["waiting"]] == ("waiting", stage, weight["microbatch"])
                done.append(("weight", stage, weight["microbatch"]))
        for kind, arrivals in enumerate((whole.outputs, whole.gradients)):
            for sender, places in zip(SENDERS, arrivals, strict=True):
                for rank, memory in enumerate(ranks):
                    if (place := int(places[slot, rank])) != NONE:
                        memory.mail[place] = made[rank + sender][kind]
    return done


@quick
@given(schedules())
def test_a_table_runs_every_stage_on_what_it_needs(named):
    _, schedule = named
    done = play(schedule)
    each = {(s, m) for s in range(schedule.stages) for m in range(schedule.microbatches)}
    assert len(done) == 2 * len(each)
    assert set(done) == {(part, *one) for part in ("forward", "weight") for one in each}


@quick
@given(schedules())
def test_a_pool_is_no_larger_than_what_is_in_flight(named):
    name, schedule = named
    _, pools = table(schedule)
    most = max(peak_in_flight(schedule))
    assert pools.kept <= most
    if name in ("gpipe", "1f1b"):
        assert (pools.kept, pools.waiting) == (most, 0)


@pytest.mark.parametrize(("name", "kept"), [("dualpipe", 9), ("zb1p", 8), ("1f1b", 8)])
def test_pools_of_eight_ranks(name, kept):
    _, pools = table(SCHEDULES[name].make(8, 20))
    assert pools.kept == kept


def test_stages_chunks_and_micro_batches_stand_in_the_slots_of_the_schedule():
    whole, _ = table(SCHEDULES["1f1b"].make(2, 2))
    np.testing.assert_array_equal(
        whole.forward.microbatch.T, [[0, 1, NONE, NONE, NONE, NONE], [NONE, 0, NONE, 1, NONE, NONE]]
    )
    np.testing.assert_array_equal(whole.backward.stage[:, 1], [NONE, NONE, 1, NONE, 1, NONE])
    assert not (whole.forward.chunk > 0).any()
