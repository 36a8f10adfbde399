"""Start a model from the statistics of its corpus instead of from noise.

Two things about text need no gradient descent: which token tends to follow which, and that what
followed a token once tends to follow it again. Both can be written into the weights of a decoder:

- Embedding and output matrix hold a factorization of the bigram log-ratios log p(b | a) / p(b)
  [Levy & Goldberg 2014, section 3.1]: the model without its layers is a smoothed bigram model.
- The first head of layer 0 attends to the previous token and leaves a code of it in the residual
  stream; the first head of layer 1 looks for places whose previous token is the current one and
  copies what stands there: an induction circuit [Olsson et al. 2022, arXiv:2209.11895, section 2].

On the standard library such a start is where about 1,000 steps from noise lead.

All other projections into the residual stream start at zero: they disturb nothing, and learn.
The residual stream is divided into four parts:

    token (what is left) | previous (H/2) | copied (H) | constant (1)
"""

# Shapes: V vocabulary, D model width, H head size, R rank of the bigram factors (= token part).

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from plait.errors import ConfigError
from plait.models.decoder import Decoder, DecoderConfig
from plait.nn.attention import Attention

# Fitted on the standard library's train side by the held-out loss of the untrained model, at 16,384
# tokens and width 320; the loss changes by under 2 % when any of them changes by a third.
_CONSTANT = 4.0  # value of the constant part, where the token part has unit mean square
_PREVIOUS_CONTRAST = 6.0  # how far the previous token's score is above its neighbours' [nats]
_MATCH_SCORE = 11.0  # score of a place whose previous token is the current one [nats]
_COPY_GAIN = 7.0  # what copying adds to a token's logit [nats]
_ROW_WEIGHT_POWER = 0.25  # how much more the factorization cares for frequent tokens
_MOST_TOKENS = 64_000_000
_FAMILIES = ("llama", "mistral", "qwen2")
_NUM_FAST_PAIRS = 6  # rotation pairs that tell neighbouring positions apart


@dataclass(frozen=True)
class _Parts:
    """Places of the four parts in the residual stream, and its scale after each addition."""

    token: slice
    previous: slice
    copied: slice
    constant: int

    @property
    def rank(self) -> int:
        return self.token.stop

    def root_mean_square(self, *, with_previous: bool) -> float:
        """Of the whole stream, if token and previous part have unit mean square."""
        num_previous = self.previous.stop - self.previous.start if with_previous else 0
        width = self.constant + 1
        return math.sqrt((self.rank + num_previous + _CONSTANT**2) / width)


