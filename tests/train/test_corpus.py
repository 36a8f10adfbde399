"""Finding and splitting the text of a run."""

import os

import pytest

from plait.errors import ConfigError, DataError
from plait.train.corpus import CorpusSettings, find_corpus, num_bytes


def _write(folder, **texts):
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
    return folder


def _unlike(number, lines=40):
    return "".join(
        f"document {number} says {number * 1000 + i} and no more\n" for i in range(lines)
    )


@pytest.fixture
def folder(tmp_path):
    return _write(tmp_path / "texts", **{f"file{i:02}": _unlike(i) for i in range(50)})


def test_every_byte_lies_on_exactly_one_side(folder):
    corpus = find_corpus(str(folder), CorpusSettings(heldout_fraction=0.2))
    names = [document.name for document in corpus.train + corpus.heldout]
    assert sorted(names) == sorted(path.name for path in folder.iterdir())
    total = sum(path.stat().st_size for path in folder.iterdir())
    assert num_bytes(corpus.train) + num_bytes(corpus.heldout) == total
    assert 0.15 < num_bytes(corpus.heldout) / total < 0.25


def test_the_split_depends_on_names_and_contents_alone(folder, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    folder.rename(elsewhere)
    again = _write(folder, **{path.stem: path.read_text() for path in elsewhere.iterdir()})
    first, second = (find_corpus(str(path), CorpusSettings()) for path in (elsewhere, again))
    assert first.sha256 == second.sha256
    assert [d.name for d in first.heldout] == [d.name for d in second.heldout]


def test_one_changed_byte_changes_the_hash(folder):
    before = find_corpus(str(folder), CorpusSettings()).sha256
    path = folder / "file07.txt"
    path.write_text(path.read_text().replace("says", "sayz", 1))
    assert find_corpus(str(folder), CorpusSettings()).sha256 != before


def _sides(corpus):
    return {d.name: "train" for d in corpus.train} | {d.name: "heldout" for d in corpus.heldout}


@pytest.mark.parametrize("number", range(0, 50, 5))
def test_files_that_share_over_half_of_their_lines_stay_together(folder, number):
    lines = (folder / f"file{number:02}.txt").read_text().splitlines(keepends=True)
    own = "".join(f"own line of the copy {i}\n" for i in range(18))
    (folder / "zz_copy.txt").write_text("".join(lines[:22]) + own)
    sides = _sides(find_corpus(str(folder), CorpusSettings(heldout_fraction=0.3)))
    assert sides["zz_copy.txt"] == sides[f"file{number:02}.txt"]


def test_a_file_copied_into_a_larger_one_stays_with_it(folder):
    copied = (folder / "file03.txt").read_text()
    (folder / "larger.txt").write_text(_unlike(77, lines=300) + copied)
    for fraction in (0.05, 0.2, 0.4):
        sides = _sides(find_corpus(str(folder), CorpusSettings(heldout_fraction=fraction)))
        assert sides["larger.txt"] == sides["file03.txt"]


def test_a_single_file_is_cut_at_a_line_end(tmp_path):
    path = (
        _write(tmp_path, book="".join(f"line {i} of the book\n" for i in range(1000))) / "book.txt"
    )
    corpus = find_corpus(str(path), CorpusSettings(heldout_fraction=0.1))
    train, heldout = corpus.train[0].read_bytes(), corpus.heldout[0].read_bytes()
    assert train + heldout == path.read_bytes()
    assert train.endswith(b"\n")
    assert 0.08 < len(heldout) / path.stat().st_size < 0.12


def test_a_corpus_of_copies_is_split_with_a_warning(tmp_path):
    folder = _write(tmp_path / "copies", a=_unlike(1), b=_unlike(1), c=_unlike(1))
    with pytest.warns(UserWarning, match="all files share most of their lines"):
        corpus = find_corpus(str(folder), CorpusSettings(heldout_fraction=0.3))
    assert len(corpus.train) == 2
    assert len(corpus.heldout) == 1


def test_the_standard_library_is_found_and_split():
    corpus = find_corpus("stdlib", CorpusSettings())
    assert num_bytes(corpus.train) > 5_000_000
    share = num_bytes(corpus.heldout) / num_bytes(corpus.train + corpus.heldout)
    assert 0.05 < share < 0.07
    assert all("site-packages" not in d.name for d in corpus.train + corpus.heldout)


def test_text_is_read_in_pieces_that_join_to_the_whole(tmp_path):
    text = "".join(f"{'é' * (i % 97)}{i}\n" for i in range(60_000))
    path = _write(tmp_path, big=text) / "big.txt"
    corpus = find_corpus(str(path), CorpusSettings(heldout_fraction=0.5))
    for document in (*corpus.train, *corpus.heldout):
        chunks = list(document.read_chunks())
        assert "".join(chunks).encode() == document.read_bytes()
        assert all(len(chunk.encode()) <= 1.1 * 2**20 for chunk in chunks)


def test_a_long_text_without_line_ends_is_read_in_pieces_too(tmp_path):
    text = "né東🙂" * 400_000
    path = _write(tmp_path, big=text + "\n" + text) / "big.txt"
    corpus = find_corpus(str(path), CorpusSettings(heldout_fraction=0.4))
    assert "".join(corpus.train[0].read_chunks()) == text + "\n"
    chunks = list(corpus.heldout[0].read_chunks())
    assert "".join(chunks) == text
    assert max(map(len, chunks)) < 2**20


def test_a_name_that_is_not_unicode_is_taken_as_it_is(folder):
    name = os.fsdecode(b"caf\xe9.txt")
    (folder / name).write_text(_unlike(99))
    corpus = find_corpus(str(folder), CorpusSettings())
    assert name in _sides(corpus)
    assert corpus.sha256


def test_something_that_is_no_file_is_refused():
    with pytest.raises(DataError, match="neither a file nor a folder"):
        find_corpus("/dev/null", CorpusSettings())


def test_hidden_files_links_and_installed_packages_are_left_out(folder):
    (folder / ".hidden.txt").write_text("secret\n")
    (folder / "site-packages").mkdir()
    (folder / "site-packages" / "other.txt").write_text("other\n")
    (folder / "link.txt").symlink_to(folder / "file00.txt")
    names = _sides(find_corpus(str(folder), CorpusSettings()))
    assert len(names) == 50


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        find_corpus(str(tmp_path / "nowhere"), CorpusSettings())


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="has no files"):
        find_corpus(str(tmp_path), CorpusSettings())


