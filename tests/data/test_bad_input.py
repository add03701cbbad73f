"""Bad input: an error that names the file and line, or a skip that is counted; never a silent loss."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from dsv3_jax.data import corpus, packing
from dsv3_jax.data.documents import BadDocument, Skipped, refuse, skip
from dsv3_jax.data.loader import Data, Source, train_loader, validation_rows

LIMIT = 1000

GOOD = b'{"text": "a good document"}'
BAD_LINES = {
    "not JSON": [b"{", b"", b"{'text': 1}", b'{"text": ' + b"1" * 5000 + b"}", b"[" * 5000],
    "not an object": [b"[]", b'"text"', b"3", b"null"],
    "no text key": [b"{}", b'{"Text": "x"}'],
    "not a string": [b'{"text": null}', b'{"text": ["x"]}', b'{"text": 3}'],
    "empty": [b'{"text": ""}'],
    "not UTF-8": [b'{"text": "\xff"}', b'{"text": "caf\xe9"}'],
    "lone surrogate": [b'{"text": "\\ud800"}'],
    "too long": [json.dumps({"text": "x" * (LIMIT + 1)}).encode()],
}
CASES = [(reason, line) for reason, lines in BAD_LINES.items() for line in lines]


def opened(path, on_bad=refuse, skipped=None, limit=LIMIT):
    return corpus.open_source(str(path), "text", limit, on_bad, skipped or Skipped())


def settings(path, on_bad):
    source = (Source(path=str(path)),)
    return Data(
        sources=source,
        on_bad=on_bad,
        max_document_bytes=LIMIT,
        fill_in_middle_rate=0.0,
        validation_fraction=0.0,
        prefetch_rows=2,
    )


@pytest.mark.parametrize(("reason", "line"), CASES)
def test_a_bad_line_is_named_by_file_and_number(tmp_path, reason, line):
    path = tmp_path / "d.jsonl"
    path.write_bytes(GOOD + b"\n" + line + b"\n" + GOOD + b"\n")
    documents = opened(path)
    assert len(documents) == 3
    assert documents[0] == documents[2] == "a good document"
    with pytest.raises(BadDocument, match=r"d\.jsonl:2: .*config\.data\.on_bad=skip") as caught:
        documents[1]
    assert caught.value.reason == reason


def test_a_loader_that_refuses_ends_with_the_place_of_the_bad_line(small, tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(GOOD + b"\n" + b"{}\n")
    loader = train_loader(settings(path, refuse), small, 8)
    with pytest.raises(BadDocument, match=r"d\.jsonl:2: the object has no key 'text'"):
        loader.next(200)
    loader.close()


def test_a_loader_that_skips_counts_each_bad_line_once_by_reason(small, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "open_rows", lambda length: 4)
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\n".join(line for _, line in CASES) + b"\n" + GOOD + b"\n")
    loader = train_loader(settings(path, skip), small, 30)
    rows = loader.next(12)  # many epochs
    loader.close()
    assert loader.skipped == {reason: len(lines) for reason, lines in BAD_LINES.items()}
    ids = small.encode("a good document").tolist() + [small.eos]
    found = rows.tokens[rows.segments > 0].reshape(-1, len(ids))
    assert (found == ids).all()


def test_skipped_records_are_named_in_the_log(small, tmp_path, caplog):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"{}\n" + GOOD + b"\n")
    data = Data(sources=(Source(path=str(path)),), validation_fraction=0.9999, on_bad=skip)
    validation_rows(data, small, 8, 5)
    assert "d.jsonl:1: the object has no key 'text'" in caplog.text


def test_a_source_with_nothing_good_in_it_ends_instead_of_looping(small, tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"{}\n[]\n")
    loader = train_loader(settings(path, skip), small, 8)
    with pytest.raises(ValueError, match="All 2 documents of a shard are bad"):
        loader.next(1)
    loader.close()


def text_files(folder: Path) -> dict[str, Path]:
    """One bad text file for each reason."""
    files = {
        name: folder / f"{i}.txt" for i, name in enumerate(("empty", "not UTF-8", "too long", "unreadable"))
    }
    files["empty"].write_bytes(b"")
    files["not UTF-8"].write_bytes(b"line one\nline two\nline \xe9 three\n")
    files["too long"].write_bytes(b"x" * (LIMIT + 1))
    files["unreadable"].symlink_to(folder / "absent")
    return files


@pytest.mark.parametrize("reason", ["empty", "not UTF-8", "too long", "unreadable"])
def test_a_bad_text_file_is_named(tmp_path, reason):
    file = text_files(tmp_path)[reason]
    place = f"{file}:3: " if reason == "not UTF-8" else f"{file}: "
    documents = corpus.TextFiles(tmp_path, [file], LIMIT)
    with pytest.raises(BadDocument) as caught:
        documents[0]
    assert str(caught.value).startswith(place)
    assert caught.value.reason == reason


def test_bad_text_files_are_skipped_and_counted(small, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "open_rows", lambda length: 4)
    text_files(tmp_path)
    (tmp_path / "good.txt").write_text("good text\n")
    loader = train_loader(settings(tmp_path, skip), small, 30)
    loader.next(12)
    loader.close()
    assert loader.skipped == {"empty": 1, "not UTF-8": 1, "too long": 1, "unreadable": 1}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".arrayrecord"])
@pytest.mark.parametrize("content", [b"", b"\x00garbage" * 20_000])
def test_a_damaged_file_of_records_is_named_or_skipped(tmp_path, suffix, content):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    bad = tmp_path / f"bad{suffix}"
    bad.write_bytes(content)
    (tmp_path / "good.txt").write_text("good")
    with pytest.raises(BadDocument, match=f"bad{suffix}"):
        opened(tmp_path)[1]  # the records of a file are found when it is opened, those of a line when read
    if suffix != ".jsonl" or not content:  # garbage of one line is one bad record
        skipped = Skipped()
        assert len(opened(tmp_path, skip, skipped)) == 1
        assert sum(skipped.counts().values()) == 1


def test_a_source_whose_files_are_all_skipped_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"")
    with pytest.raises(ValueError, match="all 1 files were skipped"):
        opened(tmp_path, skip)


def test_bad_parquet_rows_are_named(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "t.parquet"
    parquet.write_table(arrow.table({"text": ["good", None, "", "x" * (LIMIT + 1)]}), path, row_group_size=2)
    documents = opened(path)
    assert documents[0] == "good"
    for index, reason in ((1, "not a string"), (2, "empty"), (3, "too long")):
        with pytest.raises(BadDocument, match=rf"t\.parquet:{index + 1}: ") as caught:
            documents[index]
        assert caught.value.reason == reason
    with pytest.raises(BadDocument, match=r"t\.parquet: the table has no column 'body' \(it has: text\)"):
        corpus.open_source(str(path), "body", LIMIT, refuse, Skipped())


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"dsv3-jax\[parquet\]"):
        opened(tmp_path)


def test_bad_array_records_are_named(tmp_path):
    path = tmp_path / "t.arrayrecord"
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in (b"good", b"caf\xe9", b"", b"x" * (LIMIT + 1)):
        writer.write(record)
    writer.close()
    documents = opened(path)
    assert documents[0] == "good"
    for index, reason in ((1, "not UTF-8"), (2, "empty"), (3, "too long")):
        with pytest.raises(BadDocument, match=rf"t\.arrayrecord:{index + 1}: ") as caught:
            documents[index]
        assert caught.value.reason == reason


@pytest.mark.parametrize("path", ["absent.txt", "absent*.jsonl", "empty_folder"])
def test_a_source_that_is_not_there_is_named(tmp_path, path):
    (tmp_path / "empty_folder").mkdir()
    with pytest.raises(FileNotFoundError, match=r"config\.data\.sources"):
        opened(tmp_path / path)


@pytest.mark.parametrize("closing", [b"", b"]" * 300_000])
def test_json_nested_without_end_is_a_bad_line_and_not_a_crash(tmp_path, closing):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"text": ' + b"[" * 300_000 + closing + b"}\n")
    with pytest.raises(BadDocument, match=r"d\.jsonl:1: the JSON is nested too deep"):
        opened(path, limit=1 << 20)[0]


HUGE = """
import resource, sys
import numpy as np
from dsv3_jax.data import corpus, packing
from dsv3_jax.data.documents import BadDocument, Skipped, refuse
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
documents = corpus.open_source(sys.argv[1], "text", 1 << 20, refuse, Skipped())
assert documents[0] == documents[2] == "good"
try:
    documents[1]
