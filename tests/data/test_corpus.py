"""Sources: every kind of file gives the same documents, and the split never moves."""

import json
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from dsv3_jax.data import corpus, records
from dsv3_jax.data.documents import Skipped, refuse

TEXTS = [f"document {i}\n{'word ' * (i % 7)}" for i in range(60)]


def opened(path):
    return corpus.open_source(str(path), "text", 1 << 20, refuse, Skipped())


def texts(documents):
    return {documents[i] for i in range(len(documents))}


def write_text(folder):
    for i, text in enumerate(TEXTS):
        (folder / f"{i:03}.txt").write_text(text)
    return folder


def write_lines(folder):
    path = folder / "d.jsonl"
    path.write_text("".join(json.dumps({"id": 1, "text": t}) + "\n" for t in TEXTS))
    return path


def write_parquet(folder):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = folder / "d.parquet"
    parquet.write_table(arrow.table({"text": TEXTS}), path, row_group_size=7)
    return path


def write_array_records(folder):
    path = folder / "d.arrayrecord"
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for text in TEXTS:
        writer.write(text.encode())
    writer.close()
    return path


WRITERS = [write_text, write_lines, write_parquet, write_array_records]


@pytest.mark.parametrize("write", WRITERS)
def test_every_kind_of_file_gives_the_documents_in_any_order(tmp_path, write):
    documents = opened(write(tmp_path))
    assert len(documents) == len(TEXTS)
    for i in np.random.default_rng(0).permutation(len(TEXTS)).tolist():
        assert documents[i] == TEXTS[i]


def test_a_folder_of_all_kinds_is_one_source(tmp_path):
    for number, write in enumerate(WRITERS):
        (tmp_path / str(number)).mkdir()
        write(tmp_path / str(number))
    documents = opened(tmp_path)
    assert sorted(documents[i] for i in range(len(documents))) == sorted(TEXTS * len(WRITERS))
    assert len(set(documents.hashes().tolist())) == len(documents)


def test_a_glob_takes_the_files_that_match(tmp_path):
    write_text(tmp_path)
    documents = opened(tmp_path / "00*.txt")
    assert [documents[i] for i in range(len(documents))] == TEXTS[:10]


@pytest.mark.parametrize("write", WRITERS)
def test_training_and_validation_share_nothing_and_lose_nothing(tmp_path, write):
    training, validation = corpus.split(opened(write(tmp_path)), 0.3)
    assert 5 < len(validation) < 35
    parts = [training[i] for i in range(len(training))], [validation[i] for i in range(len(validation))]
    assert sorted(parts[0] + parts[1]) == sorted(TEXTS)


@pytest.mark.parametrize("write", [write_text, write_lines])
def test_the_split_depends_on_names_in_the_source_and_not_on_where_it_lies(tmp_path, write):
    found = []
    for name in ("here", "there"):
        folder = tmp_path / name
        folder.mkdir()
        found.append(corpus.split(opened(write(folder)), 0.3)[1].indices.tolist())
    assert found[0] == found[1]


def test_more_files_or_a_higher_fraction_never_move_a_document_to_training(tmp_path):
    write_text(tmp_path)
    less = texts(corpus.split(opened(tmp_path), 0.2)[1])
    (tmp_path / "000a.txt").write_text("another")
    more = texts(corpus.split(opened(tmp_path), 0.4)[1])
    assert less and less < more


class Numbered:
    """Documents that are only counted."""

    def __len__(self):
        return 100_000

    def __getitem__(self, index):
        return str(index)

    def hashes(self):
        return records._hash_records("d.jsonl", len(self))


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.02, 0.5, 1.0])
def test_the_share_held_out_is_the_fraction_asked_for(fraction):
    count = len(corpus.split(Numbered(), fraction)[1])
    deviation = np.sqrt(100_000 * fraction * (1 - fraction))
    assert abs(count - 100_000 * fraction) <= 4 * deviation


def test_the_standard_library_is_real_text_without_tests_or_caches():
    library = opened("stdlib")
    root = Path(sysconfig.get_path("stdlib"))
    names = {f.relative_to(root).as_posix() for f in library._files}
    assert {"json/decoder.py", "argparse.py"} <= names
    assert not any({"test", "tests", "__pycache__", "site-packages"} & set(n.split("/")) for n in names)
    assert library[sorted(names).index("argparse.py")] == (root / "argparse.py").read_text("utf-8")
    size = sum(len(library[i].encode()) for i in range(len(library)))  # no file of it is bad
    assert 5e6 < size < 30e6


def test_the_split_of_the_standard_library_is_stable_and_by_file():
    training, validation = corpus.split(opened("stdlib"), 0.05)
    again = corpus.split(opened("stdlib"), 0.05)
    assert not set(training.indices) & set(validation.indices)
    assert training.digest() == again[0].digest() != validation.digest()
    assert 0.01 * len(training) < len(validation) < 0.12 * len(training)
