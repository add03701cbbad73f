"""`python -m tools.expert_load`: counts are those of an independent routing, and shares sum as they must."""

import functools
import json
import os
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import ops
from dsv3_jax.model.model import Model
from experiments.evaluation import domains
from experiments.scoring import Scorer
from tests.conftest import SMALL, mesh_of
from tests.experiments.conftest import checkpoint  # noqa: F401

C = replace(SMALL, layers=3, dense_layers=1, mtp_depth=0)


@pytest.fixture(scope="module", autouse=True)
def as_they_are():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@functools.cache
def scorer(shape):
    """Random weights and expert biases; attention adds nothing, so that tokens do not see each other."""

    def make():
        model = Model.init(jax.random.key(0), C, 0.3)
        silent = jax.tree.map(jnp.zeros_like, (model.dense.attention.out, model.routed.attention.out))
        dense = model.dense.replace(attention=model.dense.attention.replace(out=silent[0]))
        routed = model.routed.replace(attention=model.routed.attention.replace(out=silent[1]))
        bias = 0.2 * jax.random.normal(jax.random.key(1), (C.balanced_layers, C.experts))
        return model.replace(dense=dense, routed=routed), bias

    return Scorer(*jax.jit(make)(), shape[0] * shape[1], C, ops.float32())


def counted(model, bias, tokens):
    """The choices of tokens, by NumPy in float64: equations of the report, one token at a time."""
    model = jax.tree.map(lambda x: np.asarray(x, np.float64), model)
    load = np.zeros((C.routed_layers, C.experts), int)

    def norm(x, gain):
        return x / np.sqrt(np.mean(x**2) + C.norm_eps) * gain

    def swiglu(x, gate_up, down):
        gate, up = np.split(x @ gate_up, 2)
        return (gate / (1 + np.exp(-gate)) * up) @ down

    for token in tokens:
        x = model.embed[token]
        x = x + swiglu(norm(x, model.dense.ffn_norm[0]), model.dense.ffn.gate_up[0], model.dense.ffn.down[0])
        for layer in range(C.routed_layers):
            ffn = jax.tree.map(lambda w, n=layer: w[n], model.routed.ffn)
            h = norm(x, model.routed.ffn_norm[layer])
            scores = 1 / (1 + np.exp(-h @ ffn.router))
            biased = (scores + bias[layer]).reshape(C.groups, -1)
            best = np.argsort(-np.sort(biased, axis=1)[:, -2:].sum(1))[: C.top_groups]
            allowed = np.where(np.isin(np.arange(C.groups), best)[:, None], biased, -np.inf).reshape(-1)
            chosen = np.argsort(-allowed)[: C.top_k]
            load[layer, chosen] += 1
            gates = scores[chosen] / scores[chosen].sum() * C.route_scale
            routed = sum(
                g * swiglu(h, ffn.experts.gate_up[e], ffn.experts.down[e])
                for g, e in zip(gates, chosen, strict=True)
            )
            x = x + routed + swiglu(h, ffn.shared.gate_up, ffn.shared.down)
    return load


@pytest.mark.parametrize("shape", [(1, 1), (2, 2)], ids=["one device", "data 2, experts 2"])
def test_loads_are_the_counts_of_an_independent_routing(shape):
    rng = np.random.default_rng(0)
    lines = [rng.integers(0, C.vocab, n).astype(np.int32) for n in (5, 1, 17, 12, 2, 16)]
    with jax.set_mesh(mesh_of(*shape)):
        one = scorer(shape)
        found = one.expert_load(lines)
        model, bias = jax.tree.map(np.asarray, (one.model, one.bias))
    np.testing.assert_array_equal(found, counted(model, bias, np.concatenate([line[:-1] for line in lines])))
    assert found.sum() == C.routed_layers * C.top_k * sum(len(line) - 1 for line in lines)


def test_relative_loads_of_a_layer_sum_to_the_number_of_experts():
    texts = {"low": ["abc" * 50, "never read"], "high": ["xyz"] * 40}
    with jax.set_mesh(mesh_of(1, 1)):
        found = domains.loads(
            scorer((1, 1)), texts, lambda text: np.array([ord(t) % 96 for t in text], np.int32), 80, 16
        )
        with pytest.raises(ValueError, match="The domain none has no text"):
            domains.loads(scorer((1, 1)), {"none": []}, np.array, 80, 16)
    assert {name: load.tokens for name, load in found.items()} == {"low": 80, "high": 80}
    for load in found.values():
        assert load.relative.shape == (C.routed_layers, C.experts)
        np.testing.assert_allclose(load.relative.sum(axis=1), C.experts)
        np.testing.assert_allclose(load.relative * 80 * C.top_k / C.experts, load.chosen)
    assert np.abs(found["low"].relative - found["high"].relative).max() > 0.5


def test_the_command_draws_and_writes_counts(checkpoint, tmp_path):  # noqa: F811
    (tmp_path / "a.txt").write_text("the quick brown fox " * 5)
    (tmp_path / "b.txt").write_text("0123456789" * 5)

    def command(*arguments):
        line = [sys.executable, "-m", "tools.expert_load", f"--checkpoint={checkpoint}", *arguments]
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        return subprocess.run(line, capture_output=True, text=True, timeout=600, env=environment)

    png, counts = tmp_path / "out.png", tmp_path / "out.json"
    both = f"--domain=words={tmp_path / 'a.txt'}", f"--domain=digits={tmp_path / 'b.txt'}"
    done = command(*both, f"--output={png}", f"--json={counts}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert png.read_bytes().startswith(b"\x89PNG")
    found = json.loads(counts.read_text())["domains"]
    for name in ("words", "digits"):
        assert name in done.stdout
        np.testing.assert_allclose(np.sum(found[name]["relative"], axis=1), 8)
    wrong = command("--domain=words", f"--output={tmp_path / 'none.png'}")
    assert wrong.returncode == 1 and "is not NAME=GLOB" in wrong.stderr and "Traceback" not in wrong.stderr
