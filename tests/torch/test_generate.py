"""Greedy text is that of transformers' generate, from the same weights, token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import mesh, ops
from dsv3_jax.inference.engine import Engine, generated
from dsv3_jax.inference.request import Limits, Request
from dsv3_jax.interop.config import from_record
from dsv3_jax.training.restore import read_meta
from experiments.weights import served
from tests.torch import reference
from tools import convert


@pytest.mark.parametrize("case", reference.CASES[:4], ids=lambda case: case.name)
def test_greedy_text_is_that_of_transformers(case, tmp_path):
    import torch

    model = reference.build(case)
    model.save_pretrained(tmp_path / "theirs")
    convert.from_hf(tmp_path / "theirs", tmp_path / "ours", jnp.dtype(jnp.float32))
    prompts = [row[:n].tolist() for row, n in zip(reference.tokens(), (3, 17, 30), strict=True)]
    with jax.set_mesh(mesh.make_mesh(1, 4, 2)):
        meta = read_meta(tmp_path / "ours")
        c = from_record(meta.model_config)
        limits = Limits(slots=8, length=64, part=16, drafts=min(1, c.mtp_depth))
        engine = Engine(served(tmp_path / "ours", c, meta, ops.float32()), c, ops.float32(), limits)
        got = generated(engine, [Request(prompt=prompt, most=24) for prompt in prompts])
    for prompt, (tokens, logprobs) in zip(prompts, got, strict=True):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            theirs = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=24,
                do_sample=False,
                eos_token_id=None,
            )[0, len(prompt) :]
        assert tokens == theirs.tolist()
        whole = np.array([[*prompt, *tokens]])
        want = reference.log_probabilities(model, whole)[0, len(prompt) - 1 :]
        np.testing.assert_allclose(logprobs, want, atol=1e-4)
