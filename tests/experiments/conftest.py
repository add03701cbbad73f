"""A small checkpoint with a tokenizer and a chat template, as released ones are."""

import json
from dataclasses import replace

import jax.numpy as jnp
import pytest

from dsv3_jax.data import tokenizer
from tests.interop import released
from tools import convert

C = replace(released.TINY, vocab=300)
WORDS = "the quick brown fox jumps over the lazy dog and then some"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("generate")
    released.write(directory / "source", released.tensors(C, released.F32), released.config(C))
    convert.from_hf(directory / "source", directory / "ours", jnp.dtype(jnp.float32))
    tokenizer.train([WORDS] * 3, 290, directory / "ours" / "tokenizer.json")
    settings = {"chat_template": "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"}
    settings["bos_token"] = tokenizer.SPECIAL[0]
    (directory / "ours" / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory / "ours"
