"""Log-probabilities of texts: `python -m experiments.score --checkpoint=DIR --input=FILE --output=FILE`.

Both files are JSONL. A line of the input is an object with "tokens", a list of ids, or "text"; its line of
the output has "logprobs" of tokens 2..n, in nats, and their "sum".
"""

import functools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging

from dsv3_jax import ops
from dsv3_jax.config import Config
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.interop import tokenizer
from dsv3_jax.interop.config import from_record
from dsv3_jax.training.metrics import write_atomically
from dsv3_jax.training.restore import CheckpointError, read_meta
from experiments import model_flags
from experiments.lines import json_lines
from experiments.scoring import Scorer

_INPUT = flags.DEFINE_string("input", None, "JSONL with tokens or text.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "The JSONL to write.", required=True)
flags.adopt_module_key_flags(model_flags)


def main(argv: list[str]) -> None:
    """Scores a file."""
    if len(argv) > 1:
        raise app.UsageError(f"{argv[1]!r} is no flag; see --help.")
    logging.set_verbosity(logging.WARNING)
    try:
        with jax.set_mesh(model_flags.mesh()):
            score_file(
                model_flags.checkpoint(),
                Path(_INPUT.value),
                Path(_OUTPUT.value),
                tokenizer_file=model_flags.tokenizer_file(),
                batch_size=model_flags.batch_size(),
                operations=model_flags.operations(),
            )
    except (ValueError, OSError, CheckpointError) as error:
        sys.exit(f"Nothing was written. {error}")


def score_file(
    checkpoint: Path,
    source: Path,
    destination: Path,
    *,
    tokenizer_file: str | None,
    batch_size: int,
    operations: ops.Ops,
) -> None:
    """Reads all lines, scores them on the mesh that is set, and writes the result at once.

    Args:
        tokenizer_file: for lines of text; None for the one beside the checkpoint.

    Raises:
        ValueError: naming file and line, if a line cannot be scored; the model has not run then.
    """
    c = from_record(read_meta(checkpoint).model_config)
    lines = list(read(source, c, checkpoint, tokenizer_file))
    scorer = Scorer.load(checkpoint, batch_size, operations)
    scores = [found.logprobs for found in scorer.score(lines)]
    records = ({"logprobs": row.tolist(), "sum": float(np.sum(row, dtype=np.float64))} for row in scores)
    write_atomically(destination, "".join(json.dumps(r, allow_nan=False) + "\n" for r in records).encode())
    print(f"{destination}: {len(lines)} lines, {sum(map(len, lines))} tokens.")


def read(source: Path, c: Config, checkpoint: Path, tokenizer_file: str | None) -> Iterator[np.ndarray]:
    """The ids of each line.

    Raises:
        ValueError: naming file and line, if it has no "tokens" or "text", or ids that the model lacks.
    """

    @functools.cache
    def text_tokenizer() -> Tokenizer:
        found = Tokenizer.load(tokenizer_file or tokenizer.find(checkpoint))
        found.check_fits(c.vocab)
        return found

    for where, record in json_lines(source):
        tokens = record.get("tokens")
        if tokens is None:
            if not isinstance(record.get("text"), str):
                raise ValueError(
                    f'{where} has neither "tokens", a list of ids, nor "text": give one of them.'
                )
            tokens = text_tokenizer().encode(record["text"]).tolist()
        yield _checked(tokens, where, c)


def _checked(tokens: Any, where: str, c: Config) -> np.ndarray:
    if not isinstance(tokens, list) or not tokens:
        raise ValueError(f"{where} has no tokens: give a list of one or more ids.")
    wrong = [t for t in tokens if type(t) is not int or not 0 <= t < c.vocab]
    if wrong:
        raise ValueError(f"{where} has the token {wrong[0]!r}, but ids are integers from 0 to {c.vocab - 1}.")
    if len(tokens) - 1 > c.max_length:
        raise ValueError(
            f"{where} has {len(tokens)} tokens, but the model's positions end at {c.max_length}: cut "
            "the line."
        )
    return np.array(tokens, np.int32)


if __name__ == "__main__":
    app.run(main)
