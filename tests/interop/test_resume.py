"""A conversion that was killed goes on, and its result is that of one that was not, byte for byte."""

import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import jax.numpy as jnp
import pytest

from dsv3_jax.interop import transfer
from tests.conftest import ROOT
from tests.interop import released
from tests.interop.released import WIDE
from tools import convert

FP8 = convert.FORMS["float8", "float32"]
BAND, SHARD = 60_000, 100_000  # bytes; several bands make a tensor, several tensors a file

KILLED = """
import os, signal, sys
from contextlib import contextmanager
from pathlib import Path
from dsv3_jax.interop import transfer
from tests.interop import test_resume
from tools import convert

@contextmanager
def shown(sizes, done):
    def advance(count):
        global left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
    yield advance

left = int(sys.argv[4])
convert.shown, transfer._BAND = shown, test_resume.BAND
test_resume.CONVERT[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]), 2)
"""


def from_hf(source, destination, workers=1):
    convert.from_hf(source, destination, jnp.dtype(jnp.bfloat16), workers)


def to_hf(source, destination, workers=1):
    convert.to_hf(source, destination, FP8, SHARD, workers)


CONVERT = {"from-hf": from_hf, "to-hf": to_hf}


@pytest.fixture(autouse=True)
def small_bands(monkeypatch):
    monkeypatch.setattr(transfer, "_BAND", BAND)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """By direction: what is converted, and what comes of it in one go by one worker."""
    root = tmp_path_factory.mktemp("sources")
    weights = released.quantised(released.tensors(WIDE), WIDE)
    released.write(root / "hf", weights, released.config(WIDE, **released.FP8_CONFIG), shards=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "_BAND", BAND)
        from_hf(root / "hf", root / "ours")
        to_hf(root / "ours", root / "back")
    return {"from-hf": (root / "hf", root / "ours"), "to-hf": (root / "ours", root / "back")}


def contents(folder: Path):
    """Every file but those in which Orbax says when and where it made them."""
    own = ("_CHECKPOINT_METADATA", "commit_success.txt")
    files = (p for p in folder.rglob("*") if p.is_file() and p.name not in own)
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def interrupt(monkeypatch, direction, source, destination, after):
    """Stops a conversion after so many blocks, as Ctrl-C does."""

    @contextmanager
    def shown(sizes, done):
        blocks = iter(range(after))

        def advance(count):
            if next(blocks, None) is None:
                raise KeyboardInterrupt

        yield advance

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(convert, "shown", shown)
        CONVERT[direction](source, destination)


@pytest.mark.parametrize("direction", CONVERT)
def test_several_workers_make_the_same_bytes(tmp_path, sources, direction):
    source, whole = sources[direction]
    CONVERT[direction](source, tmp_path / "out", 4)
    assert contents(tmp_path / "out") == contents(whole)


@pytest.mark.slow
@pytest.mark.parametrize("direction", CONVERT)
@pytest.mark.parametrize("block", [1, 100])
def test_after_a_kill_the_result_is_the_same(tmp_path, sources, direction, block, capsys):
    source, whole = sources[direction]
    run = subprocess.run(
        [sys.executable, "-c", KILLED, direction, str(source), str(tmp_path / "out"), str(block)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        timeout=120,
    )
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert not (tmp_path / "out").exists()
    CONVERT[direction](source, tmp_path / "out", 2)
    assert ("Going on after" in capsys.readouterr().out) == (block > 1)
    assert contents(tmp_path / "out") == contents(whole)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("direction", CONVERT)
def test_a_finished_file_that_was_damaged_since_is_made_again(
    tmp_path, sources, direction, monkeypatch, capsys
):
    source, whole = sources[direction]
    interrupt(monkeypatch, direction, source, tmp_path / "out", 60)
    stage = tmp_path / ".out.partial"
    pattern = {"from-hf": "0*/model/*/c/**/*", "to-hf": "model-00001-*"}[direction]
    file = next(p for p in sorted(stage.glob(pattern)) if p.is_file())
    data = bytearray(file.read_bytes())
    data[-10] ^= 1
    file.write_bytes(data)
    CONVERT[direction](source, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(whole)


@pytest.mark.parametrize("direction", CONVERT)
def test_what_is_finished_is_not_converted_again(tmp_path, sources, direction, monkeypatch, capsys):
    source, _ = sources[direction]
    interrupt(monkeypatch, direction, source, tmp_path / "out", 60)
    finished = (tmp_path / ".out.partial.journal").read_text().count('"unit"')
    capsys.readouterr()
    CONVERT[direction](source, tmp_path / "out")
    assert finished and f"Going on after {finished} of " in capsys.readouterr().out


def test_another_type_or_a_changed_source_is_refused_and_the_stage_is_kept(tmp_path, sources, monkeypatch):
    source, whole = sources["from-hf"]
    interrupt(monkeypatch, "from-hf", source, tmp_path / "out", 60)
    with pytest.raises(FileExistsError, match="another dtype"):
        convert.from_hf(source, tmp_path / "out", jnp.dtype(jnp.float32))
    text = (source / "config.json").read_bytes()
    times = (source / "config.json").stat()
    (source / "config.json").write_bytes(text + b"\n")
    with pytest.raises(FileExistsError, match="another source"):
        from_hf(source, tmp_path / "out")
    (source / "config.json").write_bytes(text)
    os.utime(source / "config.json", ns=(times.st_atime_ns, times.st_mtime_ns))
    from_hf(source, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(whole)


def test_another_form_is_refused(tmp_path, sources, monkeypatch):
    source, _ = sources["to-hf"]
    interrupt(monkeypatch, "to-hf", source, tmp_path / "out", 60)
    with pytest.raises(FileExistsError, match="another form and another max_shard_size"):
        convert.to_hf(source, tmp_path / "out", convert.FORMS["bfloat16", "float32"], SHARD + 1)


def test_the_digests_beside_an_export_are_those_of_its_files(sources):
    _, back = sources["to-hf"]
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=back, check=True)
