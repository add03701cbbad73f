"""FP8 checkpoints: transformers dequantises what we export, and what we import, to the same numbers."""

import importlib.util
import warnings
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.interop import names
from dsv3_jax.interop.names import Storage
from tests.interop import released
from tools import convert

# transformers divides a matrix evenly by its scales, so only whole blocks, or one partial one, agree with it.
CONFIG = replace(released.TINY, d_model=256, d_expert=128, d_dense=384, experts=4, groups=1, top_groups=1)

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None, reason="accelerate, which transformers needs for FP8"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    directory, c = tmp_path_factory.mktemp("fp8"), CONFIG
    weights = released.quantised(released.tensors(c), c)
    released.write(directory / "source", weights, released.config(c, **released.FP8_CONFIG))
    convert.from_hf(directory / "source", directory / "ours", jnp.dtype(jnp.bfloat16))
    convert.to_hf(directory / "ours", directory / "wide", convert.FORMS["bfloat16", "float32"], 10**8)
    convert.to_hf(directory / "ours", directory / "fp8", convert.FORMS["float8", "ue8m0"], 10**8)
    return directory


def theirs(directory):
    """The dequantised weights by released name, experts taken apart again."""
    import torch
    from transformers import DeepseekV3ForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = DeepseekV3ForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    out = {}
    for name, weight in model.state_dict().items():
        value = weight.float().numpy()
        stem = name.rpartition(".")[0]
        if name.endswith("experts.gate_up_proj"):
            for e, (gate, up) in enumerate(np.split(v, 2) for v in value):
                out |= {f"{stem}.{e}.gate_proj.weight": gate, f"{stem}.{e}.up_proj.weight": up}
        elif name.endswith("experts.down_proj"):
            out |= {f"{stem}.{e}.down_proj.weight": down for e, down in enumerate(value)}
        else:
            out[name] = value
    return out


def ours(directory):
    return {
        name: np.frombuffer(data, released.BF16).reshape(shape).astype(np.float32)
        for name, (dtype, shape, data) in released.bytes_by_tensor(directory).items()
        if dtype == "BF16"
    }


def linears():
    """The main model's tensors that are FP8; transformers does not load the MTP layer with it."""
    c = CONFIG
    found = [t.name for t in names.tensors(c) if t.kind.storage is Storage.BLOCKS]
    return [name for name in found if not name.startswith(names.mtp_prefix(c, 0))]


def test_an_fp8_checkpoint_is_dequantised_bit_for_bit_as_transformers_does(folder):
    wide, reference = ours(folder / "wide"), theirs(folder / "source")
    for name in linears():
        np.testing.assert_array_equal(wide[name], reference[name], err_msg=name)


def test_an_fp8_export_is_loaded_by_transformers_within_the_rounding_of_e4m3(folder):
    wide, reference = ours(folder / "wide"), theirs(folder / "fp8")
    for name in linears():
        # Half a unit of three mantissa bits; half a subnormal step, 2^-10 of a scale, near zero.
        scale = np.abs(wide[name]).max() / 224  # UE8M0 at most doubles amax / 448
        bound = np.maximum(np.abs(wide[name]) / 16, scale / 1024)
        # Dequantised in BF16, which may round the whole once more.
        assert np.all(np.abs(wide[name] - reference[name]) <= bound * (1 + 2.0**-8)), name
