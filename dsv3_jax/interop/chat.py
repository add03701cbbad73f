"""Conversations as prompts, by the template in the tokenizer_config.json beside a checkpoint."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dsv3_jax.interop.tokenizer import SETTINGS, files_beside

_HERE = "CONTINUE_FROM_HERE"  # stands at the end of a message while it is rendered


class ChatTemplate:
    """A Jinja template of messages. It comes with the weights of strangers and runs in a sandbox."""

    def __init__(self, source: str, variables: Mapping[str, str] | None = None):
        """Compiles the template; variables are names of control tokens, such as bos_token.

        Raises:
            ValueError: if it is none.
        """
        self.source = source
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"The chat template cannot be read ({error}): correct it.") from None
        self._variables = dict(variables or {})

    def __call__(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The text that the model answers to.

        Raises:
            ValueError: if the template refuses the messages.
        """
        return self._render(messages, add_generation_prompt=True)

    def begun(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The text up to the last character of the last message, which the model goes on with.

        Raises:
            ValueError: if the template refuses the messages, or leaves out the last.
        """
        *before, last = messages
        marked = {**last, "content": last["content"] + _HERE}
        text, mark, _ = self._render([*before, marked], add_generation_prompt=False).rpartition(_HERE)
        if not mark:
            raise ValueError("The chat template leaves out the last message: end with one that it shows.")
        return text

    def _render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        try:
            return self._template.render(messages=messages, **variables, **self._variables)
        except jinja2.TemplateError as error:
            raise ValueError(f"The chat template does not take these messages: {error}.") from None


def chat_template(checkpoint: Path | str) -> ChatTemplate:
    """That of a checkpoint.

    Raises:
        ValueError: if it has none.
    """
    settings = _settings(checkpoint)
    source = settings.get("chat_template")
    if not isinstance(source, str):
        raise ValueError(
            f"No {SETTINGS} with a chat_template lies beside {checkpoint}: put the released one there, or "
            "leave out --chat."
        )
    return ChatTemplate(source, _names(settings))


def has_chat_template(checkpoint: Path | str) -> bool:
    """Whether there is one."""
    return isinstance(_settings(checkpoint).get("chat_template"), str)


def begins_with_bos(checkpoint: Path | str) -> bool:
    """Whether a checkpoint's prompts begin with a control token, as those of released models do."""
    return bool(_settings(checkpoint).get("add_bos_token"))


def names_bos(checkpoint: Path | str) -> bool:
    """Whether a checkpoint knows a control token that texts begin with.

    Weights of a run do not, although its tokenizer has one: its documents follow each other's end.
    """
    return "bos_token" in _names(_settings(checkpoint))


def _names(settings: Mapping[str, Any]) -> dict[str, str]:
    """Control tokens by what they are for; a name is a string, or a record that has it."""
    named = {key: settings.get(key) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
    names = {key: v.get("content") if isinstance(v, dict) else v for key, v in named.items()}
    return {key: name for key, name in names.items() if isinstance(name, str)}


def _settings(checkpoint: Path | str) -> dict[str, Any]:
    found = [path for path in files_beside(checkpoint) if path.name == SETTINGS]
    if not found:
        return {}
    try:
        return dict(json.loads(found[0].read_text("utf-8")))
    except ValueError as error:
        raise ValueError(f"{found[0]} is not a JSON object ({error}): fetch it again.") from None


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
