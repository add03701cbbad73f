"""Text to token ids and back, through any tokenizer.json, and training of a byte-level BPE."""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
from jaxtyping import Int32

from dsv3_jax.data import corpus
from dsv3_jax.data.documents import BadDocument

# The names of the released tokenizer come first (bars U+FF5C, underscores U+2581) and are what `train` uses.
_BOS = ("<\uff5cbegin\u2581of\u2581sentence\uff5c>", "[BOS]", "<s>", "<|begin_of_text|>", "<|endoftext|>")
_EOS = ("<\uff5cend\u2581of\u2581sentence\uff5c>", "[EOS]", "</s>", "<|end_of_text|>", "<|endoftext|>")
_PAD = ("<\uff5c\u2581pad\u2581\uff5c>", "<\uff5cpad\uff5c>", "[PAD]", "<pad>")
_FILL = ("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>")
SPECIAL = (_BOS[0], _EOS[0], _PAD[0], *_FILL)

# Characters encoded at a time: merging is slower than linear in text without spaces.
PIECE = 1 << 16
_SAMPLE_BYTES = 8_000_000  # of the standard library; two thirds of it


class FillIds(NamedTuple):
    """The ids that mark the parts of a fill-in-the-middle document."""

    begin: int
    hole: int
    end: int


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer.json and the ids of its control tokens.

    Attributes:
        vocab_size: rows an embedding needs: one more than the largest id.
        bos: None if the file has none.
        pad: the end-of-document id if the file has none.
        fill: None if the file lacks any of the three fill-in-the-middle tokens.
        digest: SHA-256 of the file.
    """

    path: str
    digest: str
    vocab_size: int
    bos: int | None
    eos: int
    pad: int
    fill: FillIds | None
    _text: tokenizers.Tokenizer = field(repr=False, compare=False)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """Reads a tokenizer.json.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is damaged, or has no end-of-document token.
        """
        data = _read(Path(path))
        text = _control_tokens_as_text(data, str(path))
        ids = text.get_vocab(with_added_tokens=True)
        bos, eos, pad = (next((ids[n] for n in names if n in ids), None) for names in (_BOS, _EOS, _PAD))
        if eos is None:
            raise ValueError(
                f"{path} has no token that ends a document; add one of {', '.join(map(ascii, _EOS))} to it."
            )
        return cls(
            path=str(path),
            digest=hashlib.sha256(data).hexdigest(),
            vocab_size=max(ids.values()) + 1,
            bos=bos,
            eos=eos,
            pad=eos if pad is None else pad,
            fill=FillIds(*(ids[n] for n in _FILL)) if all(n in ids for n in _FILL) else None,
            _text=text,
        )

    def encode(self, text: str) -> Int32[np.ndarray, " tokens"]:
        """The ids of a text; the names of control tokens in it are ordinary characters."""
        ids = (self._text.encode(piece, add_special_tokens=False).ids for piece in pieces(text))
        return np.fromiter(chain.from_iterable(ids), np.int32)

    def encode_marked(self, text: str) -> Int32[np.ndarray, " tokens"]:
        """The same of a text in which the names of control tokens are these tokens, such as a prompt's."""
        controls = self.controls
        names = "|".join(map(re.escape, sorted(controls, key=len, reverse=True)))
        parts = re.split(f"({names})", text) if names else [text]
        ids = ([controls[part]] if part in controls else self.encode(part) for part in parts)
        return np.fromiter(chain.from_iterable(ids), np.int32)

    @property
    def controls(self) -> dict[str, int]:
        """Control tokens by name."""
        return {token.content: id for id, token in self._text.get_added_tokens_decoder().items()}

    def decode(self, ids: Iterable[int] | Int32[np.ndarray, " tokens"]) -> str:
        """The text of ids, control tokens by name; bytes that are no UTF-8 become U+FFFD."""
        return self._text.decode([int(i) for i in ids], skip_special_tokens=False)

    def check_fits(self, vocab: int) -> None:
        """Refuses a model whose embedding has no row for some token.

        Raises:
            ValueError: naming the largest id, its token, the file and the number of rows.
        """
        if self.vocab_size > vocab:
            token = ascii(self._text.id_to_token(self.vocab_size - 1))
            raise ValueError(
                f"{self.path}: token {token} has id {self.vocab_size - 1}, but config.model.vocab is "
                f"{vocab}; set it to at least {self.vocab_size}, or choose another tokenizer."
            )


