"""Conversion keeps every bit that the chosen type can hold, and makes complete folders."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv3_jax.data import tokenizer
from dsv3_jax.interop import fp8, names, transfer
from dsv3_jax.interop.names import Storage
from dsv3_jax.interop.safetensors import INDEX
from dsv3_jax.training.weight_stream import WeightReader
from tests.interop import released
from tests.interop.released import BF16, DIRECT, F32, TINY, WIDE
from tools import convert

WARNING = "importing the main model alone"

CASES = {
    "tiny": (TINY, 1),
    "direct_query_in_shards": (DIRECT, 3),
    "two_depths": (replace(TINY, mtp_depth=2, dense_layers=2), 2),
    "wide": (WIDE, 1),
}


def from_hf(source, destination, dtype="bfloat16"):
    convert.from_hf(source, destination, jnp.dtype(dtype))
    return destination


def to_hf(source, destination, dtype="bfloat16", scales="float32", size=50_000):
    convert.to_hf(source, destination, convert.FORMS[dtype, scales], size)
    return destination


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_export_after_import_is_bit_identical(tmp_path, name, dtype):
    c, shards = CASES[name]
    weights = released.tensors(c, jnp.dtype(dtype))
    source = released.write(tmp_path / "source", weights, released.config(c), shards)
    back = to_hf(from_hf(source, tmp_path / "ours", dtype), tmp_path / "back", dtype)
    assert released.bytes_by_tensor(back) == released.bytes_by_tensor(source)


@pytest.mark.parametrize("band", [1, 40_000])
def test_bands_of_any_size_give_the_same_bits(tmp_path, monkeypatch, band):
    weights = released.quantised(released.tensors(WIDE), WIDE)
    source = released.write(tmp_path / "source", weights, released.config(WIDE, **released.FP8_CONFIG))
    whole = to_hf(from_hf(source, tmp_path / "a"), tmp_path / "whole", "float8")
    monkeypatch.setattr(transfer, "_BAND", band)
    parts = to_hf(from_hf(source, tmp_path / "b"), tmp_path / "parts", "float8")
    assert released.bytes_by_tensor(parts) == released.bytes_by_tensor(whole)


def test_bf16_weights_survive_a_float32_checkpoint(tmp_path):
    source = released.write(tmp_path / "source", released.tensors(TINY), released.config(TINY))
    back = to_hf(from_hf(source, tmp_path / "ours", "float32"), tmp_path / "back", "bfloat16")
    assert released.bytes_by_tensor(back) == released.bytes_by_tensor(source)


def test_wider_weights_are_rounded_to_nearest_with_a_word(tmp_path, capsys):
    weights = released.tensors(DIRECT, F32)
    source = released.write(tmp_path / "source", weights, released.config(DIRECT))
    reader = WeightReader(from_hf(source, tmp_path / "ours", "bfloat16"))
    assert "Rounding F32 weights to bfloat16" in capsys.readouterr().out
    wanted = weights["model.embed_tokens.weight"].astype(BF16)
    np.testing.assert_array_equal(reader.read("model.embed", ()), wanted)


def test_the_expert_bias_stays_float32_and_is_read_from_bf16_too(tmp_path):
    weights = {
        n: w.astype(BF16) if n.endswith("correction_bias") else w
        for n, w in released.tensors(DIRECT, BF16).items()
    }
    source = released.write(tmp_path / "source", weights, released.config(DIRECT))
    reader = WeightReader(from_hf(source, tmp_path / "ours"))
    assert reader.dtype("bias") == F32 and reader.dtype("model.head") == BF16
    wanted = weights["model.layers.1.mlp.gate.e_score_correction_bias"].astype(F32)
    np.testing.assert_array_equal(reader.read("bias", (1,)), wanted)


def test_the_exported_folder_is_complete(tmp_path):
    source = released.write(tmp_path / "source", released.tensors(TINY), released.config(TINY))
    (source / "tokenizer.json").write_text("{}")
    (source / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    back = to_hf(from_hf(source, tmp_path / "ours"), tmp_path / "back")
    shards = sorted(p.name for p in back.glob("model-*"))
    count = len(shards)
    assert count > 1 and shards == [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    others = {p.name for p in back.iterdir()} - set(shards)
    assert others == {
        "config.json",
        "generation_config.json",
        INDEX,
        "SHA256SUMS",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    ids = {"bos_token_id": 3, "eos_token_id": 5}  # the source's
    assert json.loads((back / "generation_config.json").read_text()) == ids
    assert json.loads((back / "config.json").read_text()) == released.config(TINY)


def test_mtp_that_is_announced_but_absent_is_left_out_with_one_warning(tmp_path, caplog):
    main = released.tensors(replace(TINY, mtp_depth=0))
    source = released.write(tmp_path / "source", main, released.config(TINY))
    with caplog.at_level(logging.WARNING):
        ours = from_hf(source, tmp_path / "ours")
    assert sum(WARNING in r.getMessage() for r in caplog.records) == 1
    assert WeightReader(ours).meta.model_config["mtp_depth"] == 0


def test_copies_of_embedding_and_head_may_be_absent(tmp_path):
    weights = released.tensors(TINY)
    few = {t.name: weights[t.name] for t in names.tensors(TINY)}
    source = released.write(tmp_path / "source", few, released.config(TINY))
    back = to_hf(from_hf(source, tmp_path / "ours"), tmp_path / "back")
    assert released.bytes_by_tensor(back).keys() == weights.keys()


def test_stray_rotary_frequencies_are_ignored(tmp_path):
    stray = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(4, F32) for i in range(4)}
    source = released.write(
        tmp_path / "source", released.tensors(TINY) | stray, released.config(TINY), shards=2
    )
    back = to_hf(from_hf(source, tmp_path / "ours"), tmp_path / "back")
    assert not released.bytes_by_tensor(back).keys() & stray.keys()


def definition(weight, scale):
    """E4M3 times its block's scale in float64, rounded once to FP32 and once to BF16."""
    wide = np.kron(scale.astype(np.float64), np.ones((128, 128)))[: weight.shape[0], : weight.shape[1]]
    return (weight.astype(np.float64) * wide).astype(F32).astype(BF16)


