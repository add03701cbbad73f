"""An OpenAI-compatible server: `python -m experiments.serve --checkpoint=DIR [--port=8000]`.

It answers /v1/completions, /v1/chat/completions, /v1/models, /health and /metrics, and has a page at /.
It listens on this machine alone unless --host says otherwise; then set DSV3_API_KEY too. Needs the extra
[serve]. On SIGTERM what is under way is finished, and nothing new is taken. On several hosts start the same
command on each, and send all of them the signal; the first one listens.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import uvicorn
from absl import app, flags, logging

from dsv3_jax import mesh
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.inference import request
from dsv3_jax.inference.engine import Engine
from dsv3_jax.interop import tokenizer
from dsv3_jax.interop.chat import begins_with_bos, chat_template, has_chat_template
from dsv3_jax.interop.config import from_record
from dsv3_jax.training import runtime
from dsv3_jax.training.restore import CheckpointError, read_meta
from experiments.run import PRECISIONS
from experiments.serving import ensemble
from experiments.serving.app import Limits, Service
from experiments.serving.worker import Worker
from experiments.weights import HOLD, served

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "A run's work directory, or converted weights.", required=True
)
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "A tokenizer.json; else the one beside the checkpoint.")
_NAME = flags.DEFINE_string("name", None, "What the model is called; else as its folder.")
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Where to listen.")
_PORT = flags.DEFINE_integer("port", 8000, "Where to listen; 0 for any that is free.", 0, 65535)
_SLOTS = flags.DEFINE_integer("slots", 8, "Texts at once; rounded up to a multiple of the devices.", 1)
_LENGTH = flags.DEFINE_integer("length", None, "Tokens of prompt and text; else what the model is meant for.")
_SPECULATIVE = flags.DEFINE_bool("speculative", True, "Let multi-token prediction draft, where there is one.")
_WAITING = flags.DEFINE_integer("most_requests", 256, "Answers under way and waiting; others get 429.", 1)
_SECONDS = flags.DEFINE_float("most_seconds", 600.0, "That an answer may take.", lower_bound=0.1)
_BYTES = flags.DEFINE_integer("most_bytes", 1_000_000, "Of a request.", lower_bound=1)
_MESH_EXPERT = flags.DEFINE_integer("mesh_expert", 1, "Devices on the expert axis.", lower_bound=1)
_PRECISION = flags.DEFINE_enum("precision", "bfloat16", list(PRECISIONS), "Of products.")
_WEIGHTS = flags.DEFINE_enum("weights", "as_products", list(HOLD), "How linear layers are held in memory.")


def main(argv: list[str]) -> None:
    """Serves until it is told to stop."""
    if len(argv) > 1:
        raise app.UsageError(f"{argv[1]!r} is no flag; see --help.")
    logging.set_verbosity(logging.WARNING)
    runtime.start_distributed()
    with runtime.Witness():
        try:
            data = max(1, jax.device_count() // _MESH_EXPERT.value)
            with jax.set_mesh(mesh.make_mesh(1, data, _MESH_EXPERT.value)):
                run(Path(_CHECKPOINT.value))
        except (ValueError, OSError, CheckpointError) as error:
            sys.exit(f"Nothing is served. {error}")


def run(checkpoint: Path) -> None:
    """Answers in the first process; others do as its engine does."""
    meta = read_meta(checkpoint)
    c, operations = from_record(meta.model_config), PRECISIONS[_PRECISION.value]()
    text = Tokenizer.load(_TOKENIZER.value or tokenizer.find(checkpoint))
    text.check_fits(c.vocab)
    devices, length = jax.sharding.get_mesh().size, _LENGTH.value or c.max_length
    drafts = min(int(_SPECULATIVE.value), c.mtp_depth)
    limits = request.Limits(slots=-(-_SLOTS.value // devices) * devices, length=length, drafts=drafts)
    model = served(checkpoint, c, meta, operations, HOLD[_WEIGHTS.value])
    if jax.process_index() > 0:
        with told_to_stop():
            return ensemble.follow(Engine(model, c, operations, limits), ensemble.Distributed())
    service = Service(
        worker=Worker(lambda: ensemble.leading(Engine(model, c, operations, limits)), _WAITING.value),
        text=text,
        template=chat_template(checkpoint) if has_chat_template(checkpoint) else None,
        bos=[text.bos] if text.bos is not None and begins_with_bos(checkpoint) else [],
        name=_NAME.value or checkpoint.absolute().name,
        limits=Limits(body_bytes=_BYTES.value, seconds=_SECONDS.value, length=length),
        key=os.environ.get("DSV3_API_KEY"),
    )
    config = uvicorn.Config(
        service.app(),
        _HOST.value,
        _PORT.value,
        log_level="info",
        timeout_graceful_shutdown=int(_SECONDS.value) + 1,
    )
    with told_to_stop():
        uvicorn.Server(config).run()


@contextlib.contextmanager
def told_to_stop() -> Iterator[None]:
    """Signals do not end the process: the server listens to them, finishes, and raises them once more."""
    before = [(one, signal.signal(one, lambda *_: None)) for one in (signal.SIGTERM, signal.SIGINT)]
    try:
        yield
    finally:
        for one, handler in before:
            signal.signal(one, handler)


if __name__ == "__main__":
    app.run(main)