def pieces(text: str, size: int = PIECE) -> Iterator[str]:
    """A text in pieces of at most `size` characters that join to the whole.

    Cuts are made before a space that follows no white space, where byte-level tokenizers cut too, so
    tokens do not depend on the pieces; only text without such a place is cut anywhere.
    """
    start = 0
    while len(text) - start > size:
        end = _last_gap(text, start, start + size) or start + size
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def _last_gap(text: str, start: int, end: int) -> int:
    """The last space in (start, end] that follows no white space, or 0."""
    while (space := text.rfind(" ", start + 1, end + 1)) > 0:
        end = space
        while end > start and text[end - 1].isspace():
            end -= 1
        if end > start and text[end] == " ":
            return end
        end -= 1
    return 0


def train(documents: Iterable[str], vocab_size: int, path: str | os.PathLike[str]) -> Tokenizer:
    """Trains a byte-level BPE with the released control tokens and writes it to `path` at once or not at all.

    The same documents in the same order give the same file.
    """
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    least = len(alphabet) + len(SPECIAL)
    if vocab_size < least:
        raise ValueError(
            f"A vocabulary of {vocab_size} does not hold the {len(alphabet)} bytes and {len(SPECIAL)} "
            f"control tokens; ask for at least {least}."
        )
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    model.train_from_iterator(chain.from_iterable(map(pieces, documents)), trainer)
    _write(Path(path), model.to_str().encode("utf-8"))
    return Tokenizer.load(path)


def default_tokenizer(folder: str | os.PathLike[str], vocab_size: int) -> Tokenizer:
    """The tokenizer kept in a folder, trained on the standard library if it is not there yet."""
    path = default_path(folder, vocab_size)
    return Tokenizer.load(path) if path.exists() else train(_library_sample(), vocab_size, path)


def default_path(folder: str | os.PathLike[str], vocab_size: int) -> Path:
    """Where the tokenizer of a folder is kept."""
    return Path(folder, f"tokenizer-{vocab_size}.json")


def _library_sample() -> Iterator[str]:
    """Documents with the highest hashes: validation takes the lowest, so it is not trained on."""
    library, size = corpus.standard_library(_SAMPLE_BYTES), 0
    for index in np.argsort(library.hashes(), kind="stable")[::-1]:
        if size > _SAMPLE_BYTES:
            return
        try:
            document = library[int(index)]
        except BadDocument:  # reported where it is trained on, not where it is sampled
            continue
        size += len(document.encode("utf-8"))
        yield document


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise FileNotFoundError(
            f"{path}: the tokenizer cannot be read ({error.strerror}); give the path of a tokenizer.json, or "
            "train one with python -m tools.train_tokenizer."
        ) from error


def _control_tokens_as_text(data: bytes, path: str) -> tokenizers.Tokenizer:
    """The tokenizer with every control token marked special and not recognised in text.

    Released files mark only some as special (not the fill-in-the-middle tokens, for one), and a document
    that contains the name of a control token must not contain the token. Truncation and padding, which a
    file may ask for, would lose text silently and are switched off.
    """
    try:
        spec = json.loads(data)
        for token in spec.get("added_tokens", []):
            token["special"] = token["special"] or re.fullmatch(r"<.+>|\[.+\]", token["content"]) is not None
        model = tokenizers.Tokenizer.from_str(json.dumps(spec))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(
            f"{path} is not a tokenizer.json that can be read ({' '.join(str(error).split())[:300]}); "
            "delete it to have it trained again, or fetch it again."
        ) from error
    model.encode_special_tokens = True
    model.no_truncation()
    model.no_padding()
    return model


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as f:
        try:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
            os.chmod(f.name, 0o644)  # temporary files are private, a result is not
            os.replace(f.name, path)
        except BaseException:
            os.unlink(f.name)
            raise
