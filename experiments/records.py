"""Between config sections and frozen dataclasses, refusing everything that is wrong at once."""

import dataclasses
import difflib
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from ml_collections import config_dict
from ml_collections.config_dict import ConfigDict

Record = TypeVar("Record")
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


class Refused(ValueError):
    """A config that cannot be run, with a line for each thing wrong with it."""


def record(cls: type[Record], values: Mapping[str, Any] | ConfigDict, prefix: str = "config") -> Record:
    """Builds a frozen dataclass, and those that its fields hold, from a part of a config.

    Args:
        cls: whose fields are numbers, text, tuples, such dataclasses, or None.
        values: by key; a key whose field has a default may be absent.
        prefix: what the keys are called in messages.

    Raises:
        Refused: with a line for each unknown, missing, mistyped and non-finite key, at any depth, and the
            lines of every ValueError that a dataclass raised when it checked itself.
    """
    wrong: list[str] = []
    built = _build(cls, values, prefix, wrong)
    if wrong:
        raise Refused("\n".join(wrong))
    return built


def _build(cls: Any, values: Mapping[str, Any] | ConfigDict, prefix: str, wrong: list[str]) -> Any:
    before = len(wrong)
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for name in values:
        if name not in fields:
            wrong.append(f"{prefix}.{name} is no key{nearest(name, list(fields))}: leave it out.")
    fitted = {}
    for name, field in fields.items():
        if name in values:
            fitted[name] = _fit(hints[name], values[name], f"{prefix}.{name}", wrong)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            wrong.append(f"{prefix}.{name} is missing: give {_wanted(hints[name])}.")
    if len(wrong) > before:
        return None  # `record` raises
    try:
        return cls(**fitted)
    except ValueError as error:
        wrong.extend(str(error).splitlines())
        return None


def _fit(annotation: Any, value: Any, key: str, wrong: list[str]) -> Any:
    """The value as the annotation has it, or a line added to what is wrong."""
    kinds = _alternatives(annotation)
    if value is None and kinds != (annotation,):
        return None
    for kind in kinds:
        if dataclasses.is_dataclass(kind) and isinstance(value, Mapping | ConfigDict):
            return _build(kind, value, key, wrong)
        if typing.get_origin(kind) is tuple and isinstance(value, list | tuple):
            items = typing.get_args(kind)
            items = items[:1] * len(value) if items[-1] is Ellipsis else items
            if len(items) == len(value):
                pairs = enumerate(zip(items, value, strict=True))
                return tuple(_fit(item, v, f"{key}[{n}]", wrong) for n, (item, v) in pairs)
        if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
            if abs(value) <= sys.float_info.max:  # false for NaN
                return float(value)
            wrong.append(f"{key}={value} is not finite: give an ordinary number.")
            return None
        if kind in _KINDS and type(value) is kind:
            return value
    wrong.append(f"{key}={value!r} does not fit: give {_wanted(annotation)}.")
    return None


def _wanted(annotation: Any) -> str:
    kind = _alternatives(annotation)[0]
    if dataclasses.is_dataclass(kind):
        return f"a section with {', '.join(field.name for field in dataclasses.fields(kind))}"
    if typing.get_origin(kind) is tuple:
        return f"a tuple, each item {_wanted(typing.get_args(kind)[0])}"
    return _KINDS.get(kind, "nothing: this key is not for configs")


def nearest(name: str, known: Sequence[str]) -> str:
    """A part of a sentence that refuses a name: the one that was probably meant, if any.

    People forget sections, so a right last word counts most, then the whole, then a similar last word.
    """
    word = name.rpartition(".")[2]
    by_word = {key.rpartition(".")[2]: key for key in known}
    close = [by_word[word]] if word in by_word else difflib.get_close_matches(name, known, 1)
    close = close or [by_word[near] for near in difflib.get_close_matches(word, by_word, 1)]
    return f" (did you mean {close[0]}?)" if close else ""


def section(instance: Any) -> ConfigDict:
    """A part of a config with the fields of a frozen dataclass and their values.

    A field without a value becomes a placeholder of its type, so that it can be overridden. Fields that hold
    functions are left out: configs hold values.
    """
    hints = typing.get_type_hints(type(instance))
    values = {field.name: getattr(instance, field.name) for field in dataclasses.fields(instance)}
    return ConfigDict({name: _entry(hints[name], v) for name, v in values.items() if not callable(v)})


def _entry(annotation: Any, value: Any) -> Any:
    kind = _alternatives(annotation)[0]
    if value is None:
        known = ConfigDict if dataclasses.is_dataclass(kind) else typing.get_origin(kind) or kind
        return config_dict.placeholder(known if isinstance(known, type) else object)
    if dataclasses.is_dataclass(value):
        return section(value)
    if isinstance(value, tuple):
        return tuple(section(item).to_dict() if dataclasses.is_dataclass(item) else item for item in value)
    return float(value) if kind is float else value


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    """The types of a union, without None."""
    if typing.get_origin(annotation) not in (typing.Union, types.UnionType):
        return (annotation,)
    return tuple(kind for kind in typing.get_args(annotation) if kind is not types.NoneType)
