"""Complete a prompt token by token, with the model's key-value cache."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from plait.checkpoint.huggingface import load_tokenizer
from plait.errors import ModelError
from plait.models.decoder import Decoder
from plait.serve.sampling import Sampling, sample_token


@torch.inference_mode()
def generate(
    model: Decoder,
    prompt: Sequence[int],
    sampling: Sampling,
    *,
    stop_tokens: frozenset[int] = frozenset(),
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


def stop_tokens(folder: Path) -> frozenset[int]:
    """Tokens that end a text, as the tokenizer and config files of a model folder say."""
    found: set[int] = set()
    tokenizer = load_tokenizer(folder)
    settings = _read_json(folder / "tokenizer_config.json")
    end = settings.get("eos_token")
    name = end["content"] if isinstance(end, dict) else end
    if name is not None and (number := tokenizer.token_to_id(name)) is not None:
        found.add(number)
    for file in ("generation_config.json", "config.json"):
        numbers = _read_json(folder / file).get("eos_token_id")
        found.update(numbers if isinstance(numbers, list) else [] if numbers is None else [numbers])
    return frozenset(found)


def stream_text(tokenizer: Tokenizer, tokens: Iterator[int]) -> Iterator[str]:
    """Decode tokens as they come; a character that spans tokens is held back until it is whole."""
    held: list[int] = []
    for token in tokens:
        held.append(token)
        text = tokenizer.decode(held, skip_special_tokens=True)
        if text and not text.endswith("\ufffd"):
            yield text
            held = []
    if held:
        yield tokenizer.decode(held, skip_special_tokens=True)


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}
