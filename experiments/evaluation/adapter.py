"""A model of ours for lm-evaluation-harness, in this process and on the mesh that is set."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from dsv3_jax.config import Config
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.request import Limits, Request
from dsv3_jax.inference.text import Stream
from dsv3_jax.interop import chat, tokenizer
from dsv3_jax.interop.config import from_record
from dsv3_jax.ops import Ops
from dsv3_jax.training.restore import read_meta
from experiments.scoring import Scorer
from experiments.weights import served
from experiments.writing import write

Tokens = list[int]

# What tasks ask of transformers that changes nothing here.
_NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0}
_MOST = 256  # tokens to give where a task does not say, as the harness has it


@dataclass(frozen=True)
class Source:
    """A checkpoint, and how it is computed with.

    Attributes:
        max_length: positions of the model; those it is meant for if None.
        batch_size: sequences at once; rounded up to a multiple of the devices.
    """

    checkpoint: Path
    ops: Ops
    batch_size: int = 8
    max_length: int | None = None
    tokenizer_file: str | None = None


class Harness(TemplateLM):
    """All that the harness asks of a model, by the rules of its Hugging Face back-end.

    To the harness this is one process of one (`rank` 0, `world_size` 1), however many run: where a mesh spans
    processes, its programs need all of them, so each asks every question, and each gets every answer.
    The harness would otherwise give each process questions of its own. Only the first should write
    results.
    """

    backend = "causal"

    def __init__(self, source: Source):
        """Reads sizes and tokenizer; weights are loaded when the first question needs them.

        Raises:
            ValueError: if the tokenizer does not fit the model.
        """
        super().__init__()
        self.source = source
        self._meta = read_meta(source.checkpoint)
        self.c: Config = from_record(self._meta.model_config)
        self.text = Tokenizer.load(source.tokenizer_file or tokenizer.find(source.checkpoint))
        self.text.check_fits(self.c.vocab)
        self.max_length = source.max_length or self.c.max_length
        known = self.text.bos is not None and chat.names_bos(source.checkpoint)
        self._bos = self.text.bos if known else None
        self._begins = self._bos is not None and chat.begins_with_bos(source.checkpoint)

    @cached_property
    def scorer(self) -> Scorer:
        """For given tokens."""
        return Scorer.load(self.source.checkpoint, self.source.batch_size, self.source.ops)

    @cached_property
    def engine(self) -> Engine:
        """For texts."""
        devices = jax.sharding.get_mesh().size
        slots = -(-self.source.batch_size // devices) * devices
        weights = served(self.source.checkpoint, self.c, self._meta, self.source.ops)
        limits = Limits(slots=slots, length=self.max_length, drafts=0)
        return Engine(weights, self.c, self.source.ops, limits)

    @property
    def eot_token_id(self) -> int:
        """The end of a document."""
        return self.text.eos

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        return self.text.eos if self._bos is None else self._bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> Tokens:
        """The ids of a text, in which names of control tokens are these tokens."""
        ids = self.text.encode_marked(string).tolist()
        named = add_special_tokens is None and ids[:1] == [self._bos]
        begins = self._begins and add_special_tokens is not False and not named
        return [self.prefix_token_id, *ids] if begins else ids

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str] | None, Tokens, Tokens]], **options: Any
    ) -> list[tuple[float, bool]]:
        """log p of each continuation, and whether each of its tokens is the likeliest."""
        lines = []
        for _, context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise ValueError(
                    f"A continuation has {len(continuation)} tokens, but from 1 to {self.max_length} can be "
                    "scored: choose a task of other lengths, or raise --max_length."
                )
            lines.append(np.array([*context, *continuation][-(self.max_length + 1) :], np.int32))
        answers = []
        for (asked, _, continuation), found in zip(requests, self.scorer.score(lines), strict=True):
            last = slice(-len(continuation), None)
            greedy = bool(np.array_equal(found.likeliest[last], continuation))
            answers.append((float(np.sum(found.logprobs[last], dtype=np.float64)), greedy))
            if asked is not None:
                self.cache_hook.add_partial("loglikelihood", asked, answers[-1])
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: Any = False) -> list[float]:
        """log p of whole texts: windows as long as the model, in which each token is scored once."""
        windows, owners = [], []
        for n, request in enumerate(requests):
            pairs = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
            )
            for context, scored in map(make_disjoint_window, pairs):
                windows.append((None, context, scored))
                owners.append(n)
        sums = [0.0] * len(requests)
        for n, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[n] += logprob
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: Any = False) -> list[str]:
        """Goes on with each context until a stop string, the end of a document, or as far as is asked."""
        eos = self.text.decode([self.text.eos])
        pairs: list[Any] = [request.args for request in requests]
        asked = [self._request(n, context, kwargs) for n, (context, kwargs) in enumerate(pairs)]
        stops = [handle_stop_sequences(_plain(kwargs)["until"], eos) for _, kwargs in pairs]
        silent = set(self.text.controls.values())
        streams = [Stream(self.text, [stop for stop in until if stop], silent) for until in stops]
        texts = [
            # The harness looks for each stop string in what the others have left.
            postprocess_generated_text(result["text"], until, None)
            for result, until in zip(write(self.engine, asked, streams), stops, strict=True)
        ]
        for pair, text in zip(pairs, texts, strict=True):
            self.cache_hook.add_partial("generate_until", pair, text)
        return texts

    def _request(self, n: int, context: str, kwargs: dict[str, Any]) -> Request:
        asked = _plain(kwargs)
        most, sampled = asked["max_gen_toks"], asked["do_sample"]
        if most >= self.max_length:
            raise ValueError(
                f"The task asks for {most} tokens, but context and text have {self.max_length} together: "
                "give --gen_kwargs=max_gen_toks=N."
            )
        return Request(
            prompt=self.tok_encode(context)[-(self.max_length - most) :],
            most=most,
            ends=(self.text.eos,),
            temperature=float(asked.get("temperature", 1.0)) if sampled else 0.0,
            top_k=int(asked.get("top_k", 0)),
            top_p=float(asked.get("top_p", 1.0)),
            seed=n,
        )

    @property
    def tokenizer_name(self) -> str:
        """Tells contexts of one tokenizer from those of another, where the harness keeps them."""
        return f"{Path(self.text.path).name}-{self.text.digest[:16]}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template that contexts are put into, if they are."""
        return self._template.source if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: Any = True
    ) -> str:
        """A conversation as text; without a prompt, its last message is what the model goes on with."""
        apply = self._template if add_generation_prompt else self._template.begun
        try:
            return apply(chat_history)
        except ValueError:  # some templates know no system, and the harness goes on without
            without = [message for message in chat_history if message["role"] != "system"]
            if len(without) == len(chat_history):
                raise
            return apply(without)

    @cached_property
    def _template(self) -> chat.ChatTemplate:
        return chat.chat_template(self.source.checkpoint)


def _plain(kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a task asks of generation, by one name each.

    Raises:
        ValueError: if it asks for something that is not built.
    """
    known = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}
    asked: dict[str, Any] = dict(normalize_gen_kwargs(kwargs, _MOST))
    wrong = {
        key: value
        for key, value in asked.items()
        if key not in known and (key not in _NEUTRAL or value != _NEUTRAL[key])
    }
    if wrong:
        raise ValueError(
            f"The task asks for generation with {wrong}, which is not known here: choose a task that samples "
            "by temperature, top_k and top_p."
        )
    return asked
