"""Configs by name, file and JSON; overrides through real flags; what is wrong is refused in sentences."""

import json
import os
import subprocess
import sys

import pytest
from absl import flags
from ml_collections import config_dict
from ml_collections.config_dict import ConfigDict

from experiments import settings
from experiments.records import Refused
from tests.conftest import ROOT

SMALL = """
from ml_collections import ConfigDict, config_dict

def get_config():
    return ConfigDict({
        "model": {"layers": 4, "q_rank": config_dict.placeholder(int), "norm_eps": 1e-6},
        "train": {"steps": 100, "batch_size": 8, "name": "a", "resume": True, "ids": (1, 2)},
        "data": {"sources": ({"path": "stdlib", "weight": 1.0},)},
    })
"""


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.py"
    path.write_text(SMALL)
    return path


@pytest.fixture
def parse(small):
    def parse(*arguments, default=str(small)):
        return settings.parse(["program", *arguments], default, flags.FlagValues())

    return parse


def test_without_flags_the_default_is_run(parse):
    name, config = parse()
    assert (name, config.train.steps, config.model.q_rank) == ("small", 100, None)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config={}", "--config.train.steps=30"],
        ["--config.train.steps=30", "--config={}"],
        ["-config", "{}", "--config.train.steps", "30"],
    ],
    ids=["file first", "override first", "separate words"],
)
def test_overrides_apply_wherever_they_stand(parse, small, arguments):
    assert parse(*(a.format(small) for a in arguments), default="absent").config.train.steps == 30


@pytest.mark.parametrize(
    ("flag", "key", "value"),
    [
        ("--config.model.q_rank=96", "model.q_rank", 96),
        ("--config.model.norm_eps=1", "model.norm_eps", 1.0),
        ("--config.train.name=b c", "train.name", "b c"),
        ("--noconfig.train.resume", "train.resume", False),
        ("--config.train.resume=false", "train.resume", False),
        ("--config.train.ids=(3,4,5)", "train.ids", (3, 4, 5)),
        ("--config.data.sources[0].path=b", "data.sources", ({"path": "b", "weight": 1.0},)),
    ],
)
def test_an_override_changes_its_key_only_and_keeps_the_type(parse, flag, key, value):
    before, after = settings.flatten(parse().config), settings.flatten(parse(flag).config)
    assert after == before | {key: value}
    assert type(after[key]) is type(value)


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("train.stops", "train.steps"),
        ("trian.steps", "train.steps"),
        ("steps", "train.steps"),
        ("model.batch_size", "train.batch_size"),
        ("model.q_rank.x", "model.q_rank"),
    ],
)
def test_a_wrong_key_is_refused_with_the_nearest_one(parse, wrong, meant):
    with pytest.raises(Refused, match=rf"^--config\.{wrong} is no key \(did you mean {meant}\?\)\.$"):
        parse(f"--config.{wrong}=3")


def test_all_wrong_keys_are_refused_together(parse):
    with pytest.raises(Refused) as refused:
        parse("--config.train.stops=3", "--noconfig.train.resumed", "--config.zzz", "3")
    assert [line.split()[0] for line in str(refused.value).splitlines()] == [
        "--config.train.stops",
        "--config.train.resumed",
        "--config.zzz",
    ]


@pytest.mark.parametrize(
    "flag",
    [
        "--config.train.steps=many",
        "--config.train.steps=1.5",
        "--config.model.norm_eps=small",
        "--config.train.resume=7",
        "--config.model=7",
        "--config.model.q_rank=x",
    ],
)
def test_a_wrong_type_is_refused_naming_the_flag(parse, flag):
    with pytest.raises(flags.Error, match=f"flag {flag}: "):
        parse(flag)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_number_that_is_not_finite_is_refused(parse, value):
    with pytest.raises(Refused, match=f"config.model.norm_eps={value} is not finite"):
        parse(f"--config.model.norm_eps={value}")


def test_an_argument_without_dashes_is_refused(parse):
    with pytest.raises(flags.Error, match=r"'train.steps=30' stands alone"):
        parse("train.steps=30")


def test_an_override_inside_a_tuple_that_is_too_short_is_refused(parse):
    with pytest.raises(Refused, match="index out of range"):
        parse("--config.data.sources[1].path=b")


@pytest.fixture
def named(tmp_path, small, monkeypatch):
    """Configs that are found by name: small, and one of another size."""
    folder = tmp_path / "root" / "experiments" / "configs"
    folder.mkdir(parents=True)
    (folder / "small.py").write_text(SMALL)
    (folder / "deepseek_v3.py").write_text(SMALL.replace('"layers": 4', '"layers": 61'))
    (folder / "__init__.py").touch()
    monkeypatch.setattr(settings, "CONFIGS", folder)
    return folder


@pytest.mark.parametrize("given", ["deepseek_v3", "experiments/configs/deepseek_v3.py"])
def test_configs_are_found_from_any_folder(named, tmp_path, monkeypatch, parse, given):
    monkeypatch.chdir(tmp_path)
    name, config = parse(f"--config={given}")
    assert (name, config.model.layers) == ("deepseek_v3", 61)


