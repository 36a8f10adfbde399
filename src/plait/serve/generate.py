"""Complete a prompt token by token, with the model's key-value cache."""

from collections.abc import Collection, Iterator, Sequence

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from plait.errors import ModelError
from plait.models.decoder import Decoder
from plait.serve.sampling import Sampling, sample_token


@torch.inference_mode()
def generate(
    model: Decoder,
    prompt: Sequence[int],
    sampling: Sampling,
    *,
    stop_tokens: Collection[int] = (),
) -> Iterator[int]:
    """Yield new tokens until a stop token (not yielded), `max_new_tokens` or the model's limit.

    Raises ModelError if the prompt is empty or leaves no room below the model's limit.
    """
    limit = model.config.max_positions
    if not prompt:
        raise ModelError("the prompt is empty; give at least one token.")
    if len(prompt) >= limit:
        raise ModelError(
            f"the prompt has {len(prompt)} tokens, the model's limit is {limit} with the answer. "
            "Shorten the prompt."
        )
    # The last new token is never fed back, so it needs no place.
    num_new = min(sampling.max_new_tokens, limit - len(prompt) + 1)
    cache = model.make_cache(batch_size=1, capacity=len(prompt) + num_new - 1)
    device = model.embed_tokens.weight.device
    generator = torch.Generator(device).manual_seed(sampling.seed)
    tokens = torch.tensor([list(prompt)], device=device)
    for _ in range(num_new):
        hidden_BTD = model(tokens, cache=cache)
        token = sample_token(model.logits(hidden_BTD[0, -1]), sampling, generator)
        if token in stop_tokens:
            return
        yield token
        tokens = torch.tensor([[token]], device=device)


def stream_text(tokenizer: Tokenizer, tokens: Iterator[int]) -> Iterator[str]:
    """Decode tokens as they come; a character that spans tokens is held back until it is whole."""
    stream = DecodeStream(skip_special_tokens=True)
    for token in tokens:
        text = stream.step(tokenizer, token)
        if text:
            yield text
