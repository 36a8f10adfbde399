"""Packed rows: every token once, in its document, and no document sees another."""

import numpy as np
import pytest
import torch

from plait.errors import DataError
from plait.models.decoder import Decoder, DecoderConfig
from plait.train.encode_rows import Sample
from plait.train.packing import PackedRows, positions_of, write_packed

TINY = DecoderConfig(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_size=8,
    max_positions=32,
)


def _samples(count=60, most=33):
    generator = np.random.default_rng(0)
    return [
        Sample(
            f"row {number}",
            generator.integers(1, 50, size).astype(np.uint32),
            generator.random(size) < 0.7,
        )
        for number, size in enumerate(generator.integers(2, most + 1, count))
    ]


def _rows(tmp_path, samples, *, pack=True):
    facts = write_packed(samples, tmp_path / "rows", sequence_length=32, pack=pack)
    return facts, PackedRows(tmp_path / "rows", sequence_length=32)


def test_every_learnt_token_is_a_target_once_behind_its_own_document(tmp_path):
    samples = _samples()
    facts, rows = _rows(tmp_path, samples)
    batch = rows.batch(range(len(rows)))
    found = []
    for inputs, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        found += [(i, t) for i, t in zip(inputs, targets, strict=True) if t >= 0]
    expected = [
        (int(a), int(b))
        for sample in samples
        for a, b, counted in zip(
            sample.tokens[:-1], sample.tokens[1:], sample.counted[1:], strict=True
        )
        if counted
    ]
    assert sorted(found) == sorted(expected)
    assert facts.num_counted == len(expected) == batch.num_targets
    assert facts.num_tokens == sum(len(sample.tokens) for sample in samples)


def test_packing_wastes_little(tmp_path):
    facts, _ = _rows(tmp_path, _samples(count=2000))
    assert facts.num_tokens / (facts.num_rows * 33) > 0.95


def test_the_loss_of_packed_documents_is_that_of_separate_ones(tmp_path):
    model = Decoder(TINY)
    model.initialize(torch.Generator().manual_seed(0))
    losses = []
    for pack in (True, False):
        _, rows = _rows(tmp_path, _samples(), pack=pack)
        batch = rows.batch(range(len(rows)))
        assert (batch.layout is None) == (not pack)
        losses.append(model.loss(model(batch.inputs, batch.layout), batch.targets))
    # The same sums over other rows of a matrix product: float32 rounding over two layers.
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)


def test_positions_start_anew_with_every_document():
    segments = torch.tensor([[1, 1, 1, 2, 2, 0, 0], [1, 2, 2, 2, 3, 3, 3]])
    expected = [[0, 1, 2, 0, 1, 0, 1], [0, 0, 1, 2, 0, 1, 2]]
    assert positions_of(segments).tolist() == expected


def test_a_batch_is_cut_behind_its_longest_row(tmp_path):
    short = [s for s in _samples() if len(s.tokens) <= 9]
    _, rows = _rows(tmp_path, short, pack=False)
    longest = max(len(sample.tokens) for sample in short)
    assert rows.batch(range(len(rows))).inputs.shape == (len(short), longest - 1)


def test_a_sample_that_does_not_fit_is_named(tmp_path):
    with pytest.raises(DataError, match="row 0: 34 tokens do not fit into a row of 33"):
        _rows(tmp_path, [Sample("row 0", np.ones(34, np.uint32), np.ones(34, np.bool_))])
    with pytest.raises(DataError, match="no sample is left"):
        _rows(tmp_path, [])