@torch.no_grad()
def start_from_corpus(model: Decoder, tokens: NDArray[np.integer], *, seed: int) -> None:
    """Overwrite the weights of a freshly initialized model by the statistics of `tokens`.

    The first 64 million tokens are enough and all that is read.

    Raises ConfigError for a model that has no room for the circuit.
    """
    check_room(model.config)
    parts = _divide(model.config)
    device = model.embed_tokens.weight.device
    model.cpu()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.zero_()
    first_tokens = torch.from_numpy(tokens[:_MOST_TOKENS].astype(np.int64))
    _write_bigrams(model, first_tokens, parts, seed=seed, generator=generator)
    code = torch.randn(model.config.head_size // 2, parts.rank, generator=generator)
    code /= math.sqrt(parts.rank)
    _write_previous_token_head(model, parts, code)
    _write_induction_head(model, parts, code, generator=generator)
    model.to(device)


def check_room(config: DecoderConfig) -> None:
    """Raise ConfigError if `start_from_corpus` cannot write its circuit into such a model."""
    rank = _divide(config).rank
    problems = {
        "model.family must be llama, mistral or qwen2": config.family not in _FAMILIES,
        "model.num_layers must be at least 2": config.num_layers < 2,
        "model.hidden_size must be more than 2.5 times model.head_size": rank < config.head_size,
        "model.head_size must be a multiple of 4, at least 16": config.head_size % 4 > 0
        or config.head_size < 16,
        f"model.vocab_size must be more than {rank}": config.vocab_size <= rank,
        "model.tie_embeddings must be false": config.tie_embeddings,
        "model.qk_norm must be false": config.qk_norm,
    }
    if failed := [text for text, is_broken in problems.items() if is_broken]:
        raise ConfigError(
            f"initialization=corpus does not fit this model: {'; '.join(failed)}. "
            "Change that, or use initialization=random."
        )


def _divide(config: DecoderConfig) -> _Parts:
    rank = config.hidden_size - config.head_size // 2 - config.head_size - 1
    previous = slice(rank, rank + config.head_size // 2)
    copied = slice(previous.stop, previous.stop + config.head_size)
    return _Parts(slice(0, rank), previous, copied, copied.stop)


def _write_bigrams(
    model: Decoder, tokens: Tensor, parts: _Parts, *, seed: int, generator: torch.Generator
) -> None:
    vocab_size, rank = model.config.vocab_size, parts.rank
    counts_V = torch.bincount(tokens, minlength=vocab_size).float()
    first_VR, second_VR = _factor_bigrams(tokens, counts_V, rank, seed=seed)
    sizes_V = first_VR.norm(dim=1)
    mean_size = (sizes_V * counts_V).sum() / counts_V.sum()
    # A little noise gives every token a direction of its own, tokens without bigrams included.
    noise_VR = torch.randn(vocab_size, rank, generator=generator)
    first_VR += 0.02 * sizes_V.mean() / math.sqrt(rank) * noise_VR

    embedding_VD = model.embed_tokens.weight.zero_()
    embedding_VD[:, parts.token] = first_VR * (math.sqrt(rank) / first_VR.norm(dim=1, keepdim=True))
    embedding_VD[:, parts.constant] = _CONSTANT
    output_VD = model.lm_head.weight
    output_VD.normal_(std=0.1 * model.config.init_std, generator=generator)
    output_VD[:, parts.token] = second_VR * (mean_size / math.sqrt(rank))
    logp_V = ((counts_V + 0.5) / (counts_V + 0.5).sum()).log()
    constant = _CONSTANT / parts.root_mean_square(with_previous=False)
    output_VD[:, parts.constant] = logp_V / constant


def _factor_bigrams(
    tokens: Tensor, counts_V: Tensor, rank: int, *, seed: int
) -> tuple[Tensor, Tensor]:
    """Factors (V, R) each, their product being about the positive log-ratios of seen bigrams."""
    vocab_size = len(counts_V)
    pairs, seen = torch.unique(tokens[:-1] * vocab_size + tokens[1:], return_counts=True)
    first, second, seen = pairs // vocab_size, pairs % vocab_size, seen.float()
    expected = counts_V[first] * counts_V[second] / (len(tokens) - 1)
    # Discounted, and shrunk where a bigram was seen once or twice only.
    ratios = ((seen - 0.5) / expected).log().clamp(min=0) * seen / (seen + 1)
    weights_V = counts_V.pow(_ROW_WEIGHT_POWER) + 1e-3
    with torch.sparse.check_sparse_tensor_invariants(True):
        matrix_VV = torch.sparse_coo_tensor(
            torch.stack((first, second)), ratios * weights_V[first], (vocab_size, vocab_size)
        ).coalesce()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # svd_lowrank draws from the global generator
        left_VR, sizes_R, right_VR = torch.svd_lowrank(matrix_VV, q=rank, niter=2)
    return left_VR * sizes_R.sqrt() / weights_V[:, None], right_VR * sizes_R.sqrt()


def _write_previous_token_head(model: Decoder, parts: _Parts, code_CR: Tensor) -> None:
    """Layer 0, head 0: leave `code @ token` of the previous token in the previous part."""
    attention = _attention(model, 0)
    size = attention.head_size
    _clear_head(attention)
    scale = parts.root_mean_square(with_previous=False)
    frequencies = model.config.rope.inverse_frequencies(size)
    # The scores are sums of cos(frequency * (distance - 1)): largest at distance 1.
    num_pairs = min(_NUM_FAST_PAIRS, size // 2)
    gap = (1 - frequencies[:num_pairs].cos()).sum().item()
    amplitude = math.sqrt(_PREVIOUS_CONTRAST * math.sqrt(size) / gap) * scale / _CONSTANT
    for pair in range(num_pairs):
        attention.q_proj.weight[pair, parts.constant] = amplitude
        angle = frequencies[pair]
        attention.k_proj.weight[pair, parts.constant] = amplitude * angle.cos()
        attention.k_proj.weight[pair + size // 2, parts.constant] = amplitude * angle.sin()
    num_codes = len(code_CR)
    attention.v_proj.weight[:num_codes, parts.token] = code_CR * scale
    attention.o_proj.weight[parts.previous, :num_codes] = torch.eye(num_codes)


def _write_induction_head(
    model: Decoder, parts: _Parts, code_CR: Tensor, *, generator: torch.Generator
) -> None:
    """Layer 1, head 0: find places whose previous token is the current one, copy their token."""
    attention = _attention(model, 1)
    size = attention.head_size
    _clear_head(attention)
    scale = parts.root_mean_square(with_previous=True)
    num_codes = len(code_CR)
    # The codes go to the slow half of the rotation pairs, which hardly turn over a sample's length.
    slow = torch.arange(size // 2 - num_codes // 2, size // 2)
    places = torch.cat((slow, slow + size // 2))
    gain = math.sqrt(_MATCH_SCORE * math.sqrt(size) / num_codes) * scale
    attention.q_proj.weight[places, parts.token] = code_CR * gain
    attention.k_proj.weight[places, parts.previous] = torch.eye(num_codes) * gain
    copy_HR = torch.randn(size, parts.rank, generator=generator) / math.sqrt(parts.rank)
    attention.v_proj.weight[:size, parts.token] = copy_HR * scale
    attention.o_proj.weight[parts.copied, :size] = torch.eye(size)
    tokens_VR = model.embed_tokens.weight[:, parts.token]
    model.lm_head.weight[:, parts.copied] = tokens_VR @ copy_HR.T * (_COPY_GAIN * scale / size)


def _attention(model: Decoder, layer: int) -> Attention:
    attention = model.layers[layer].self_attn
    assert isinstance(attention, Attention), "check_room lets no other kind through"
    return attention


def _clear_head(attention: Attention) -> None:
    """Zero what the first query head and the first key-value head read."""
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
        projection.weight[: attention.head_size].zero_()
