"""What cannot be converted is refused in a sentence that names tensor and file, and nothing is written."""

import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from tests.interop import released
from tests.interop.released import BF16, DIRECT, E4M3, F32, TINY
from tools import convert

REPOSITORY = Path(__file__).parents[2]


def from_hf(source, destination):
    convert.from_hf(source, destination, jnp.dtype(jnp.bfloat16))
    return destination


def to_hf(source, destination):
    convert.to_hf(source, destination, convert.FORMS["bfloat16", "float32"], 10**9)
    return destination


def edited(edit):
    """A source whose tensors or configuration were changed."""

    def make(directory):
        weights, keys = released.tensors(TINY), released.config(TINY)
        edit(weights, keys)
        return released.write(directory, weights, keys)

    return make


def quantised(edit):
    """The same for a source in FP8."""

    def make(directory):
        weights = released.quantised(released.tensors(TINY), TINY)
        keys = released.config(TINY, **released.FP8_CONFIG)
        edit(weights, keys)
        return released.write(directory, weights, keys)

    return make


def keys(**changes):
    return edited(lambda _, config: config.update(changes))


def put(name, change):
    return edited(lambda weights, _: weights.update({name: change(weights[name])}))


def put8(name, change):
    return quantised(lambda weights, _: weights.update({name: change(weights[name])}))


def drop(name):
    return edited(lambda weights, _: weights.pop(name))


def last(value):
    """Replaces the last element."""

    def change(array):
        out = array.copy()
        out.reshape(-1)[-1] = value
        return out

    return change


EXPERT = "model.layers.2.mlp.experts.7.up_proj.weight"
SCALE = EXPERT + "_scale_inv"
CORRECTION = "model.layers.1.mlp.gate.e_score_correction_bias"
HEAD = "lm_head.weight"
COPY = "model.layers.3.embed_tokens.weight"
NORM = "model.layers.3.enorm.weight"

REFUSED = {
    "missing": (drop(EXPERT), EXPERT),
    "missing_one_of_mtp": (drop(NORM), NORM),
    "extra": (edited(lambda w, _: w.update(a=np.ones(1, F32))), "tensor a in .*no place"),
    "extra_mtp": (keys(num_nextn_predict_layers=0), "layers.3.*no place"),
    "shape": (put(EXPERT, lambda x: x[1:]), rf"{EXPERT} .*\[15, 32\].*\[16, 32\]"),
    "transposed": (put(EXPERT, lambda x: np.ascontiguousarray(x.T)), rf"{EXPERT} .*\[32, 16\]"),
    "type": (put(EXPERT, lambda x: x.astype(np.float16)), f"{EXPERT} .*F16"),
    "nan": (put(EXPERT, last(np.nan)), f"{EXPERT} .*NaN"),
    "infinity": (put(HEAD, last(-np.inf)), f"{HEAD} .*infinite"),
    "nan_in_the_bias": (put(CORRECTION, last(np.nan)), f"{CORRECTION} .*NaN"),
    "overflow": (put(HEAD, lambda x: last(3.4e38)(x.astype(F32))), f"{HEAD} .*infinite"),
    "copy_differs": (put(COPY, lambda x: x * 2), f"{COPY} .*differs"),
    "fp8_unannounced": (put(EXPERT, lambda x: x.astype(E4M3)), f"{EXPERT} .*quantization_config"),
    "fp8_nan": (put8(EXPERT, last(np.nan)), f"{EXPERT} .*NaN"),
    "fp8_without_scale": (quantised(lambda w, _: w.pop(SCALE)), f"{SCALE} is missing"),
    "scale_shape": (put8(SCALE, lambda x: np.ones((2, 1), F32)), rf"{SCALE} .*\[2, 1\]"),
    "scale_type": (put8(SCALE, lambda x: x.astype(np.float64)), f"{SCALE} .*F64"),
    "scale_zero": (put8(SCALE, last(0.0)), f"{SCALE} .*above zero"),
    "scale_negative": (put8(SCALE, last(-1.0)), f"{SCALE} .*above zero"),
    "scale_nan": (put8(SCALE, last(np.nan)), f"{SCALE} .*not finite"),
    "scale_infinite": (put8(SCALE, last(np.inf)), f"{SCALE} .*not finite"),
    "scale_of_nobody": (put8(EXPERT, lambda x: x.astype(BF16)), f"{SCALE} .*no place"),
    "unknown_scoring": (keys(scoring_func="softmax"), "scoring_func"),
    "unknown_rope": (keys(rope_scaling={"type": "llama3"}), "llama3"),
}


@pytest.mark.parametrize(("make", "named"), REFUSED.values(), ids=REFUSED)
def test_a_checkpoint_that_cannot_be_converted_is_refused_by_name(tmp_path, make, named):
    source = make(tmp_path / "source")
    with pytest.raises(ValueError, match=named) as error:
        from_hf(source, tmp_path / "ours")
    assert str(source / "model.safetensors") in str(error.value) or str(source / "config.json") in str(
        error.value
    )
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_many_problems_are_listed_up_to_a_number(tmp_path):
    source = released.write(tmp_path / "source", {"a": np.ones(1, F32)}, released.config(DIRECT))
    with pytest.raises(ValueError) as error:
        from_hf(source, tmp_path / "ours")
    *listed, rest = str(error.value).splitlines()
    assert len(listed) == 20 and all("is missing from" in line for line in listed)
    assert rest.startswith("... and ") and rest.endswith(" more.")


def test_a_destination_that_is_not_empty_is_left_as_it_is(tmp_path):
    source = released.write(tmp_path / "source", released.tensors(DIRECT), released.config(DIRECT))
    ours = from_hf(source, tmp_path / "ours")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    for run, first in ((from_hf, source), (to_hf, ours)):
        with pytest.raises(FileExistsError, match="full exists and is not empty"):
            run(first, tmp_path / "full")
        assert [p.name for p in (tmp_path / "full").iterdir()] == ["mine"]


def test_a_damaged_checkpoint_of_ours_is_not_exported(tmp_path):
    source = released.write(tmp_path / "source", released.tensors(DIRECT), released.config(DIRECT))
    ours = from_hf(source, tmp_path / "ours")
    files = (ours / "0" / "model" / "model.head").rglob("*")
    file = next(p for p in files if p.is_file() and p.name != "zarr.json")
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.head"):
        to_hf(ours, tmp_path / "back")
    assert {p.name for p in tmp_path.iterdir()} == {"source", "ours"}


def test_the_command_converts_and_says_what_is_wrong_in_one_sentence(tmp_path):
    def command(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "tools.convert", *map(str, arguments)],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=120,
        )

    source = released.write(tmp_path / "source", released.tensors(DIRECT), released.config(DIRECT))
    done = command("from-hf", source, tmp_path / "ours", "--dtype=float32")
    assert done.returncode == 0 and "parameters" in done.stdout and "/s" in done.stdout, done
    again = command("from-hf", source, tmp_path / "ours")
    assert again.returncode == 1 and "not empty" in again.stderr, again
    assert "Traceback" not in again.stderr
    wrong = command("from-hf", source, tmp_path / "other", "--dtype=float8")
    assert wrong.returncode == 1 and "choose bfloat16 or float32" in wrong.stderr, wrong
