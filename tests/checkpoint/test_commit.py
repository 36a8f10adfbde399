"""A folder is committed whole or not at all."""

import json

import pytest

from plait.checkpoint.commit import check_folder, commit_folder
from plait.errors import CheckpointError


def _write(text):
    return lambda folder: (folder / "file").write_text(text)


def test_a_committed_folder_holds_what_was_written_and_passes_its_check(tmp_path):
    commit_folder(tmp_path / "a", _write("one"))
    check_folder(tmp_path / "a")
    assert (tmp_path / "a" / "file").read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    commit_folder(tmp_path / "a", lambda folder: (folder / "old").write_text("1"))
    commit_folder(tmp_path / "a", _write("two"))
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["file", "manifest.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyError("x"), KeyboardInterrupt])
def test_a_failed_write_leaves_the_previous_folder(tmp_path, error):
    commit_folder(tmp_path / "a", _write("one"))

    def fail(folder):
        (folder / "file").write_text("half")
        raise error

    expected = CheckpointError if isinstance(error, OSError) else type(error)
    if error is KeyboardInterrupt:
        expected = KeyboardInterrupt
    with pytest.raises(expected):
        commit_folder(tmp_path / "a", fail)
    assert (tmp_path / "a" / "file").read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_kill_between_the_two_renames_is_undone_by_the_next_commit(tmp_path):
    commit_folder(tmp_path / "a", _write("one"))
    (tmp_path / "a").rename(tmp_path / ".incomplete-a-old")

    def look(folder):
        assert (tmp_path / "a" / "file").read_text() == "one"
        (folder / "file").write_text("two")

    commit_folder(tmp_path / "a", look)
    assert (tmp_path / "a" / "file").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "file").write_text("on"), "was cut short"),
        (lambda f: (f / "file").write_text("onf"), "does not hold the bytes"),
        (lambda f: (f / "file").unlink(), "is missing"),
        (lambda f: (f / "manifest.json").write_text("{"), "not valid JSON"),
        (lambda f: (f / "manifest.json").write_text("[]"), "not a JSON object"),
        (lambda f: (f / "manifest.json").write_text(json.dumps({"a": 1})), "lists no files"),
        (lambda f: (f / "manifest.json").unlink(), "has no manifest.json"),
    ],
)
def test_damage_is_found_and_named(tmp_path, damage, message):
    commit_folder(tmp_path / "a", _write("one"))
    damage(tmp_path / "a")
    with pytest.raises(CheckpointError, match=message):
        check_folder(tmp_path / "a")
