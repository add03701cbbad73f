"""Text from a checkpoint: `python -m experiments.generate --checkpoint=DIR --prompt='def main'`.

With `--input=FILE.jsonl --output=FILE.jsonl` many at once: a line of the input has "prompt", "tokens" or, for
`--chat`, "messages", and its line of the output "text", "tokens", "logprobs" and "finish_reason". On several
hosts start the same command on each; the first one writes.
"""

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging

from dsv3_jax import mesh
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.request import Limits, Request
from dsv3_jax.inference.text import Stream
from dsv3_jax.interop import tokenizer
from dsv3_jax.interop.chat import ChatTemplate, begins_with_bos, chat_template
from dsv3_jax.interop.config import from_record
from dsv3_jax.training import runtime
from dsv3_jax.training.metrics import write_atomically
from dsv3_jax.training.restore import CheckpointError, read_meta
from experiments.lines import json_lines
from experiments.run import PRECISIONS
from experiments.weights import HOLD, served
from experiments.writing import write

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "A run's work directory, or converted weights.", required=True
)
_PROMPT = flags.DEFINE_string("prompt", None, "What to go on from; with --chat, what to answer.")
_INPUT = flags.DEFINE_string("input", None, "JSONL with prompts.")
_OUTPUT = flags.DEFINE_string("output", None, "The JSONL to write.")
_CHAT = flags.DEFINE_bool("chat", False, "Put prompts into the checkpoint's chat template.")
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "A tokenizer.json; else the one beside the checkpoint.")
_SPECULATIVE = flags.DEFINE_bool("speculative", False, "Let multi-token prediction draft.")
_MOST = flags.DEFINE_integer("max_tokens", 128, "Tokens to give at most.", lower_bound=1)
_LENGTH = flags.DEFINE_integer("length", None, "Tokens of prompt and text; else what the model is meant for.")
_SLOTS = flags.DEFINE_integer("slots", 8, "Texts at once; rounded up to a multiple of the devices.", 1)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token.", lower_bound=0.0)
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Draw from the likeliest tokens of this probability.", 0.0, 1.0)
_TOP_K = flags.DEFINE_integer("top_k", 0, "Draw from so many likeliest tokens; 0 for all.", lower_bound=0)
_SEED = flags.DEFINE_integer("seed", 0, "Of the first text; the next ones have the next seeds.")
_STOP = flags.DEFINE_multi_string("stop", [], "A string before which a text ends; give several if you like.")
_MESH_EXPERT = flags.DEFINE_integer("mesh_expert", 1, "Devices on the expert axis.", lower_bound=1)
_PRECISION = flags.DEFINE_enum("precision", "float32", list(PRECISIONS), "Of products.")
_WEIGHTS = flags.DEFINE_enum("weights", "as_products", list(HOLD), "How linear layers are held in memory.")


def main(argv: list[str]) -> None:
    """Writes what is asked for."""
    if len(argv) > 1:
        raise app.UsageError(f"{argv[1]!r} is no flag; see --help.")
    if (_PROMPT.value is None) == (_INPUT.value is None) or (_INPUT.value is None) != (_OUTPUT.value is None):
        raise app.UsageError("Give --prompt=TEXT, or --input=FILE and --output=FILE.")
    logging.set_verbosity(logging.WARNING)
    with contextlib.redirect_stdout(sys.stderr):  # text alone goes to the other
        runtime.start_distributed()
    with runtime.Witness():
        try:
            data = max(1, jax.device_count() // _MESH_EXPERT.value)
            with jax.set_mesh(mesh.make_mesh(1, data, _MESH_EXPERT.value)):
                _run(Path(_CHECKPOINT.value))
        except (ValueError, OSError, CheckpointError) as error:
            sys.exit(f"Nothing was written. {error}")


def _run(checkpoint: Path) -> None:
    meta = read_meta(checkpoint)
    c = from_record(meta.model_config)
    text = Tokenizer.load(_TOKENIZER.value or tokenizer.find(checkpoint))
    text.check_fits(c.vocab)
    template = chat_template(checkpoint) if _CHAT.value else None
    prompts = [("--prompt", {"prompt": _PROMPT.value})]
    if _INPUT.value is not None:
        prompts = list(json_lines(Path(_INPUT.value)))
    bos = [text.bos] if text.bos is not None and begins_with_bos(checkpoint) else []
    ids = [_ids(record, where, text, template, bos) for where, record in prompts]
    devices = jax.sharding.get_mesh().size
    limits = Limits(
        slots=-(-min(_SLOTS.value, max(1, len(ids))) // devices) * devices,
        length=_LENGTH.value or c.max_length,
        drafts=int(_SPECULATIVE.value),
    )
    operations = PRECISIONS[_PRECISION.value]()
    engine = Engine(served(checkpoint, c, meta, operations, HOLD[_WEIGHTS.value]), c, operations, limits)
    sampling: dict[str, Any] = {
        "temperature": _TEMPERATURE.value,
        "top_p": _TOP_P.value,
        "top_k": _TOP_K.value,
    }
    requests = [
        Request(prompt=p, most=_MOST.value, ends=(text.eos,), seed=_SEED.value + n, **sampling)
        for n, p in enumerate(ids)
    ]
    first = jax.process_index() == 0
    told = sys.stdout if first and _OUTPUT.value is None else None
    streams = [Stream(text, _STOP.value, request.ends) for request in requests]
    results = write(engine, requests, streams, told)
    if not first:
        return
    if _OUTPUT.value:
        lines = (json.dumps(result, allow_nan=False) + "\n" for result in results)
        write_atomically(Path(_OUTPUT.value), "".join(lines).encode())
    else:
        print()
    counts = engine.counts
    drafted = f", {counts.acceptance:.0%} of drafts right" if limits.drafts else ""
    print(
        f"{counts.prompt_tokens} tokens read, {counts.tokens} given, {counts.tokens_per_step:.2f} a step"
        f"{drafted}.",
        file=sys.stderr,
    )


def _ids(
    record: dict[str, Any], where: str, text: Tokenizer, template: ChatTemplate | None, bos: list[int]
) -> list[int]:
    """The prompt of a line."""
    tokens, prompt, messages = (record.get(key) for key in ("tokens", "prompt", "messages"))
    if template is not None:
        messages = messages or [{"role": "user", "content": prompt}]
        return text.encode_marked(template(messages)).tolist()
    if isinstance(tokens, list) and all(type(t) is int for t in tokens):
        return tokens
    if not isinstance(prompt, str):
        raise ValueError(f'{where} has neither "prompt", a text, nor "tokens", a list of ids: give one.')
    return [*bos, *text.encode(prompt).tolist()]


if __name__ == "__main__":
    app.run(main)
