"""Questions made of the standard library's text that runs do not train on; the same for one Python.

The harness reads this file by its place, beside the tasks that name its functions.
"""

import io
import keyword
import re
import tokenize
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict

from dsv3_jax.data.tokenizer import SPECIAL
from experiments.evaluation.library import docstrings, held_out, is_code

_QUESTIONS = 200
_SHOTS = 20  # questions that may be shown before others, of a file that is not asked about
_BEFORE, _AFTER = 800, 400  # characters
_CHOICES = 4
_DOCUMENT = 1 << 14  # characters of a text for perplexity; longer ones end there
_BEGIN, _HOLE, _END = SPECIAL[3:6]

Question = dict[str, Any]
Maker = Callable[[str, np.random.Generator], Iterator[Question]]


def next_line(**_: Any) -> DatasetDict:
    """The line of code that follows, among lines of the same file that do not."""
    return _asked(_next_lines)


def fill_in_middle(**_: Any) -> DatasetDict:
    """A name that is missing in code, where what comes after is known; also among other names of the file."""
    return _asked(_missing_names)


def code(**_: Any) -> DatasetDict:
    """Files as they are."""
    return _texts(_files())


def prose(**_: Any) -> DatasetDict:
    """The docstrings of each file, one after another."""
    return _texts(["\n\n".join(docstrings(text)) for text in _files()])


@cache
def _files() -> list[str]:
    """Source that is held out; code pages, which are tables of characters, are left out."""
    return [text for text in held_out() if is_code(text) and len(re.findall(r"\\x|\\u|0x", text)) < 100]


def _asked(maker: Maker) -> DatasetDict:
    *asked, shown = _files()
    drawn = {"test": _drawn(maker, asked, _QUESTIONS), "validation": _drawn(maker, [shown], _SHOTS)}
    return DatasetDict({name: Dataset.from_list(questions) for name, questions in drawn.items()})


def _drawn(maker: Maker, texts: list[str], most: int) -> list[Question]:
    rng = np.random.default_rng(0)
    found = [question for text in texts for question in maker(text, rng)]
    return [found[n] for n in rng.permutation(len(found))[:most]]


def _next_lines(text: str, rng: np.random.Generator) -> Iterator[Question]:
    lines = text.splitlines(keepends=True)
    telling = [line.rstrip() for line in lines if len(line.strip()) >= 10]
    start = 0
    for line in lines:
        if line.rstrip() in telling and start >= _BEFORE // 4:
            yield {"before": text[:start][-_BEFORE:], **_choices(line.rstrip(), telling, rng)}
        start += len(line)


def _missing_names(text: str, rng: np.random.Generator) -> Iterator[Question]:
    starts = np.cumsum([0, *map(len, text.splitlines(keepends=True))])
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    names = [t for t in tokens if t.type == tokenize.NAME and not keyword.iskeyword(t.string)]
    others = [t.string for t in names if len(t.string) >= 3]
    for token in names:
        start = int(starts[token.start[0] - 1]) + token.start[1]
        if token.string in others and start >= _BEFORE // 4:
            end = start + len(token.string)
            before, after = text[:start][-_BEFORE:], text[end : end + _AFTER]
            prompt = f"{_BEGIN}{before}{_HOLE}{after}{_END}"
            yield {"prompt": prompt, "middle": token.string, **_choices(token.string, others, rng)}


def _choices(right: str, others: list[str], rng: np.random.Generator) -> Question:
    """The right answer at a place by chance among wrong ones; `others` has it too."""
    wrong = sorted(set(others) - {right})
    choices = [wrong[n] for n in rng.permutation(len(wrong))[: _CHOICES - 1]]
    place = int(rng.integers(len(choices) + 1))
    return {"choices": [*choices[:place], right, *choices[place:]], "answer": place}


def _texts(texts: list[str]) -> DatasetDict:
    return DatasetDict({"test": Dataset.from_list([{"text": text[:_DOCUMENT]} for text in texts if text])})
