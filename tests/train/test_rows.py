"""Rows of every format: what is read, what is named, what is counted."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from plait.errors import DataError
from plait.train.encode_rows import in_order
from plait.train.prepare_rows import holds_rows
from plait.train.row_files import file_hashes
from plait.train.rows import (
    Problem,
    Problems,
    Row,
    is_row_data,
    keep_rows,
    other_files,
    read_rows,
)
from plait.train.text_rows import SIDES, TextEncoder, write_texts
from plait.train.tokenizer import train_tokenizer

ROWS = [{"text": f"row number {i}"} for i in range(700)]


def _json_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _values(path):
    return [row.value for row in read_rows(path)]


def test_json_lines_and_parquet_give_the_same_rows(tmp_path):
    lines = _json_lines(tmp_path / "a.jsonl", ROWS)
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "b.parquet", row_group_size=300)
    assert _values(lines) == _values(tmp_path / "b.parquet") == ROWS
    places = [row.place for row in read_rows(tmp_path / "b.parquet")]
    assert places[699] == f"{tmp_path / 'b.parquet'}:700"


def test_a_folder_is_read_file_by_file_in_order(tmp_path):
    for name in ("2", "1"):
        (tmp_path / name).mkdir()
        _json_lines(tmp_path / name / "x.jsonl", [{"text": name}])
    (tmp_path / "notes.txt").write_text("not rows")
    assert is_row_data(str(tmp_path))
    assert _values(tmp_path) == [{"text": "1"}, {"text": "2"}]
    assert len(file_hashes(str(tmp_path))) == 2


def test_what_stands_beside_the_rows_is_named_unless_it_is_about_them(tmp_path):
    for name in ("README.md", ".gitattributes", "dataset_info.json"):
        (tmp_path / name).write_text("about")
    _json_lines(tmp_path / "x.jsonl", ROWS)
    assert other_files(tmp_path) == []
    assert holds_rows(str(tmp_path))
    (tmp_path / "more.csv").write_text("a,b\n")
    assert other_files(tmp_path) == [tmp_path / "more.csv"]
    assert not holds_rows(str(tmp_path))


def test_splits_are_not_mixed_and_one_can_be_named(tmp_path):
    for split in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        _json_lines(tmp_path / f"{split}.jsonl", [{"text": split}])
    _json_lines(tmp_path / "training_notes.jsonl", [{"text": "of no split"}])
    with pytest.raises(DataError, match=r"several splits\. Name one: .*test\*\.jsonl"):
        _values(tmp_path)
    train = tmp_path / "train-*.jsonl"
    assert is_row_data(str(train))
    assert [row["text"][:11] for row in _values(train)] == ["train-00000", "train-00001"]
    assert len(file_hashes(str(train))) == 2
    with pytest.raises(DataError, match="does not exist"):
        _values(tmp_path / "dev-*.jsonl")


def test_a_saved_dataset_is_read_without_its_library(tmp_path):
    table = pa.Table.from_pylist(ROWS)
    for number, part in enumerate((table.slice(0, 400), table.slice(400))):
        with pa.ipc.new_stream(tmp_path / f"data-{number}.arrow", table.schema) as stream:
            stream.write_table(part)
    files = [{"filename": f"data-{number}.arrow"} for number in range(2)]
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": files}))
    assert is_row_data(str(tmp_path))
    assert _values(tmp_path) == ROWS


def test_what_the_datasets_library_saves_is_read(tmp_path):
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    assert _values(tmp_path / "one") == ROWS
    both = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})
    both.save_to_disk(tmp_path / "splits")
    with pytest.raises(DataError, match=r"several splits\. Name one: .*splits/train"):
        _values(tmp_path / "splits")


BAD = {
    "cut": ('{"text": "a', "no JSON"),
    "a list": ("[1, 2]", "a JSON list, not an object"),
    "bytes": ('{"text": "\udcff"}', "no UTF-8"),
    "a field": ('{"txt": "a"}', "has no field 'text', but txt"),
    "a number": ('{"text": 7}', "'text' is 7, not a text"),
    "half a pair": ('{"text": "\\ud800"}', "'text' holds half of a surrogate pair"),
    "too deep": ("[" * 100_000, "no JSON"),
}


@pytest.fixture
def encoder(tmp_path):
    (tmp_path / "words").write_text("row number one two three " * 50)
    from plait.train.corpus import CorpusSettings, find_corpus

    corpus = find_corpus(str(tmp_path / "words"), CorpusSettings(), split=False)
    return TextEncoder(train_tokenizer(corpus.heldout, vocab_size=270), 0)


@pytest.mark.parametrize(("line", "reason"), BAD.values(), ids=BAD)
def test_a_corrupt_row_is_named_with_file_and_line(tmp_path, encoder, line, reason):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line.encode("utf-8", "surrogateescape") + b"\n")
    target = {"train": tmp_path / "tokens"}
    with pytest.raises(DataError, match=rf"rows.jsonl:2: {reason}.*on_bad_row=skip"):
        write_texts(read_rows(path), encoder, target, Problems())
    assert not target["train"].exists()
    problems = Problems("skip")
    sides = write_texts(read_rows(path), encoder, target, problems)
    assert sides["train"].num_bytes == len("good")
    assert problems.count == 1
    assert problems.named[0].startswith(f"{path}:2: ")


def test_files_cut_in_the_middle_are_problems_not_ends(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "cut.parquet")
    whole = (tmp_path / "cut.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    (problem,) = read_rows(tmp_path / "cut.parquet")
    assert isinstance(problem, Problem)
    assert "not a whole Parquet file" in problem.reason


@pytest.mark.parametrize("missing", [8, 200])
def test_a_saved_dataset_that_lacks_its_end_is_a_problem(tmp_path, missing):
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_stream(tmp_path / "data.arrow", table.schema) as stream:
        stream.write_table(table, max_chunksize=100)
    whole = (tmp_path / "data.arrow").read_bytes()
    (tmp_path / "data.arrow").write_bytes(whole[:-missing])  # 8: the mark of the end alone
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    *_, last = read_rows(tmp_path)
    assert isinstance(last, Problem)
    assert "not a whole Arrow file" in last.reason


def test_all_problems_are_counted_and_the_first_hundred_named(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text("{\n" * 250)
    problems = Problems("skip")
    assert list(keep_rows(read_rows(path), problems)) == []
    assert (problems.count, len(problems.named)) == (250, 100)


def test_no_rows_at_all_are_said_so(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        list(read_rows(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match="holds no files that end in"):
        list(read_rows(tmp_path))


def test_worker_processes_give_the_same_samples_in_the_same_order(tmp_path, encoder):
    path = _json_lines(tmp_path / "a.jsonl", [*ROWS, {"text": ""}, *ROWS])
    encoder = replace(encoder, heldout_fraction=0.3)
    problems = [Problems("skip"), Problems("skip")]
    written = []
    for num_workers in (0, 2):
        paths = {side: tmp_path / f"{side}-{num_workers}" for side in SIDES}
        totals = write_texts(
            read_rows(path), encoder, paths, problems[num_workers // 2], num_workers=num_workers
        )
        written.append((totals, [paths[side].read_bytes() for side in SIDES]))
    assert written[0] == written[1]
    assert problems[0] == problems[1]
    assert problems[0].count == 1
    texts = "".join(row["text"] for row in ROWS) * 2
    assert sum(side.num_bytes for side in written[0][0].values()) == len(texts)
    # Exact copies stay together, so each side decodes to every one of its texts twice.
    for side, content in zip(SIDES, written[0][1], strict=True):
        tokens = np.frombuffer(content, "<u2")
        assert written[0][0][side].num_tokens == len(tokens)
        found = [encoder.tokenizer.decode(part) for part in _between_ends(tokens)]
        assert all(found.count(text) == 2 for text in found)
        assert set(found) <= {row["text"] for row in ROWS}


def _between_ends(tokens):
    ends = np.flatnonzero(tokens == 0)
    assert ends[0] == 0
    assert ends[-1] == len(tokens) - 1
    return [tokens[a + 1 : b].tolist() for a, b in itertools.pairwise(ends)]


def test_an_evaluation_set_lies_in_one_file(tmp_path, encoder):
    path = _json_lines(tmp_path / "a.jsonl", ROWS)
    whole = replace(encoder, heldout_fraction=1.0)
    sides = write_texts(read_rows(path), whole, {"heldout": tmp_path / "held"}, Problems())
    assert sides["heldout"].num_bytes == sum(len(row["text"]) for row in ROWS)


def test_rows_are_read_only_as_far_as_they_are_encoded(encoder):
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield Row(f"{taken}", {"text": "row"})

    next(in_order(encoder, endless(), num_workers=0))
    assert taken <= 256
