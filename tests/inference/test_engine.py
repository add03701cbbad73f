"""What requests get is what each would get alone, however they are mixed, cut, drafted and cancelled."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P

from dsv3_jax import ops
from dsv3_jax.inference import decode
from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.request import Limits, Request
from dsv3_jax.model.cached import Served
from dsv3_jax.model.model import Model
from dsv3_jax.ops.held import as_it_is
from dsv3_jax.pipeline import execute
from dsv3_jax.pipeline.objective import Batch
from tests.conftest import SMALL, mesh_of, parts_of

OPS = ops.float32()
LIMITS = Limits(slots=4, length=64, part=16, steps=3, ends=2, drafts=0)


@pytest.fixture(scope="module")
def weights():
    def make(shape):
        with jax.set_mesh(mesh_of(*shape)):
            model = jax.jit(partial(Model.init, c=SMALL, std=0.25))(jax.random.key(3))
            bias = jnp.zeros((SMALL.balanced_layers, SMALL.experts), out_sharding=P())
        return model, bias

    return make


def engine_of(model, bias, limits, hold=as_it_is):
    served = Served.of(parts_of(model, bias), SMALL, jnp.float32, hold)
    return Engine(served, SMALL, OPS, limits)


def prompts(count, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, SMALL.vocab, n).tolist() for n in rng.integers(1, 41, count)]


def served(engine, requests):
    numbers = [engine.submit(request) for request in requests]
    got = {n: ([], [], False) for n in numbers}
    while engine.active or engine.waiting:
        for news in engine.step():
            tokens, logprobs, over = got[news.number]
            assert not over
            got[news.number] = tokens + news.tokens, logprobs + news.logprobs, news.finished
    assert all(over for *_, over in got.values())
    return [got[n][:2] for n in numbers]


@pytest.fixture(scope="module")
def requests():
    drawn = dict(temperature=0.9, top_k=20, top_p=0.95)
    texts = prompts(9)
    return [
        Request(prompt=p, most=3 + 2 * n, seed=n, **(drawn if n % 2 else {})) for n, p in enumerate(texts)
    ]


@pytest.fixture(scope="module")
def alone(weights, requests):
    with jax.set_mesh(mesh_of(1, 1)):
        engine = engine_of(*weights((1, 1)), LIMITS)
        return [served(engine, [request])[0] for request in requests]


def test_greedy_text_is_the_likeliest_token_of_the_training_pass_every_time(weights, requests, alone):
    with jax.set_mesh(mesh_of(1, 1)):
        model, bias = weights((1, 1))
        score = jax.jit(partial(execute.score, c=SMALL, ops=OPS))
        for request, (tokens, logprobs) in list(zip(requests, alone, strict=True))[::2]:
            whole = np.array([*request.prompt, *tokens], np.int32)
            rows = np.zeros((1, SMALL.vocab, 64), np.int32)
            end = len(whole)
            rows[0, :, :end] = whole
            # The last token replaced by every other one, each scored as a sequence of its own.
            rows[0, :, end - 1] = np.arange(SMALL.vocab)
            batch = Batch(
                jnp.asarray(rows), jnp.asarray((np.arange(64) < end)[None, None] & (rows >= 0), int)
            )
            scores = np.asarray(score(model, bias, batch).logprobs)[0]
            assert np.argmax(scores[:, end - 2]) == tokens[-1]
            np.testing.assert_allclose(
                scores[tokens[-1], len(request.prompt) - 1 : end - 1], logprobs, atol=1e-4
            )


@pytest.mark.parametrize("drafts", [0, 1])
@pytest.mark.parametrize("shape", [(1, 1), (2, 2)], ids=["one device", "data 2, experts 2"])
def test_requests_that_share_slots_get_what_they_get_alone(weights, requests, alone, shape, drafts):
    with jax.set_mesh(mesh_of(*shape)):
        limits = Limits(slots=4, length=64, part=16, steps=3, ends=2, drafts=drafts)
        engine = engine_of(*weights(shape), limits)
        for (tokens, logprobs), want in zip(served(engine, requests), alone, strict=True):
            assert tokens == want[0]
            np.testing.assert_allclose(logprobs, want[1], atol=1e-4)
        assert engine.counts.tokens == sum(request.most for request in requests)
        assert engine.counts.drafts == drafts * engine.counts.steps


@pytest.mark.parametrize("gain", [0.0, 1.0], ids=["right", "wrong"])
def test_drafts_that_are_right_double_a_step_and_wrong_ones_cost_nothing(weights, gain):
    with jax.set_mesh(mesh_of(1, 1)):
        model, bias = weights((1, 1))
        # The main model always says 0, and so does MTP without its norm; with it, 7 or 8 are likelier.
        w = model.head[:, 0]
        head = jnp.zeros_like(model.head).at[:, 7].set(w).at[:, 8].set(-w)
        mtp = model.mtp.replace(norm=jnp.full_like(model.mtp.norm, gain))
        model = model.replace(head=head, norm=jnp.zeros_like(model.norm), mtp=mtp)
        limits = Limits(slots=4, length=64, part=16, steps=3, ends=2, drafts=1)
        engine = engine_of(model, bias, limits)
        ((tokens, _),) = served(engine, [Request(prompt=[1, 2, 3], most=21)])
        assert tokens == [0] * 21
        assert engine.counts.acceptance == 1 - gain and engine.counts.tokens_per_step == 2 - gain


def test_a_text_ends_with_the_token_that_ends_it(weights, requests, alone):
    tokens = alone[8][0]
    end = tokens[4]
    want = tokens[: tokens.index(end) + 1]
    with jax.set_mesh(mesh_of(1, 1)):
        for drafts in (0, 1):
            limits = Limits(slots=1, length=64, part=16, steps=3, ends=2, drafts=drafts)
            engine = engine_of(*weights((1, 1)), limits)
            request = Request(prompt=requests[8].prompt, most=19, ends=(SMALL.vocab, end))
            assert served(engine, [request])[0][0] == want


def test_nothing_is_compiled_anew_for_other_lengths(weights):
    with jax.set_mesh(mesh_of(1, 1)):
        engine = engine_of(*weights((1, 1)), LIMITS)
        served(engine, [Request(prompt=p, most=5) for p in prompts(12)])
        before = decode.decode._cache_size(), decode.prefill._cache_size()
        served(engine, [Request(prompt=p, most=7) for p in prompts(12)])
        assert decode.decode._cache_size() == before[0]
        served(engine, [Request(prompt=p, most=3, temperature=1.0) for p in prompts(20, seed=1)])
        # At most every width with every number of rows that fit: 16 tokens, in one row.
        assert decode.prefill._cache_size() - before[1] <= 2


def test_a_request_that_is_cancelled_makes_room_and_changes_nothing(weights, requests, alone):
    with jax.set_mesh(mesh_of(1, 1)):
        engine = engine_of(*weights((1, 1)), LIMITS)
        numbers = [engine.submit(request) for request in requests]
        got = {n: [] for n in numbers}
        for turn in range(1000):
            if not (engine.active or engine.waiting):
                break
            for news in engine.step():
                got[news.number] += news.tokens
            if turn == 1:
                for n in (numbers[0], numbers[2], numbers[7]):
                    engine.cancel(n)
        for n, (tokens, _) in enumerate(alone):
            assert got[n] == tokens if n not in (0, 2, 7) else got[n] == tokens[: len(got[n])]
        assert not got[numbers[7]]


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (dict(prompt=[], most=1), "must be above 0"),
        (dict(prompt=[1], most=0), "must be above 0"),
        (dict(prompt=[1] * 60, most=5), "more than the 64"),
        (dict(prompt=[SMALL.vocab], most=1), "ids are from 0 to 95"),
        (dict(prompt=[1], most=1, ends=(1, 2, 3)), "room for 2"),
        (dict(prompt=[1], most=1, temperature=float("nan")), "all finite"),
        (dict(prompt=[1], most=1, top_k=2**31), "all finite"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_in_a_sentence(weights, request_, said):
    with jax.set_mesh(mesh_of(1, 1)):
        engine = engine_of(*weights((1, 1)), LIMITS)
        with pytest.raises(ValueError, match=said):
            engine.submit(Request(**request_))
        assert engine.waiting == 0
