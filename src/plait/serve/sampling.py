"""Choose the next token from logits."""

# Shapes: V vocabulary.

from dataclasses import dataclass

import torch
from torch import Tensor

from plait.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """temperature 0 takes the likeliest token; top_k 0 and top_p 1 leave all tokens in."""

    temperature: float = 0.7
    top_k: int = 50
    top_p: float = 0.95
    max_new_tokens: int = 160
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        if (
            self.temperature < 0
            or self.top_k < 0
            or not 0 < self.top_p <= 1
            or self.max_new_tokens < 1
        ):
            raise ConfigError(
                "sampling needs temperature >= 0, top_k >= 0, 0 < top_p <= 1, max_new_tokens >= 1; "
                "got "
                f"{self.temperature}, {self.top_k}, {self.top_p} and {self.max_new_tokens}."
            )


def sample_token(
    logits_V: Tensor, sampling: Sampling, generator: torch.Generator | None = None
) -> int:
    """Draw one token; temperature first, then top-k, then the smallest set of mass top-p."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    # The largest logit becomes 0, so that no temperature, however small, overflows.
    logits_V = (logits_V.float() - logits_V.max()) / sampling.temperature
    if 0 < sampling.top_k < logits_V.numel():
        kth = logits_V.topk(sampling.top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < kth, float("-inf"))
    p_V, order_V = logits_V.softmax(dim=-1).sort(descending=True, stable=True)
    # A token stays if those before it have not reached top_p yet, so the first always stays.
    p_V[p_V.cumsum(dim=-1) - p_V >= sampling.top_p] = 0
    return int(order_V[torch.multinomial(p_V, 1, generator=generator)])
