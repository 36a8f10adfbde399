"""Model FLOPs utilization: how much of a device's arithmetic a step makes use of.

[Chowdhery et al. 2022, PaLM, arXiv:2204.02311, appendix B.] Work that a model does not need, such
as recomputation, does not count.
"""

from dataclasses import dataclass

import torch

from plait.cost.accelerators import CLUSTERS, GPUS, longest_in
from plait.models.decoder_config import DecoderConfig

# Dense bfloat16 products [FLOP/s]: of those of the dry run, and from the makers' data sheets.
PEAK_FLOPS: dict[str, float] = {
    **{key: CLUSTERS[c](1).device.peak_flops_per_s[torch.bfloat16] for key, c in GPUS.items()},
    "H100 NVL": 835e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


@dataclass(frozen=True)
class Utilization:
    """What one token of training costs [FLOP], and what the device can do [FLOP/s]."""

    flops_per_token: float
    peak_flops_per_s: float

    def of(self, tokens_per_s: float) -> float:
        """Utilization between 0 and 1."""
        return tokens_per_s * self.flops_per_token / self.peak_flops_per_s


def training_flops_per_token(config: DecoderConfig, *, num_matrix: int, length: int) -> float:
    """Six for each weight in a product, and the scores: forward, and twice that backward [FLOP].

    num_matrix: weights that a token meets in products. length: of the sequences. Each token sees
    half of them on average, or its window.
    """
    seen = [
        min(config.sliding_window or length, length / 2) if config.has_window(layer) else length / 2
        for layer in range(config.num_layers)
    ]
    if config.latent is None:
        sizes = 2 * config.head_size
    else:
        latent = config.latent
        sizes = latent.plain_size + latent.rotary_size + latent.value_size
    return 6.0 * num_matrix + 6.0 * config.num_heads * sizes * sum(seen)


def num_matrix_weights(model: torch.nn.Module, config: DecoderConfig) -> int:
    """Count the weights that one token meets: no look-up tables, of the experts only its own."""
    count = 0
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3 and config.experts is not None:
            share = config.experts.experts_per_token / config.experts.num_experts
            count += round(parameter.numel() * share)
        elif parameter.dim() == 2 and "embed_" not in name:
            count += parameter.numel()
    if config.tie_embeddings:  # the head's product has a weight under the table's name
        count += config.vocab_size * config.hidden_size
    return count


def utilization_on(
    device: torch.device, model: torch.nn.Module, config: DecoderConfig, *, length: int
) -> Utilization | None:
    """What to measure against; None on hardware whose peak is not known, such as processors."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    peak = peak_of(name)
    if peak is None:
        return None
    num_matrix = num_matrix_weights(model, config)
    return Utilization(training_flops_per_token(config, num_matrix=num_matrix, length=length), peak)


def peak_of(name: str) -> float | None:
    """Peak of a device by whole words of its name; the longest match decides."""
    known = longest_in(name, PEAK_FLOPS)
    return None if known is None else PEAK_FLOPS[known]
