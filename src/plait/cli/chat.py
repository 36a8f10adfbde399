"""`plait chat`: talk with a model in the terminal."""

from pathlib import Path
from typing import Annotated

import typer

from plait.checkpoint.huggingface import load_model, load_tokenizer
from plait.cli.evaluate import trained_model
from plait.cli.output import say, show
from plait.config import override
from plait.serve.chat_template import ChatTemplate, Message, read_chat_template
from plait.serve.generate import generate, stop_tokens, stream_text
from plait.serve.sampling import Sampling


def chat_command(
    model: Annotated[
        Path, typer.Argument(help="Run folder, or a model folder in the layout of Hugging Face.")
    ],
    system: Annotated[
        str | None, typer.Option(help="System message, for models with a chat template.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="PATH=VALUE", help="temperature, top_k, top_p, max_new_tokens or seed."
        ),
    ] = None,
) -> None:
    """Talk with a model, a line at a time; an empty line or Ctrl-D ends it.

    Without a chat template, as base models are, each line is completed as it stands.

    Example: plait chat runs/stdlib_demo-1
    """
    sampling = override(Sampling(), settings or [])
    folder = trained_model(model)
    template = read_chat_template(folder)
    tokenizer, decoder, stops = load_tokenizer(folder), load_model(folder), stop_tokens(folder)
    if template is None:
        say("this model has no chat template: it completes what you type")
    messages = [Message("system", system)] if system else []
    while line := _read_line():
        prompt = _prompt(template, messages, line)
        # A template prints the special tokens itself; the tokenizer must not add them again.
        tokens = tokenizer.encode(prompt, add_special_tokens=template is None).ids
        answer = ""
        for text in stream_text(tokenizer, generate(decoder, tokens, sampling, stop_tokens=stops)):
            answer += text
            show(text, end="")
        show()
        messages.append(Message("assistant", answer))


def _prompt(template: ChatTemplate | None, messages: list[Message], line: str) -> str:
    messages.append(Message("user", line))
    return line if template is None else template.render(messages)


def _read_line() -> str:
    try:
        return input("> ")
    except EOFError:
        return ""
