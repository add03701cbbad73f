"""JSONL files that users give."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def json_lines(source: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSONL file, each with the place that it stands at.

    Raises:
        ValueError: naming file and line, if a line holds no object.
    """
    with source.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{source}:{number}"
            try:
                found = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where} is not JSON ({error}): give one object a line.") from None
            if not isinstance(found, dict):
                raise ValueError(f"{where} holds a JSON {type(found).__name__}, not an object.")
            yield where, found
