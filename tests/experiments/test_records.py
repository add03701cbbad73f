"""Frozen records from config sections: exact types, every violation at once, and sections from records."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from ml_collections.config_dict import ConfigDict

from dsv3_jax.config import Config, Yarn
from dsv3_jax.training.recipe import Recipe
from experiments import settings
from experiments.records import Refused, record, section


@dataclass(frozen=True, kw_only=True)
class Source:
    path: str
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Part:
    steps: int
    rate: float = 0.5
    name: str = "a"
    resume: bool = True
    rank: int | None = None
    shape: tuple[int, int] = (1, 2)
    sources: tuple[Source, ...] = ()
    hook: Callable[[], None] = print

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"config.part.steps={self.steps} must be at least 1.")


@dataclass(frozen=True, kw_only=True)
class Run:
    part: Part
    recipe: Recipe = field(default_factory=Recipe)
    yarn: Yarn | None = None


def lines(cls, values, prefix="config"):
    with pytest.raises(Refused) as refused:
        record(cls, ConfigDict(values), prefix)
    return str(refused.value).splitlines()


def test_a_record_is_built_with_the_types_of_its_fields():
    values = {"steps": 3, "rate": 1, "rank": 7, "shape": [3, 4], "sources": ({"path": "x", "weight": 2},)}
    part = record(Part, ConfigDict(values), "config.part")
    assert part == Part(steps=3, rate=1.0, rank=7, shape=(3, 4), sources=(Source(path="x", weight=2.0),))
    assert type(part.rate) is float


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stepz": 3}, "config.part.stepz is no key (did you mean steps?): leave it out."),
        ({"steps": 3.0}, "config.part.steps=3.0 does not fit: give a whole number."),
        ({"steps": True}, "config.part.steps=True does not fit: give a whole number."),
        ({"steps": None}, "config.part.steps=None does not fit: give a whole number."),
        ({"rate": "1"}, "config.part.rate='1' does not fit: give a number."),
        ({"rate": True}, "config.part.rate=True does not fit: give a number."),
        ({"rate": float("nan")}, "config.part.rate=nan is not finite: give an ordinary number."),
        ({"rate": float("-inf")}, "config.part.rate=-inf is not finite: give an ordinary number."),
        ({"rate": 10**309}, f"config.part.rate={10**309} is not finite: give an ordinary number."),
        ({"name": 1}, "config.part.name=1 does not fit: give text."),
        ({"resume": 1}, "config.part.resume=1 does not fit: give true or false."),
        ({"rank": 1.5}, "config.part.rank=1.5 does not fit: give a whole number."),
        (
            {"shape": (1, 2, 3)},
            "config.part.shape=(1, 2, 3) does not fit: give a tuple, each item a whole number.",
        ),
        ({"shape": (1, "2")}, "config.part.shape[1]='2' does not fit: give a whole number."),
        ({"sources": ({"weight": 1.0},)}, "config.part.sources[0].path is missing: give text."),
        (
            {"hook": "print"},
            "config.part.hook='print' does not fit: give nothing: this key is not for configs.",
        ),
        ({"steps": 0}, "config.part.steps=0 must be at least 1."),
    ],
)
def test_what_does_not_fit_is_refused_by_key_value_and_remedy(change, message):
    assert lines(Part, {"steps": 1} | change, "config.part") == [message]


def test_a_missing_key_is_refused():
    assert lines(Part, {}, "config.part") == ["config.part.steps is missing: give a whole number."]


def test_all_violations_of_all_sections_are_reported_at_once():
    values = {
        "part": {"steps": 0, "name": "b"},
        "recipe": {"beta1": 2.0, "clip_norm": 0.0},
        "yarn": {"factor": "big", "speed": 1},
        "extra": 3,
    }
    assert [line.split("=")[0].split(" is ")[0] for line in lines(Run, values)] == [
        "config.extra",
        "config.part.steps",
        "config.recipe.beta1",
        "config.recipe.clip_norm",
        "config.yarn.speed",
        "config.yarn.factor",
    ]


@pytest.mark.parametrize("instance", [Config(), Config(q_rank=None, yarn=Yarn()), Recipe(), Part(steps=2)])
def test_a_record_survives_its_section_and_json(instance, tmp_path):
    config = ConfigDict({"x": section(instance)})
    assert record(type(instance), config.x) == instance
    settings.write_resolved(config, tmp_path / "config.json")
    assert record(type(instance), settings.load(str(tmp_path / "config.json")).x) == instance


def test_a_field_without_a_value_can_be_given_one_of_its_type():
    values = section(Config(q_rank=None))
    with pytest.raises(TypeError):
        values.q_rank = "96"
    values.q_rank = 96
    values.yarn = section(Yarn(factor=2.0))
    assert record(Config, values) == Config(q_rank=96, yarn=Yarn(factor=2.0))


def test_a_whole_number_in_a_float_field_can_be_overridden_by_a_fraction():
    values = section(Recipe(batch_ramp_tokens=0))
    values.batch_ramp_tokens = 0.5
    assert record(Recipe, values).batch_ramp_tokens == 0.5