except BadDocument as bad:
    assert bad.reason == "too long" and ":2: " in str(bad), bad
else:
    raise SystemExit("the long line was accepted")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


def test_a_line_of_a_gigabyte_is_passed_without_reading_it_into_memory(tmp_path):
    path = tmp_path / "huge.jsonl"
    with path.open("wb") as f:  # a hole in the file: no disk is used
        f.write(b'{"text": "good"}\n{"text": "')
        f.seek(1 << 30, 1)
        f.write(b'"}\n{"text": "good"}\n')
    run = subprocess.run([sys.executable, "-c", HUGE, str(path)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 256  # MiB, a quarter of the line


def test_a_document_of_the_greatest_length_allowed_is_read(tmp_path):
    path = tmp_path / "d.jsonl"
    text = "\u00e9" * (LIMIT // 2)  # two bytes each, six when escaped
    path.write_text(json.dumps({"text": text}) + "\n")
    assert opened(path)[0] == text


def test_the_place_of_each_line_is_right_whatever_the_blocks_read(tmp_path, monkeypatch):
    from dsv3_jax.data import records

    path = tmp_path / "d.jsonl"
    rng = np.random.default_rng(0)
    texts = ["x" * int(n) for n in rng.integers(1, 30, 100)]
    path.write_text("\n".join(json.dumps({"text": t}) for t in texts))  # no line end after the last
    for block in (1, 7, 64, 1 << 20):
        monkeypatch.setattr(records, "_INDEX_BYTES", block)
        documents = opened(path)
        assert [documents[i] for i in range(len(documents))] == texts
