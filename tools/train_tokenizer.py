"""Trains a byte-level BPE tokenizer: `python -m tools.train_tokenizer --output=tokenizer.json`."""

import time
from collections.abc import Iterator
from pathlib import Path

from absl import app, flags

from dsv3_jax.data import corpus, tokenizer
from dsv3_jax.data.documents import ON_BAD, BadDocument, OnBad, Skipped

_OUTPUT = flags.DEFINE_string("output", None, "The tokenizer.json to write.", required=True)
_VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 4096, "Tokens, control tokens included.", lower_bound=1)
_SOURCE = flags.DEFINE_multi_string(
    "source",
    [corpus.STDLIB],
    "A file, folder or glob of text, JSONL, Parquet or ArrayRecord; may be repeated.",
)
_TEXT_KEY = flags.DEFINE_string("text_key", "text", "The key of the text in JSONL and Parquet.")
_VALIDATION = flags.DEFINE_float("validation_fraction", 0.02, "Documents kept out, as in config.data.", 0, 1)
_ON_BAD = flags.DEFINE_enum("on_bad", "error", sorted(ON_BAD), "What a record that cannot be read leads to.")
_LIMIT = flags.DEFINE_integer("max_document_bytes", 1 << 24, "Longer documents are bad ones.", lower_bound=1)
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace the output file if it is there.")


def main(argv: list[str]) -> None:
    """Trains, writes, and says what was written."""
    if len(argv) > 1:
        raise app.UsageError(f"{argv[1]!r} is no flag; name sources as --source=PATH.")
    output = Path(_OUTPUT.value)
    if output.exists() and not _OVERWRITE.value:
        raise app.UsageError(f"{output} is there already; choose another --output, or say --overwrite.")
    skipped, start = Skipped(), time.monotonic()
    try:
        made = tokenizer.train(_documents(ON_BAD[_ON_BAD.value], skipped), _VOCAB_SIZE.value, output)
    except (ValueError, FileNotFoundError) as error:
        raise app.UsageError(str(error)) from error
    seconds = time.monotonic() - start
    print(f"{output}: {made.vocab_size} tokens in {seconds:.1f} seconds, SHA-256 {made.digest}.")
    if made.vocab_size < _VOCAB_SIZE.value:
        print(f"The text has too few different pairs for the {_VOCAB_SIZE.value} tokens asked for.")
    for reason, count in skipped.counts().items():
        print(f"Skipped {count} documents: {reason}.")


def _documents(on_bad: OnBad, skipped: Skipped) -> Iterator[str]:
    """The training documents of all sources."""
    for path in _SOURCE.value:
        documents = corpus.open_source(path, _TEXT_KEY.value, _LIMIT.value, on_bad, skipped)
        training, _ = corpus.split(documents, _VALIDATION.value)
        for index in range(len(training)):
            try:
                yield training[index]
            except BadDocument as bad:
                on_bad(bad, skipped)


if __name__ == "__main__":
    app.run(main)
