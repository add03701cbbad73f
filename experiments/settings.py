"""The command line and the files of a run's config: loading, overrides, JSON.

A config file is Python with a `get_config()` and runs as code. Use the JSON that a run writes for configs of
strangers.
"""

import hashlib
import json
import math
import re
import runpy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import app, flags
from ml_collections import config_dict, config_flags
from ml_collections.config_dict import ConfigDict

from dsv3_jax.training.metrics import write_atomically
from experiments.records import Refused, nearest

CONFIGS = Path(__file__).parent / "configs"

_HELP = (
    "What to run: the NAME of a file in experiments/configs, a .py file with get_config(), or the "
    "config.json of a run. --config.KEY=VALUE overrides one of these keys:\n"
)


class Selected(NamedTuple):
    """What the command line chose."""

    name: str  # of the config file, or of the folder of a config.json
    config: ConfigDict


def run(main: Callable[[str, ConfigDict], None], default: str = "tiny") -> None:
    """Parses the command line and calls `main` with the config's name and its keys; refusals exit with 1."""

    def parsed(argv: Sequence[str]) -> Selected:
        try:
            return parse(argv, default, flags.FLAGS)
        except (flags.Error, Refused) as error:
            raise SystemExit(f"{error}\nSee --help.") from None

    def guarded(selected: Selected) -> None:
        try:
            main(*selected)
        except Refused as error:
            raise SystemExit(str(error)) from None

    app.run(guarded, flags_parser=parsed)  # pyright: ignore[reportArgumentType]


def parse(argv: Sequence[str], default: str, flag_values: flags.FlagValues) -> Selected:
    """Loads the config that `--config` names, applies the overrides, and parses all other flags.

    Args:
        argv: the program's name, then its arguments.
        default: the config without `--config`.
        flag_values: where flags are defined; `flags.FLAGS` but in tests.
    """
    name, rest = _take_config(argv, default)
    config = load(name)
    _refuse_unknown(config, rest)
    text = _HELP + "\n".join(f"{key}={value}" for key, value in flatten(config).items())
    try:
        config_flags.DEFINE_config_dict("config", config, text, flag_values, sys_argv=rest)
    except (ValueError, LookupError) as error:  # of overrides inside tuples
        raise Refused(f"An override names no part of the config: {error}") from None
    flag_values["config"].default_as_str = name  # for --help; the keys stand above it
    flags.DEFINE_bool("print_config", False, "Print the config as JSON and exit.", flag_values=flag_values)
    for flag in ("config", "print_config"):  # so that --help of any program shows them
        flag_values.register_key_flag_for_module(sys.argv[0], flag_values[flag])
    if extra := flag_values(rest)[1:]:
        raise flags.Error(f"Argument {extra[0]!r} stands alone: give flags, as --config.KEY=VALUE.")
    resolved = _text(config)  # refuses overrides that are not finite
    if flag_values["print_config"].value:
        print(resolved, end="")
        raise SystemExit(0)
    path = Path(name)
    return Selected(path.resolve().parent.name if path.name == "config.json" else path.stem, config)


def _take_config(argv: Sequence[str], default: str) -> tuple[str, list[str]]:
    """Takes `--config=NAME` or `--config NAME` from the arguments, so that overrides may stand before it."""
    rest, name, arguments = [argv[0]], default, iter(argv[1:])
    for argument in arguments:
        if re.fullmatch(r"--?config", argument):
            name = next(arguments, "")
        elif found := re.match(r"--?config=", argument):
            name = argument[found.end() :]
        else:
            rest.append(argument)
    return name, rest


def load(name: str) -> ConfigDict:
    """Reads a config by name, from a .py file or from a resolved .json; relative paths also from the root."""
    path = CONFIGS / f"{name}.py" if re.fullmatch(r"\w+", name) else Path(name).expanduser()
    if not path.exists() and not path.is_absolute():
        path = CONFIGS.parent.parent / path
    if not path.is_file() or path.suffix not in (".py", ".json"):
        names = sorted(p.stem for p in CONFIGS.glob("*.py") if p.stem != "__init__")
        raise Refused(
            f"--config={name} is no config{nearest(Path(name).stem, names)}: give one of "
            f"{', '.join(names)}, or the path of a .py or .json file."
        )
    return _load_json(path) if path.suffix == ".json" else _load_python(path)


def _load_python(path: Path) -> ConfigDict:
    get_config = runpy.run_path(str(path)).get("get_config")
    config = get_config() if callable(get_config) else None
    if not isinstance(config, ConfigDict):
        raise Refused(f"{path} gives no config: define get_config() that returns a ConfigDict.")
    return config


def _load_json(path: Path) -> ConfigDict:
    try:
        config = _from_json(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, too deep, or a key with a dot
        raise Refused(f"{path} is no config ({error}): give the config.json that a run wrote.") from None
    if not isinstance(config, ConfigDict):
        raise Refused(f"{path} holds no object: give the config.json that a run wrote.")
    return config


def _from_json(value: Any) -> Any:
    """JSON has lists for tuples, and null for a key of any type that has no value yet."""
    if isinstance(value, dict):
        return ConfigDict({key: _from_json(item) for key, item in value.items()})
    if isinstance(value, list):
        return tuple(_from_json(item) if isinstance(item, list) else item for item in value)
    return config_dict.placeholder(object) if value is None else value


def _refuse_unknown(config: ConfigDict, argv: Sequence[str]) -> None:
    """The library would raise an AttributeError that knows the keys of one section only."""
    keys = list(flatten(config))
    sections = {key[: dot.start()] for key in keys for dot in re.finditer(r"\.", key)}
    found = (re.match(r"--?(?:no)?config\.([^=\[]+)", argument) for argument in argv)
    unknown = [match[1] for match in found if match and match[1] not in sections.union(keys)]
    if unknown:
        raise Refused("\n".join(f"--config.{key} is no key{nearest(key, keys)}." for key in unknown))


def flatten(config: ConfigDict) -> dict[str, Any]:
    """All keys with dots, in order, and their values; what processes agree on and messages compare."""
    return dict(_leaves(_plain(config, "config"), ""))


def digest(config: ConfigDict) -> str:
    """SHA-256 of the resolved config, in hexadecimal."""
    return hashlib.sha256(_text(config).encode()).hexdigest()


def write_resolved(config: ConfigDict, path: Path) -> None:
    """Writes the config as JSON that `--config` accepts, atomically."""
    write_atomically(path, _text(config).encode())


def _text(config: ConfigDict) -> str:
    return json.dumps(_plain(config, "config"), indent=2, sort_keys=True, allow_nan=False) + "\n"


def _plain(value: Any, key: str) -> Any:
    """Dicts, tuples, text and finite numbers; anything else has no place in a config."""
    if isinstance(value, Mapping | ConfigDict):
        return {name: _plain(item, f"{key}.{name}") for name, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_plain(item, f"{key}[{n}]") for n, item in enumerate(value))
    if isinstance(value, float) and not math.isfinite(value):
        raise Refused(f"{key}={value} is not finite: give an ordinary number.")
    if value is not None and not isinstance(value, bool | int | float | str):
        raise Refused(
            f"{key} holds a {type(value).__name__}: a config holds numbers, text and tuples of them."
        )
    return value


def _leaves(tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in sorted(tree.items()):
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
