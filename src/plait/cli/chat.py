"""`plait chat`: talk with a model in the terminal."""

from pathlib import Path
from typing import Annotated

import typer
from tokenizers import Tokenizer

from plait.checkpoint.chat_template import ChatTemplate, Message, read_chat_template
from plait.checkpoint.huggingface import end_tokens, load_model, load_tokenizer
from plait.cli.output import say, show
from plait.config import override
from plait.serve.generate import generate, stream_text
from plait.serve.sampling import Sampling
from plait.train.score import trained_model


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
    """Talk with a model, a line at a time; an empty line or Ctrl-D ends it, Ctrl-C an answer.

    Without a chat template, as base models are, each line is completed as it stands.

    Example: plait chat runs/stdlib_demo-1
    """
    sampling = override(Sampling(), settings or [])
    folder = trained_model(model)
    template = read_chat_template(folder)
    tokenizer, decoder, ends = load_tokenizer(folder), load_model(folder), end_tokens(folder)
    if template is None:
        say("this model has no chat template: it completes what you type")
    messages = [Message("system", system)] if system else []
    room = decoder.config.max_positions - 1
    while line := _read_line():
        tokens = _next_prompt(template, tokenizer, messages, line, room)
        answer = ""
        try:
            new = generate(decoder, tokens, sampling, stop_tokens=ends)
            for text in stream_text(tokenizer, new):
                answer += text
                show(text, end="")
        except KeyboardInterrupt:
            say(" (stopped)")
        show()
        messages.append(Message("assistant", answer))


def _next_prompt(
    template: ChatTemplate | None,
    tokenizer: Tokenizer,
    messages: list[Message],
    line: str,
    room: int,
) -> list[int]:
    """Tokens of the conversation with the new line; the oldest turns go when room runs out."""
    messages.append(Message("user", line))
    if template is None:
        return tokenizer.encode(line).ids
    while True:
        # The template prints the special tokens; the tokenizer must not add them again.
        tokens = tokenizer.encode(template.render(messages), add_special_tokens=False).ids
        first_turn = 1 if messages[0].role == "system" else 0
        if len(tokens) <= room or len(messages) <= first_turn + 1:
            return tokens
        del messages[first_turn : first_turn + 2]
        say("(the oldest turn was dropped: the conversation has reached the model's limit)")


def _read_line() -> str:
    try:
        return input("> ")
    except EOFError:
        return ""
