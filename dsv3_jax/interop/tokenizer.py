"""Finds the tokenizer files that lie beside weights."""

import re
from pathlib import Path

SETTINGS = "tokenizer_config.json"  # of the PyTorch side: a chat template and names, no vocabulary


def files_beside(checkpoint: Path | str) -> list[Path]:
    """All tokenizer*.json of a checkpoint: in its folder and, if a run wrote it, in those around it."""
    return [
        p for place in _places(Path(checkpoint).absolute()) for p in sorted(place.glob("tokenizer*.json"))
    ]


def find(checkpoint: Path | str) -> Path:
    """The one tokenizer of a checkpoint.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if there are several.
    """
    found = [p for p in files_beside(checkpoint) if p.name != SETTINGS]
    if not found:
        raise FileNotFoundError(
            f"No tokenizer*.json lies beside {checkpoint}: give one with --tokenizer=FILE."
        )
    if len(found) > 1:
        raise ValueError(
            f"Several tokenizers lie beside {checkpoint}, {', '.join(p.name for p in found)}: choose "
            "one with "
            "--tokenizer=FILE."
        )
    return found[0]


def exported_name(file: Path) -> str:
    """What a file is called in a released folder, where runs put the size of the vocabulary into the name."""
    return re.sub(r"^tokenizer-\d+\.json$", "tokenizer.json", file.name)


def _places(checkpoint: Path) -> list[Path]:
    """The folder that was given, and those above it as far as they are of the same run."""
    places = [checkpoint]
    if checkpoint.name.isdigit():  # a step
        places.append(checkpoint.parent)
    if places[-1].name == "checkpoints":
        places.append(places[-1].parent)
    return places
