"""Tokens on disk, samples, their order, and the windows of an evaluation."""

import numpy as np
import pytest

from plait.errors import DataError
from plait.train.corpus import CorpusSettings, find_corpus
from plait.train.data import PackedSamples, read_tokens, shuffled, windows, write_tokens
from plait.train.tokenizer import END_OF_TEXT, train_tokenizer


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000, 4097])
def test_the_order_of_an_epoch_is_a_permutation(size):
    order = [shuffled(place, size, seed=3, epoch=1) for place in range(size)]
    assert sorted(order) == list(range(size))


def test_epochs_and_seeds_have_different_orders():
    orders = {
        tuple(shuffled(place, 500, seed=seed, epoch=epoch) for place in range(500))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9


def test_the_order_looks_random():
    order = np.array([shuffled(place, 10_000, seed=0, epoch=0) for place in range(10_000)])
    # Correlation of neighbours and with the place itself: about 1/sqrt(10,000) for a random order.
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.04
    assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.04


def test_a_sample_depends_on_seed_and_global_index_alone():
    tokens = np.arange(1001, dtype=np.uint16)
    samples = PackedSamples(tokens, sequence_length=10, seed=5)
    whole = samples.batch(range(12))[0]
    ranks = [samples.batch(range(rank, 12, 3))[0] for rank in range(3)]
    for index in range(12):
        assert (whole[index] == ranks[index % 3][index // 3]).all()


def test_an_epoch_shows_every_token_once_and_targets_follow_inputs():
    tokens = np.arange(1001, dtype=np.uint16)
    samples = PackedSamples(tokens, sequence_length=10, seed=5)
    inputs, targets = samples.batch(range(samples.num_samples))
    assert sorted(inputs.flatten().tolist()) == list(range(1000))
    assert (targets == inputs + 1).all()


def test_too_few_tokens_for_a_sample_are_refused():
    with pytest.raises(DataError, match="10 tokens do not fill one sample of 10"):
        PackedSamples(np.zeros(10, np.uint16), sequence_length=10, seed=0)


@pytest.mark.parametrize("num_tokens", [2, 9, 17, 100, 101])
@pytest.mark.parametrize(("context", "stride"), [(8, 8), (8, 3), (16, 1), (200, 50)])
def test_windows_score_every_target_once_with_enough_before_it(num_tokens, context, stride):
    scored = []
    for start, first, end in windows(num_tokens, context=context, stride=stride):
        assert 0 <= start <= first < end <= num_tokens - 1
        assert end - start <= context
        assert start == 0 or first - start >= context - stride
        scored += range(first, end)
    assert scored == list(range(num_tokens - 1))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for i in range(20):
        lines = [f"    value_{i} = call({i}, 'é', {j * i})\n" for j in range(200)]
        (folder / f"{i:02}.txt").write_text(f"def function_{i}():\n" + "".join(lines))
    return find_corpus(str(folder), CorpusSettings(heldout_fraction=0.2))


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return train_tokenizer(corpus.train, vocab_size=400)


def test_tokens_decode_to_the_documents_with_marks_between(corpus, tokenizer, tmp_path):
    count = write_tokens(corpus.heldout, tokenizer, tmp_path / "tokens.bin", end_of_text=0)
    tokens = read_tokens(tmp_path / "tokens.bin", vocab_size=400)
    assert len(tokens) == count
    text = tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
    parts = text.split(END_OF_TEXT)
    assert parts[0] == parts[-1] == ""
    assert [part.encode() for part in parts[1:-1]] == [d.read_bytes() for d in corpus.heldout]


def test_any_text_survives_the_tokenizer(tokenizer):
    for text in ["", " ", "\r\n\t x", "naïve 中文 🙂", "a\n\n\n    b", "\x01\x7f", "12345678"]:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_a_text_that_spells_the_end_of_text_does_not_end_there(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text(f"one {END_OF_TEXT} two\nthree\n")
    (tmp_path / "b.txt").write_text("something else\n")
    documents = find_corpus(str(tmp_path), CorpusSettings(), split=False).heldout
    write_tokens(documents, tokenizer, tmp_path / "tokens.bin", end_of_text=0)
    tokens = read_tokens(tmp_path / "tokens.bin", vocab_size=400).tolist()
    assert tokens.count(0) == 3


def test_a_file_that_changes_between_reading_and_encoding_is_noticed(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("one two three\n")
    documents = find_corpus(str(tmp_path), CorpusSettings(), split=False).heldout
    (tmp_path / "a.txt").write_text("one two thref\n")
    with pytest.raises(DataError, match="changed while it was read"):
        write_tokens(documents, tokenizer, tmp_path / "tokens.bin", end_of_text=0)


def test_a_vocabulary_without_room_for_bytes_is_refused(corpus):
    with pytest.raises(DataError, match="needs more than 256 tokens"):
        train_tokenizer(corpus.train, vocab_size=256)
