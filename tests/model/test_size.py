"""Parameter counts equal those of the public models, without any memory."""

import jax
import pytest

from dsv3_jax import ops
from dsv3_jax.model import size
from dsv3_jax.training.step import Setup, State, step
from experiments import settings
from experiments.run import resolve
from tests.conftest import mesh_of

PRESETS = ["tiny", "small", "moonlight_16b", "deepseek_v2_lite", "deepseek_v3", "kimi_k2"]


def preset(name):
    return resolve(settings.load(name))


def by_hand(c):
    """Main model and one MTP block, from the shapes of the released tensors."""
    query = (c.d_model + c.heads * (c.d_nope + c.d_rope) + 1) * c.q_rank if c.q_rank else 0
    query = query or c.d_model * c.heads * (c.d_nope + c.d_rope)
    latent = c.d_model * (c.kv_rank + c.d_rope) + c.kv_rank + c.kv_rank * c.heads * (c.d_nope + c.d_value)
    attention = query + latent + c.heads * c.d_value * c.d_model
    dense = attention + 3 * c.d_model * c.d_dense + 2 * c.d_model
    experts = (c.experts + c.shared_experts) * 3 * c.d_model * c.d_expert
    routed = attention + experts + (c.d_model + 1) * c.experts + 2 * c.d_model
    main = c.dense_layers * dense + c.routed_layers * routed + (2 * c.vocab + 1) * c.d_model
    return main, routed + 2 * c.d_model**2 + 3 * c.d_model


@pytest.mark.parametrize("name", PRESETS)
def test_counts_equal_those_made_by_hand(name):
    c = preset(name).model
    main, mtp = by_hand(c)
    assert size.parameters(c) == main
    assert (size.mtp_parameters(c) if c.mtp_depth else mtp) == mtp


@pytest.mark.parametrize(
    "name,billions",  # arXiv:2412.19437 and the model cards; V2-Lite's count has no bias: 26 * 64 fewer
    [("deepseek_v3", 671.026), ("kimi_k2", 1026.4), ("moonlight_16b", 15.96), ("deepseek_v2_lite", 15.706)],
)
def test_counts_are_the_published_ones(name, billions):
    assert size.parameters(preset(name).model) / 1e9 == pytest.approx(billions, rel=5e-4)


def test_deepseek_v3_is_exact():
    c = preset("deepseek_v3").model
    assert size.parameters(c) == 671_026_419_200
    assert size.mtp_parameters(c) / 1e9 == pytest.approx(11.610, abs=5e-4)
    assert size.active_parameters(c) / 1e9 == pytest.approx(37.552, abs=1e-3)
    assert 80e6 < size.parameters(preset("small").model) < 140e6


def test_flops_are_those_of_the_report():
    c = preset("deepseek_v3").model
    assert size.flops_per_token(c, 4096) == pytest.approx(250.4e9, rel=1e-3)  # arXiv:2505.09343, table 2


@pytest.mark.slow
def test_tracing_671_billion_parameters_takes_no_longer_than_ten_times_tiny():
    import time

    import numpy as np

    from dsv3_jax.pipeline.objective import Batch, batch_spec

    def seconds(name):
        run = preset(name)
        setup = Setup(run.model, ops.bfloat16(), run.recipe, jax.numpy.dtype(jax.numpy.bfloat16))
        with jax.set_mesh(mesh_of(1, 1)):
            state = jax.eval_shape(lambda k: State.init(k, setup), jax.random.key(0))
            layout = jax.sharding.NamedSharding(mesh_of(1, 1), batch_spec())
            rows = jax.ShapeDtypeStruct((1, 1, run.train.sequence_length + 1), np.int32, sharding=layout)
            jax.clear_caches()
            start = time.perf_counter()
            step.trace(state, Batch(rows, rows), setup=setup)
            return time.perf_counter() - start

    assert seconds("deepseek_v3") < 10 * seconds("tiny")
