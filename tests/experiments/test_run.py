"""What a config asks for together is refused, or made, as a whole."""

import pytest

from dsv3_jax.ops.dispatch import direct
from experiments.run import Dispatch, Mesh, Pipeline, Run


def test_a_schedule_that_its_ranks_cannot_run_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match="config.mesh.pipeline=3 cannot be used. dualpipe over 3 ranks"):
        Run(mesh=Mesh(pipeline=3), pipeline=Pipeline(schedule="dualpipe", microbatches=8))


def test_micro_batches_too_few_for_a_schedule_are_named():
    with pytest.raises(ValueError, match="8 micro-batches"):
        Run(mesh=Mesh(pipeline=8), pipeline=Pipeline(schedule="dualpipev", microbatches=8))


@pytest.mark.parametrize(("room", "transport"), [(0.0, "direct"), (-1.0, "scheduled"), (2.0, "dirct")])
def test_dispatch_refuses_no_room_and_unknown_transports(room, transport):
    with pytest.raises(ValueError, match=r"config\.dispatch\."):
        Dispatch(room=room, transport=transport)


def test_words_of_a_config_become_operations():
    run = Run(
        mesh=Mesh(pipeline=16, expert=64),
        pipeline=Pipeline(schedule="dualpipe", microbatches=240),
        dispatch=Dispatch(room=1.5, transport="direct"),
    )
    setup = run.setup
    assert setup.schedule(16, 240).ranks == 16
    assert (setup.ops.dispatcher.room, setup.ops.dispatcher.exchange) == (1.5, direct)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "fp8"])
def test_a_run_has_one_setup_so_that_its_step_is_compiled_once(precision):
    run = Run(precision=precision)
    assert run.setup == run.setup == Run(precision=precision).setup
    assert hash(run.setup) == hash(Run(precision=precision).setup)
