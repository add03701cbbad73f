"""A stage survives a kill, is gone on with by the same plan only, and becomes the destination when whole."""

import json
import shutil

import pytest

from dsv3_jax.interop.stage import staged


def write(stage):
    def make(unit):
        (stage.path / unit).write_text(unit)
        return unit

    return make


def interrupted(target, plan=None):
    """A stage in which the unit `a` is done, left as a kill leaves it."""
    with pytest.raises(KeyboardInterrupt), staged(target, plan or {"from": 1}) as stage:
        stage.run(["a"], write(stage), 1)
        raise KeyboardInterrupt


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "new" / "folder"
    with pytest.raises(RuntimeError), staged(target, {}) as stage:
        (stage.path / "inner").mkdir()
        (stage.path / "inner" / "file").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with staged(target, {}) as stage:
        (stage.path / "file").write_text("x")
        assert not target.exists()
    assert [p.name for p in target.iterdir()] == ["file"] and list(target.parent.iterdir()) == [target]


def test_a_folder_that_is_not_empty_is_not_replaced(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="not empty"), staged(tmp_path, {}):
        pass
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError])
def test_finished_units_are_not_made_again(tmp_path, failure):
    made = []
    with pytest.raises(failure), staged(tmp_path / "out", {"from": 1}) as stage:
        stage.run(["a", "b"], made.append, 1)
        raise failure
    with staged(tmp_path / "out", {"from": 1}) as stage:
        stage.run(["a", "b", "c"], made.append, 2)
    assert made == ["a", "b", "c"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_another_plan_is_refused_by_what_differs_and_nothing_is_lost(tmp_path):
    interrupted(tmp_path / "out", {"dtype": "float32", "source": 1})
    plan = {"dtype": "bfloat16", "source": 1}
    with pytest.raises(FileExistsError, match="another dtype: repeat"), staged(tmp_path / "out", plan):
        pass
    with staged(tmp_path / "out", {"dtype": "float32", "source": 1}) as stage:
        assert stage.done == {"a": "a"}


def test_a_second_process_is_refused(tmp_path):
    with staged(tmp_path / "out", {}):
        with pytest.raises(FileExistsError, match="Another process"), staged(tmp_path / "out", {}):
            pass


def test_a_journal_cut_at_any_byte_loses_no_more_than_its_last_unit(tmp_path):
    interrupted(tmp_path / "whole")
    text = (tmp_path / ".whole.partial.journal").read_bytes()
    plan_end = text.index(b"\n") + 1
    for cut in range(len(text) + 1):
        target = tmp_path / f"cut{cut}"
        (tmp_path / f".cut{cut}.partial.journal").write_bytes(text[:cut])
        if cut >= plan_end:
            shutil.copytree(tmp_path / ".whole.partial", tmp_path / f".cut{cut}.partial")
        with staged(target, {"from": 1}) as stage:
            assert stage.done == ({"a": "a"} if cut == len(text) else {})
            stage.run(["a"], write(stage), 1)
        assert (target / "a").read_text() == "a"


def test_a_unit_that_is_not_intact_is_made_again(tmp_path):
    interrupted(tmp_path / "out")
    with staged(tmp_path / "out", {"from": 1}) as stage:
        (stage.path / "a").write_text("damaged")
        stage.keep(lambda unit, record: (stage.path / unit).read_text() == record)
        assert stage.done == {}
        stage.run(["a"], write(stage), 1)
    assert (tmp_path / "out" / "a").read_text() == "a"


def test_the_record_of_a_unit_is_json(tmp_path):
    interrupted(tmp_path / "out")
    lines = (tmp_path / ".out.partial.journal").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"from": 1}, {"unit": "a", "record": "a"}]