def test_a_file_here_wins_over_one_in_the_package(named, tmp_path, monkeypatch):
    here = tmp_path / "experiments" / "configs"
    here.mkdir(parents=True)
    (here / "small.py").write_text(SMALL.replace('"layers": 4', '"layers": 5'))
    monkeypatch.chdir(tmp_path)
    assert settings.load("experiments/configs/small.py").model.layers == 5
    assert settings.load("small").model.layers == 4


def test_an_unknown_name_is_refused_with_the_nearest_and_all(named):
    with pytest.raises(
        Refused, match=r"--config=smal is no config \(did you mean small\?\): .* deepseek_v3, sm"
    ):
        settings.load("smal")


@pytest.mark.parametrize("content", ["x = 1", "get_config = 3", "def get_config():\n    return {}"])
def test_a_python_file_without_a_config_is_refused(tmp_path, content):
    (tmp_path / "bad.py").write_text(content)
    with pytest.raises(Refused, match=r"bad\.py gives no config: define get_config\(\)"):
        settings.load(str(tmp_path / "bad.py"))


@pytest.mark.parametrize(
    "content",
    [b"{", b"[1]", b"\xff", b'{"a.b": 1}', b"[" * 100_000, b'{"a": ' + b"1" * 10_000 + b"}"],
    ids=["cut", "list", "not utf-8", "dotted key", "deep", "huge number"],
)
def test_json_that_is_no_config_is_refused_by_file(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(Refused, match=r"config\.json (is no config|holds no object)"):
        settings.load(str(tmp_path / "config.json"))


def test_a_resolved_config_round_trips_exactly(parse, tmp_path):
    original = parse("--config.train.steps=7", "--config.model.norm_eps=0.1").config
    path = tmp_path / "runs" / "mine" / "config.json"
    path.parent.mkdir(parents=True)
    settings.write_resolved(original, path)
    name, back = parse(f"--config={path}")
    assert name == "mine"  # so that the work directory stays the same
    assert repr(settings.flatten(back)) == repr(settings.flatten(original))
    assert settings.digest(back) == settings.digest(original)
    assert [p.name for p in path.parent.iterdir()] == ["config.json"]


def test_overrides_apply_to_json_also_where_there_was_no_value(parse, tmp_path):
    settings.write_resolved(parse().config, tmp_path / "config.json")
    config = parse(
        f"--config={tmp_path}/config.json",
        "--config.model.q_rank=96",
        "--config.train.ids=(5,)",
        "--config.model.norm_eps=1",
    ).config
    assert (config.model.q_rank, config.train.ids, config.model.norm_eps) == (96, (5,), 1.0)


def test_the_digest_sees_every_key_and_not_their_order():
    a = settings.digest(ConfigDict({"x": 1, "y": {"z": 2.0}}))
    assert a == settings.digest(ConfigDict({"y": {"z": 2.0}, "x": 1}))
    assert len({a, *(settings.digest(ConfigDict({"x": 1, "y": {"z": z}})) for z in (2, 2.5, None, "2"))}) == 5


def test_a_value_that_json_cannot_hold_is_refused_by_key(tmp_path):
    config = ConfigDict({"train": {"hook": config_dict.FieldReference(print)}})
    with pytest.raises(Refused, match=r"config\.train\.hook holds a builtin_function"):
        settings.write_resolved(config, tmp_path / "config.json")
    assert list(tmp_path.iterdir()) == []


def program(small, tmp_path, *arguments):
    source = f"""'''A program.'''
from experiments import records, settings

def main(name, config):
    if config.train.steps == 13:
        raise records.Refused("config.train.steps=13 is unlucky: give 14.")
    print(name, config.train.steps)

settings.run(main, default={str(small)!r})
"""
    return subprocess.run(
        [sys.executable, "-c", source, *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_program_runs_from_another_folder(small, tmp_path):
    done = program(small, tmp_path, "--config.train.steps=3")
    assert (done.stdout, done.returncode) == ("small 3\n", 0), done.stderr


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (
            "--config.train.stops=3",
            "--config.train.stops is no key (did you mean train.steps?).\nSee --help.\n",
        ),
        ("--config.train.steps=13", "config.train.steps=13 is unlucky: give 14.\n"),
    ],
)
def test_a_program_ends_with_a_sentence_and_no_traceback(small, tmp_path, flag, message):
    done = program(small, tmp_path, flag)
    assert (done.stderr, done.returncode) == (message, 1)


def test_print_config_prints_what_write_resolved_writes(small, tmp_path):
    done = program(small, tmp_path, "--print_config", "--config.train.steps=3")
    assert json.loads(done.stdout)["train"]["steps"] == 3
    config = settings.load(str(small))
    config.train.steps = 3
    settings.write_resolved(config, tmp_path / "config.json")
    assert done.stdout == (tmp_path / "config.json").read_text()
    assert done.returncode == 0


def test_help_lists_the_keys(small, tmp_path):
    text = program(small, tmp_path, "--help").stdout
    assert "A program." in text
    assert all(f"{key}=" in text for key in ("model.q_rank", "train.batch_size", "data.sources"))
