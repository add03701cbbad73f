"""Multi-token prediction of an exported checkpoint is what transformers computes with its own MTP layer."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import mesh, ops
from dsv3_jax.config import Yarn
from dsv3_jax.interop.config import from_record
from dsv3_jax.model.model import deeper, trunk
from dsv3_jax.ops.context import WHOLE
from dsv3_jax.pipeline.objective import Batch
from dsv3_jax.training.restore import load_weights, read_meta
from experiments.weights import weights_of
from tests.interop import released
from tests.torch import reference
from tools import convert

LENGTH = 32
CASES = {
    "latent_query": replace(released.TINY, norm_eps=1e-5),
    "yarn": replace(released.TINY, q_rank=None, yarn=Yarn(factor=4.0, original_length=16), max_length=64),
}
IDS = np.random.default_rng(5).integers(0, released.TINY.vocab, (8, LENGTH + 1))


@pytest.fixture(scope="module", params=CASES)
def folder(request, tmp_path_factory):
    """Random weights in FP32, imported and exported, so that transformers reads what we wrote."""
    directory, c = tmp_path_factory.mktemp("mtp"), CASES[request.param]
    weights = released.tensors(c, released.F32)
    released.write(directory / "source", weights, released.config(c))
    convert.from_hf(directory / "source", directory / "ours", jnp.dtype(jnp.float32))
    convert.to_hf(directory / "ours", directory / "back", convert.FORMS["float32", "float32"], 10**6)
    return directory


def ours(checkpoint):
    """The MTP hidden states, and their logits, [8, LENGTH, ...]."""
    meta = read_meta(checkpoint)
    c, f32 = from_record(meta.model_config), ops.float32()
    with jax.set_mesh(mesh.make_mesh(1, 4, 2)):
        weights = load_weights(checkpoint, weights_of(c, meta))
        specs = mesh.specs(weights["model"])

        def device(model, bias, tokens):
            model, bias = mesh.vary(model), mesh.vary(bias)
            segments = jnp.ones_like(tokens)
            hidden, _ = trunk(model, specs, bias, tokens[:, :-1], segments[:, :-1], c, f32)
            further = Batch(tokens, segments).mine(WHOLE, 1 + c.mtp_depth)
            hidden, _ = deeper(model, specs, bias[c.routed_layers :], hidden, *further, 1, c, f32)
            logits = hidden @ mesh.gather(model.head, specs.head)
            return jax.lax.psum((hidden, logits), mesh.PIPELINE)

        run = jax.shard_map(device, out_specs=jax.P(mesh.TOKENS, None, None))
        layout = jax.sharding.NamedSharding(jax.sharding.get_mesh(), jax.P(mesh.TOKENS, None))
        tokens = jax.device_put(IDS.astype(np.int32), layout)
        return jax.tree.map(np.asarray, jax.jit(run)(weights["model"], weights["bias"], tokens))


def theirs(directory, monkeypatch):
    import torch
    from transformers import DeepseekV3ForCausalLM
    from transformers.modeling_layers import MtpModel

    # transformers knows the names of MTP for 61 layers only.
    ignored = [r"model\.layers\.3\..*"]
    monkeypatch.setattr(DeepseekV3ForCausalLM, "_keys_to_ignore_on_load_unexpected", ignored)
    main, _ = reference.load(directory)
    model = MtpModel.from_pretrained(main).eval()
    ids = torch.from_numpy(IDS)
    positions = torch.arange(LENGTH)[None].expand(len(IDS), -1)
    with torch.no_grad():
        hidden = main.model(ids[:, :-1]).last_hidden_state
        hidden = model.forward_layer(0, hidden, positions, None, input_ids=ids[:, 1:])
        return hidden.numpy(), model._project_to_logits(hidden).numpy()


def test_hidden_states_and_logits_agree_with_the_mtp_layer_of_transformers(folder, monkeypatch):
    hidden, logits = ours(folder / "ours")
    their_hidden, their_logits = theirs(folder / "back", monkeypatch)
    assert np.std(their_logits) > 0.3  # the weights matter
    # The last position has no next token to join.
    np.testing.assert_allclose(hidden[:, :-1], their_hidden[:, :-1], rtol=0, atol=5e-5)
    np.testing.assert_allclose(logits[:, :-1], their_logits[:, :-1], rtol=0, atol=5e-5)
