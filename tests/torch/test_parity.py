"""Weights mean the same here and in transformers, in both directions, over the architecture's variants."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import mesh, ops
from dsv3_jax.interop.config import read
from experiments import score
from tests.torch import reference
from tools import convert

# Both sides compute in FP32 but sum in different orders; a wrong formula is off by 1e-2 or more.
TOLERANCE = 5e-5

FLOAT32 = convert.FORMS["float32", "float32"]


@pytest.fixture(scope="module", params=reference.CASES, ids=lambda case: case.name)
def case(request, tmp_path_factory):
    """A model of transformers, saved, imported here, and exported again."""
    directory = tmp_path_factory.mktemp(request.param.name)
    model = reference.build(request.param)
    model.save_pretrained(directory / "theirs")
    convert.from_hf(directory / "theirs", directory / "ours", jnp.dtype(jnp.float32))
    convert.to_hf(directory / "ours", directory / "back", FLOAT32, 100_000)
    return model, directory


def ours(checkpoint, ids):
    source, out = checkpoint.parent / "in.jsonl", checkpoint.parent / "out.jsonl"
    source.write_text("".join(json.dumps({"tokens": row.tolist()}) + "\n" for row in ids))
    with jax.set_mesh(mesh.make_mesh(1, 4, 2)):
        score.score_file(checkpoint, source, out, tokenizer_file=None, batch_size=8, operations=ops.float32())
    return np.array([json.loads(line)["logprobs"] for line in out.read_text().splitlines()])


@pytest.fixture(scope="module")
def theirs(case):
    return reference.log_probabilities(case[0], reference.tokens())


def test_an_imported_model_gives_the_log_probabilities_of_transformers(case, theirs):
    assert np.std(theirs) > 0.3  # the weights matter
    np.testing.assert_allclose(ours(case[1] / "ours", reference.tokens()), theirs, rtol=0, atol=TOLERANCE)


def test_transformers_loads_an_export_whole_and_gives_the_same_log_probabilities(case, theirs):
    model, info = reference.load(case[1] / "back")
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    np.testing.assert_array_equal(reference.log_probabilities(model, reference.tokens()), theirs)


def test_both_forms_of_the_rotary_configuration_are_read_alike(case, tmp_path):
    newer = (case[1] / "theirs" / "config.json").read_text()
    (tmp_path / "config.json").write_text(newer)
    reference.released_form(tmp_path)
    assert "rope_parameters" in newer
    assert read(tmp_path / "config.json") == read(case[1] / "theirs" / "config.json")


def test_several_groups_are_really_excluded():
    """The routing of these cases is one that a wrong group rule would change."""
    import torch

    model = reference.build(reference.CASES[0])
    gate = model.model.layers[1].mlp.gate
    x = torch.randn(200, 32)
    free = (torch.sigmoid(x @ gate.weight.T) + gate.e_score_correction_bias).topk(3).indices.sort().values
    limited = gate(x)[2].sort().values
    assert (free != limited).any(dim=1).float().mean() > 0.1