@pytest.mark.parametrize("scale_type", [F32, np.dtype(ml_dtypes.float8_e8m0fnu)], ids=str)
def test_fp8_weights_load_dequantised_also_in_partial_blocks(tmp_path, scale_type):
    weights = released.quantised(released.tensors(WIDE), WIDE)
    for name in [n for n in weights if n.endswith("_scale_inv")]:
        power = fp8.to_power_of_two(weights[name])
        weights[name] = weights[name] if scale_type == F32 else power.astype(scale_type)
    source = released.write(
        tmp_path / "source", weights, released.config(WIDE, **released.FP8_CONFIG), shards=2
    )
    back = released.bytes_by_tensor(to_hf(from_hf(source, tmp_path / "ours"), tmp_path / "back"))
    linear = [t for t in names.tensors(WIDE) if t.kind.storage is Storage.BLOCKS]
    assert any(n % 128 and n > 128 for t in linear for n in t.shape)
    for t in linear:
        assert back[t.name][2] == definition(weights[t.name], weights[t.scale]).tobytes(), t.name


@pytest.mark.parametrize("scales", ["float32", "ue8m0"])
def test_float8_export_quantises_what_the_released_files_have_in_fp8(tmp_path, scales):
    source = released.write(tmp_path / "source", released.tensors(WIDE), released.config(WIDE))
    ours = from_hf(source, tmp_path / "ours")
    found = released.bytes_by_tensor(to_hf(ours, tmp_path / "fp8", "float8", scales))
    kinds = {t.name: t for t in names.tensors(WIDE)}
    for name, (dtype, _, data) in found.items():
        if name.endswith("_scale_inv"):
            scale = np.frombuffer(data, F32)
            assert dtype == "F32" and fp8.usable(scale)
            assert scales == "float32" or np.array_equal(fp8.to_power_of_two(scale), scale)
        elif name in kinds and kinds[name].kind.storage is Storage.BLOCKS:
            assert dtype == "F8_E4M3" and name + "_scale_inv" in found
        else:
            assert dtype == ("F32" if name.endswith("correction_bias") else "BF16"), name
    quantization = json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"]
    assert quantization["weight_block_size"] == [128, 128]
    assert quantization.get("scale_fmt") == ("ue8m0" if scales == "ue8m0" else None)


def test_a_float8_export_is_read_back_within_its_rounding(tmp_path):
    weights = released.tensors(WIDE)
    source = released.write(tmp_path / "source", weights, released.config(WIDE))
    coarse = to_hf(from_hf(source, tmp_path / "ours"), tmp_path / "fp8", "float8")
    again = WeightReader(from_hf(coarse, tmp_path / "again", "float32"))
    exact = weights["model.layers.1.mlp.experts.2.down_proj.weight"].astype(F32)
    read = again.read("model.routed.ffn.experts.down", (0, 2)).T
    assert 0 < np.abs(read - exact).max() <= np.abs(exact).max() / 16


def test_an_empty_destination_is_used(tmp_path):
    source = released.write(tmp_path / "source", released.tensors(DIRECT), released.config(DIRECT))
    (tmp_path / "ours").mkdir()
    assert (from_hf(source, tmp_path / "ours") / "0").is_dir()


def test_a_tokenizer_of_a_run_is_exported_under_its_released_name(tmp_path):
    source = released.write(tmp_path / "source", released.tensors(DIRECT), released.config(DIRECT))
    (tmp_path / "run").mkdir()
    shutil.move(from_hf(source, tmp_path / "ours"), tmp_path / "run" / "checkpoints")
    text = tokenizer.train(["some words"], 270, tmp_path / "run" / "tokenizer-4096.json")
    for given in ("checkpoints", "checkpoints/0"):
        back = to_hf(tmp_path / "run" / given, tmp_path / given.replace("/", "-"))
        assert (back / "tokenizer.json").read_bytes() == Path(text.path).read_bytes()
        settings = json.loads((back / "tokenizer_config.json").read_text())
        assert (settings["eos_token"], settings["pad_token"]) == tokenizer.SPECIAL[1:3]
        assert "bos_token" not in settings and settings["model_max_length"] == DIRECT.max_length
    # Settings that lie beside a checkpoint are kept.
    (tmp_path / "run" / "tokenizer_config.json").write_text("{}")
    back = to_hf(tmp_path / "run" / "checkpoints", tmp_path / "kept")
    assert (back / "tokenizer_config.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 MB", 1_500_000), ("2GiB", 1 << 31), ("700", 700)]
)
def test_sizes_are_read_as_people_write_them(text, size):
    assert convert.bytes_of(text) == size


@pytest.mark.parametrize("text", ["", "GB", "0", "-1GB", "5XB", "1e9", "nan"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="--max_shard_size"):
        convert.bytes_of(text)
