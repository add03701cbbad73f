"""Perplexity and bits per byte of texts: `python -m experiments.perplexity --checkpoint=DIR --corpus=GLOB`.

A corpus is a file, a folder or a glob of text, JSONL, Parquet or ArrayRecord, or `stdlib`; give several for a
line each. What is measured is defined in `experiments/evaluation/perplexity.py`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax
from absl import app, flags

from dsv3_jax.data import corpus
from dsv3_jax.data.config import Data
from dsv3_jax.data.corpus import Subset
from dsv3_jax.data.documents import ON_BAD, BadDocument, Documents, OnBad, Skipped
from dsv3_jax.interop import chat
from dsv3_jax.training.metrics import write_atomically
from dsv3_jax.training.restore import CheckpointError
from experiments import model_flags
from experiments.evaluation.perplexity import Reader, measure
from experiments.scoring import Scorer

_CORPUS = flags.DEFINE_multi_string("corpus", None, "Text; give several if you like.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "The JSON to write; else figures are printed alone.")
_TEXT_KEY = flags.DEFINE_string("text_key", "text", "Of JSONL objects and Parquet tables.")
_HELD_OUT = flags.DEFINE_float(
    "held_out", None, "Only the texts that a run with this validation_fraction held out.", 0.0, 1.0
)
_ON_BAD = flags.DEFINE_enum("on_bad", "error", sorted(ON_BAD), "What to do about texts that cannot be read.")
_LENGTH = flags.DEFINE_integer("length", None, "Positions of a window; else what the model is meant for.", 1)
_STRIDE = flags.DEFINE_integer("stride", None, "Tokens between windows; else half of one.", lower_bound=1)
flags.adopt_module_key_flags(model_flags)


def main(argv: list[str]) -> None:
    """Measures, prints a line for each corpus, and writes what is asked for."""
    if len(argv) > 1:
        raise app.UsageError(f"{argv[1]!r} is no flag; see --help.")
    try:
        with jax.set_mesh(model_flags.mesh()):
            records = _measured(model_flags.checkpoint())
        if _OUTPUT.value:
            write_atomically(Path(_OUTPUT.value), (json.dumps(records, indent=1) + "\n").encode())
    except BadDocument as bad:
        sys.exit(
            f"Nothing was written. {bad.where}: {bad.problem}; repair or remove it, or give --on_bad=skip."
        )
    except (ValueError, OSError, CheckpointError) as error:
        sys.exit(f"Nothing was written. {error}")
    for name, record in records.items():
        print(name, *(f"{key}={_short(value)}" for key, value in record.items()), sep="  ")


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _measured(checkpoint: Path) -> dict[str, dict[str, Any]]:
    text = model_flags.tokenizer()
    on_bad = ON_BAD[_ON_BAD.value]
    skipped = {path: Skipped() for path in _CORPUS.value}
    sources = {path: _open(path, on_bad, skipped[path]) for path in skipped}
    scorer = Scorer.load(checkpoint, model_flags.batch_size(), model_flags.operations())
    text.check_fits(scorer.c.vocab)
    length = _LENGTH.value or scorer.c.max_length
    stride = _STRIDE.value or max(1, length // 2)
    before = text.bos if text.bos is not None and chat.names_bos(checkpoint) else text.eos
    records: dict[str, dict[str, Any]] = {}
    for path, documents in sources.items():
        reader = Reader(text.encode, before, length, stride, on_bad, skipped[path])
        records[path] = measure(scorer, reader, documents).record()
        records[path] |= {"length": length, "stride": stride, "skipped": skipped[path].counts()}
    return records


def _open(path: str, on_bad: OnBad, skipped: Skipped) -> Documents | Subset:
    documents = corpus.open_source(path, _TEXT_KEY.value, Data().max_document_bytes, on_bad, skipped)
    if _HELD_OUT.value is None:
        return documents
    return corpus.split(documents, _HELD_OUT.value)[1]


if __name__ == "__main__":
    app.run(main)
