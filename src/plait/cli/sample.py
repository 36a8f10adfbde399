"""`plait sample`: complete a prompt."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from plait.checkpoint.huggingface import end_tokens, load_model, load_tokenizer
from plait.cli.output import show, show_json
from plait.config import override
from plait.models.decoder import Decoder
from plait.serve.generate import generate, stream_text
from plait.serve.sampling import Sampling
from plait.train.score import trained_model


def sample_command(
    model: Annotated[
        Path, typer.Argument(help="Run folder, or a model folder in the layout of Hugging Face.")
    ],
    prompt: Annotated[str, typer.Option(help="Text to complete.")] = "def main(",
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="PATH=VALUE", help="temperature, top_k, top_p, max_new_tokens or seed."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Complete a prompt with a model.

    Example: plait sample runs/stdlib_demo-1 --prompt "class Stack:" --set temperature=0.5
    """
    sampling = override(Sampling(), settings or [])
    folder = trained_model(model)
    pieces = complete(load_model(folder), folder, prompt, sampling)
    if as_json:
        show_json({"prompt": prompt, "text": "".join(pieces)})
        return
    for piece in pieces:
        show(piece, end="")
    show()


def complete(model: Decoder, folder: Path, prompt: str, sampling: Sampling) -> Iterator[str]:
    """Yield the prompt, then its completion piece by piece; the folder holds the tokenizer."""
    tokenizer = load_tokenizer(folder)
    tokens = generate(model, tokenizer.encode(prompt).ids, sampling, stop_tokens=end_tokens(folder))
    pieces = stream_text(tokenizer, tokens)
    first = next(pieces, "")  # a prompt that is refused is refused before it is shown
    yield prompt + first
    yield from pieces
