"""What a config asks for together is refused, or made, as a whole."""

import pytest

from dsv3_jax.ops.exchange import direct
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


@pytest.mark.parametrize(
    ("hosts", "reached"),
    [(1, 1), (2, 2), (4, 4), (8, 4), (16, 8), (64, 32)],  # 8 groups, of which a token visits 4
)
def test_groups_of_experts_bound_the_hosts_that_a_token_reaches(hosts, reached):
    run = Run(mesh=Mesh(expert=64), dispatch=Dispatch(hosts=hosts))
    assert run.setup.ops.dispatcher.reached == reached


def test_hosts_that_do_not_split_the_expert_axis_are_refused():
    with pytest.raises(
        ValueError, match=r"config\.mesh\.expert=8 does not divide over config\.dispatch\.hosts=3"
    ):
        Run(mesh=Mesh(expert=8), dispatch=Dispatch(hosts=3))
    with pytest.raises(ValueError, match="take scheduled or ragged, or one host"):
        Dispatch(hosts=2, transport="direct")


def test_words_of_a_config_become_operations():
    run = Run(
        mesh=Mesh(pipeline=16, expert=64),
        pipeline=Pipeline(schedule="dualpipe", microbatches=240),
        dispatch=Dispatch(room=1.5, transport="direct"),
    )
    setup = run.setup
    assert setup.schedule(16, 240).ranks == 16
    assert (setup.ops.dispatcher.room, setup.ops.dispatcher.home) == (1.5, direct)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "fp8"])
def test_a_run_has_one_setup_so_that_its_step_is_compiled_once(precision):
    run = Run(precision=precision)
    assert run.setup == run.setup == Run(precision=precision).setup
    assert hash(run.setup) == hash(Run(precision=precision).setup)
