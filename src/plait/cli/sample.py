"""`plait sample`: complete a prompt."""

from pathlib import Path
from typing import Annotated

import typer

from plait.checkpoint.huggingface import load_model, load_tokenizer
from plait.cli.evaluate import trained_model
from plait.cli.output import show, show_json
from plait.config import override
from plait.errors import ModelError
from plait.models.decoder import Decoder
from plait.serve.generate import generate, stop_tokens, stream_text
from plait.serve.sampling import Sampling


def sample_command(
    model: Annotated[
        Path, typer.Argument(help="Run folder, or a model folder in the layout of Hugging Face.")
    ],
    prompt: Annotated[str, typer.Option(help="Text to complete.")] = "def ",
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
    if as_json:
        show_json({"prompt": prompt, "text": complete(folder, prompt, sampling)})
        return
    tokenizer = load_tokenizer(folder)
    decoder = load_model(folder)
    show(prompt, end="")
    tokens = tokenizer.encode(prompt).ids
    for text in stream_text(
        tokenizer, generate(decoder, tokens, sampling, stop_tokens=stop_tokens(folder))
    ):
        show(text, end="")
    show()


def complete(folder: Path, prompt: str, sampling: Sampling, *, model: Decoder | None = None) -> str:
    """Complete a prompt by the model in a folder (or by `model`, if it is loaded already)."""
    tokenizer = load_tokenizer(folder)
    tokens = tokenizer.encode(prompt).ids
    if not tokens:
        raise ModelError("the prompt is empty; give some text with --prompt.")
    new = generate(model or load_model(folder), tokens, sampling, stop_tokens=stop_tokens(folder))
    return prompt + "".join(stream_text(tokenizer, new))