def test_files_without_text_are_refused(tmp_path):
    with pytest.raises(DataError, match="holds no text"):
        find_corpus(str(_write(tmp_path / "blank", a="", b=" \n\n")), CorpusSettings())


def test_a_file_too_short_to_split_is_refused(tmp_path):
    with pytest.raises(DataError, match="too short to split"):
        find_corpus(str(_write(tmp_path / "short", a="one line")), CorpusSettings())


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"\x89PNG\0\0", "a zero byte at 4"), (b"abc\xff\xfe", "no UTF-8 at byte 3")],
)
def test_a_binary_file_is_refused_or_listed_as_skipped(folder, content, reason):
    (folder / "image.png").write_bytes(content)
    with pytest.raises(DataError, match=rf"image.png is not text: {reason}"):
        find_corpus(str(folder), CorpusSettings())
    corpus = find_corpus(str(folder), CorpusSettings(undecodable="skip"))
    assert corpus.skipped == {"image.png": reason}


def test_suffixes_choose_files(folder):
    (folder / "image.png").write_bytes(b"\0")
    corpus = find_corpus(str(folder), CorpusSettings(suffixes=(".txt",)))
    assert len(corpus.train + corpus.heldout) == 50


def test_a_fraction_outside_zero_to_one_is_refused():
    with pytest.raises(ConfigError, match="heldout_fraction=1"):
        CorpusSettings(heldout_fraction=1.0)
