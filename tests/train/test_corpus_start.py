"""The start from corpus statistics does what it is built for, before any training."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from plait.errors import ConfigError
from plait.models.decoder import Decoder, DecoderConfig
from plait.nn.rotary import Rope
from plait.train.corpus_start import check_room, start_from_corpus

CONFIG = DecoderConfig(
    vocab_size=300,
    hidden_size=192,
    intermediate_size=128,
    num_layers=3,
    num_heads=3,
    num_kv_heads=3,
    head_size=64,
    max_positions=512,
    rope=Rope(theta=500_000.0),
)


@pytest.fixture(scope="module")
def chain():
    """Tokens of a Markov chain: twenty kinds of token, each with fifteen likely successors."""
    rng = np.random.default_rng(0)
    successors = rng.integers(0, 300, (20, 15))
    tokens = [0]
    for choice, is_jump in zip(rng.integers(0, 15, 60_000), rng.random(60_000) < 0.1, strict=True):
        tokens.append(rng.integers(0, 300) if is_jump else successors[tokens[-1] % 20, choice])
    return np.array(tokens, np.uint16)


def _started(tokens, *, seed=0, with_induction=True):
    model = Decoder(CONFIG).eval()
    model.initialize(torch.Generator().manual_seed(seed))
    start_from_corpus(model, tokens, seed=seed)
    if not with_induction:
        with torch.no_grad():
            model.layers[1].self_attn.o_proj.weight.zero_()
    return model


@torch.no_grad()
def _losses(model, tokens):
    rows = torch.from_numpy(tokens.astype(np.int64)).view(-1, 256)
    logits = model.logits(model(rows[:, :-1]))
    return cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")


def _entropies(tokens):
    """Cross-entropy of the tokens under their own single and pair frequencies."""
    single = np.bincount(tokens, minlength=300) / len(tokens)
    pairs = np.zeros((300, 300))
    np.add.at(pairs, (tokens[:-1], tokens[1:]), 1)
    follow = pairs / pairs.sum(1, keepdims=True)
    return -np.log(single[tokens]).mean(), -np.log(follow[tokens[:-1], tokens[1:]]).mean()


def test_the_untrained_model_knows_which_token_follows_which(chain):
    single, pair = _entropies(chain)
    # In a chain what came once does not come again more often: copying could only mislead.
    loss = _losses(_started(chain, with_induction=False), chain[: 256 * 40]).mean().item()
    # Two thirds of what pair frequencies say beyond single ones (seen: 73 %).
    assert pair - 0.2 < loss < single - 2 / 3 * (single - pair)


def test_the_untrained_model_repeats_what_it_has_seen(chain):
    model = _started(chain)
    rng = np.random.default_rng(1)
    once = rng.permuted(np.tile(np.arange(300), (20, 1)), axis=1)[:, :128]
    losses = _losses(model, np.concatenate((once, once), axis=1).ravel())
    first, again = losses[:, :127].mean().item(), losses[:, 130:].mean().item()
    assert again < first - 3.0


def test_without_the_induction_head_nothing_is_repeated(chain):
    model = _started(chain, with_induction=False)
    rng = np.random.default_rng(1)
    once = rng.permuted(np.tile(np.arange(300), (20, 1)), axis=1)[:, :128]
    losses = _losses(model, np.concatenate((once, once), axis=1).ravel())
    first, again = losses[:, :127].mean().item(), losses[:, 130:].mean().item()
    assert abs(again - first) < 0.3


def test_the_start_is_a_function_of_tokens_and_seed(chain):
    first, second, other = _started(chain), _started(chain), _started(chain, seed=1)
    state = torch.get_rng_state()
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, dict(second.named_parameters())[name]), name
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert torch.equal(state, torch.get_rng_state())


def test_every_weight_stays_finite_and_trainable(chain):
    model = _started(chain)
    rows = torch.from_numpy(chain[:512].astype(np.int64)).view(2, 256)
    model.logits(model(rows)).logsumexp(-1).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 1}, "num_layers must be at least 2"),
        ({"hidden_size": 128}, r"more than 2\.5 times"),
        ({"head_size": 8}, "head_size must be a multiple of 4, at least 16"),
        ({"head_size": 18}, "head_size must be a multiple of 4, at least 16"),
        ({"vocab_size": 95}, "vocab_size must be more than 95"),
        ({"tie_embeddings": True}, "tie_embeddings must be false"),
        ({"qk_norm": True}, "qk_norm must be false"),
    ],
)
def test_a_model_without_room_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        check_room(replace(CONFIG, **change))
