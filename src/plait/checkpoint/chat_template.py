"""Chat templates: the Jinja program in `tokenizer_config.json`, run in a sandbox."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from plait.checkpoint.huggingface import read_if_there
from plait.errors import ModelError

PLAIN = "plain"
_PLAIN_SOURCE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "### assistant\n{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}\n"
    "{% else %}### {{ message['role'] }}\n{{ message['content'] }}\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}### assistant\n{% endif %}"
)
# Around what the assistant says, while a text is rendered; of Unicode's private use area.
_BEGIN, _END = "\ue0f0", "\ue0f1"


@dataclass(frozen=True)
class Message:
    """One turn; role is "system", "user" or "assistant"."""

    role: str
    content: str


@dataclass(frozen=True)
class RenderedChat:
    """A conversation as text, and [start, end) of each part that the assistant says."""

    text: str
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class ChatTemplate:
    """A template and the special tokens that it may print."""

    source: str
    special_tokens: dict[str, str]

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """Write the conversation, up to where the assistant speaks; ModelError if that fails."""
        return _without_marks(self._render(messages, add_generation_prompt)).text

    def render_marked(self, messages: Sequence[Message]) -> RenderedChat:
        """Write a whole conversation and find what the assistant says in it.

        That is what stands in the template's generation blocks, or else what each assistant message
        adds to the text before it. Raises ModelError if the text before it changes.
        """
        if any(mark in message.content for message in messages for mark in (_BEGIN, _END)):
            raise ModelError(f"a message holds {_BEGIN!r} or {_END!r}, which mark spans here.")
        rendered = _without_marks(self._render(messages, False))
        if rendered.spans:
            return rendered
        spans: list[tuple[int, int]] = []
        for number, message in enumerate(messages):
            if message.role == "assistant":
                before = self.render(messages[:number])
                after = self.render(messages[: number + 1], add_generation_prompt=False)
                if not (after.startswith(before) and rendered.text.startswith(after)):
                    raise ModelError(
                        f"the chat template changes what stands before message {number}, so that "
                        "its answer cannot be found. Use a template with generation blocks."
                    )
                spans.append((len(before), len(after)))
        return RenderedChat(rendered.text, tuple(spans))

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        try:
            return _compiled(self.source).render(
                messages=[asdict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise ModelError(f"the model's chat template failed: {error}.") from error


def read_chat_template(folder: Path) -> ChatTemplate | None:
    """Return the template in `chat_template.jinja` or `tokenizer_config.json`, if any."""
    settings = read_if_there(folder / "tokenizer_config.json")
    source = settings.get("chat_template")
    if isinstance(source, list):  # several named templates; the plain one is called "default"
        source = next((t["template"] for t in source if t.get("name") == "default"), None)
        if source is None:
            raise ModelError(f"{folder} has several chat templates, none of them named default.")
    if (path := folder / "chat_template.jinja").is_file():
        source = path.read_text(encoding="utf-8")
    if source is None:
        return None
    return ChatTemplate(source, _special_tokens(settings))


def choose_chat_template(folder: Path, name: str) -> ChatTemplate:
    """Find the template to train with: a model's own (name ""), "plain", or that in a file.

    Raises ModelError if there is none.
    """
    if name == "":
        if (own := read_chat_template(folder)) is None:
            raise ModelError(
                f"{folder} has no chat template. Name one: template={PLAIN}, or a Jinja file."
            )
        return own
    tokens = _special_tokens(read_if_there(folder / "tokenizer_config.json"))
    if name == PLAIN:
        return ChatTemplate(_PLAIN_SOURCE, tokens)
    if not Path(name).is_file():
        raise ModelError(f"template={name!r} is neither {PLAIN!r} nor a file.")
    return ChatTemplate(Path(name).read_text(encoding="utf-8"), tokens)


@lru_cache(maxsize=8)  # rows by the million share one template
def _compiled(source: str) -> Template:
    """Compile a template in a sandbox that offers what those of transformers rely on."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _GenerationBlocks],
    )
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.filters["tojson"] = _to_json
    return environment.from_string(source)


def _special_tokens(settings: dict[str, Any]) -> dict[str, str]:
    return {
        name: _token_text(settings[name])
        for name in ("bos_token", "eos_token")
        if settings.get(name)
    }


def _token_text(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As in transformers: Jinja's own filter writes HTML, with quotes and signs escaped."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _without_marks(text: str) -> RenderedChat:
    pieces: list[str] = []
    spans: list[tuple[int, int]] = []
    length = 0
    before, *marked = text.split(_BEGIN)
    pieces.append(before)
    length += len(before)
    for part in marked:
        inside, _, behind = part.partition(_END)
        spans.append((length, length + len(inside)))
        pieces += [inside, behind]
        length += len(inside) + len(behind)
    return RenderedChat("".join(pieces), tuple(spans))


class _GenerationBlocks(Extension):
    """`{% generation %} ... {% endgeneration %}`, as in transformers: what the assistant says."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Put marks around the block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (
            nodes.Output([nodes.TemplateData(mark)], lineno=line) for mark in (_BEGIN, _END)
        )
        return [begin, *body, end]
