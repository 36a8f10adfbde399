"""Scoring text, and the yardstick."""

import lzma
import math

import numpy as np
import pytest
import torch

from plait.errors import ConfigError
from plait.models.decoder import Decoder, DecoderConfig
from plait.train.corpus import CorpusSettings, find_corpus
from plait.train.evaluate import Evaluation, Scoring, evaluate
from plait.train.xz import compress_with_xz


@pytest.fixture(scope="module")
def model():
    config = DecoderConfig(
        vocab_size=60,
        hidden_size=16,
        intermediate_size=24,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        head_size=8,
        max_positions=64,
        init_std=0.3,
    )
    model = Decoder(config)
    model.initialize(torch.Generator().manual_seed(0))
    return model


TOKENS = np.random.default_rng(0).integers(0, 60, 300).astype(np.uint16)


@torch.no_grad()
def _nats_by_hand(model, context, stride):
    """One token at a time, each with the window that `evaluate` promises."""
    total, scored, start = 0.0, 0, 0
    while scored < len(TOKENS) - 1:
        end = min(start + context, len(TOKENS) - 1)
        inputs = torch.from_numpy(TOKENS[start:end].astype(np.int64))[None]
        logp = model.logits(model(inputs))[0].log_softmax(-1)
        for i in range(scored, end):
            total -= logp[i - start, int(TOKENS[i + 1])].item()
        start, scored = start + stride, end
    return total


@pytest.mark.parametrize(("context", "stride"), [(32, 32), (32, 8), (64, 63)])
def test_the_sum_equals_one_taken_by_hand(model, context, stride):
    scoring = Scoring(context=context, stride=stride, dtype="float32")
    result = evaluate(model, TOKENS, num_bytes=1000, scoring=scoring)
    assert result.num_tokens == 299
    assert result.nats == pytest.approx(_nats_by_hand(model, context, stride), rel=1e-5)


def test_a_part_of_the_windows_stands_for_its_part_of_the_bytes(model):
    scoring = Scoring(context=32, stride=32, dtype="float32")
    part = evaluate(model, TOKENS, num_bytes=2990, scoring=scoring, most_windows=5)
    assert (part.num_tokens, part.num_bytes) == (160, 1600)
    whole = evaluate(model, TOKENS, num_bytes=2990, scoring=scoring)
    assert part.bits_per_byte == pytest.approx(whole.bits_per_byte, rel=0.2)


def test_units_are_those_of_the_definitions():
    result = Evaluation(nats=100.0, num_tokens=50, num_bytes=200)
    assert result.perplexity == pytest.approx(math.exp(2.0))
    assert result.bits_per_byte == pytest.approx(100 / math.log(2) / 200)


def test_progress_counts_up_to_all_tokens(model):
    seen = []
    scoring = Scoring(context=32, stride=16, dtype="float32")
    evaluate(
        model,
        TOKENS,
        num_bytes=1,
        scoring=scoring,
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert seen[-1] == (299, 299)
    assert seen == sorted(seen)


def test_a_stride_longer_than_the_context_is_refused():
    with pytest.raises(ConfigError, match=r"stride=9 must lie in 1\.\.context=8"):
        Scoring(context=8, stride=9)


def test_xz_numbers_are_those_of_the_xz_format(tmp_path):
    generator = np.random.default_rng(0)
    words = [bytes(generator.integers(97, 123, 6).astype(np.uint8)).decode() for _ in range(200)]
    for i in range(30):
        text = "\n".join(" ".join(generator.choice(words, 8)) for _ in range(50))
        (tmp_path / f"{i:02}.txt").write_text(text)
    corpus = find_corpus(str(tmp_path), CorpusSettings(heldout_fraction=0.3))
    result = compress_with_xz(corpus.train, corpus.heldout)
    texts = [document.read_bytes() for document in corpus.heldout]
    size = sum(map(len, texts))

    def compressed(text):
        return len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))

    assert result.solid == 8 * compressed(b"".join(texts)) / size
    assert result.per_file == 8 * sum(map(compressed, texts)) / size
    train = b"".join(document.read_bytes() for document in corpus.train)
    after = compressed(train + b"".join(texts)) - compressed(train)
    assert result.conditional == 8 * after / size
    assert result.conditional < result.solid < result.per_file
