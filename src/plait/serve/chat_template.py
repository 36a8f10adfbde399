"""Chat templates: the Jinja program in `tokenizer_config.json`, run in a sandbox."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from plait.errors import ModelError


@dataclass(frozen=True)
class Message:
    """One turn; role is "system", "user" or "assistant"."""

    role: str
    content: str


@dataclass(frozen=True)
class ChatTemplate:
    """A template and the special tokens that it may print."""

    source: str
    special_tokens: dict[str, str]

    def render(self, messages: Sequence[Message]) -> str:
        """Write the conversation up to where the assistant speaks; ModelError if that fails."""
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _raise
        try:
            return environment.from_string(self.source).render(
                messages=[asdict(message) for message in messages],
                add_generation_prompt=True,
                **self.special_tokens,
            )
        except TemplateError as error:
            raise ModelError(f"the model's chat template failed: {error}.") from error


def read_chat_template(folder: Path) -> ChatTemplate | None:
    """Return the template in `chat_template.jinja` or `tokenizer_config.json`, if any."""
    settings: dict[str, Any] = {}
    if (path := folder / "tokenizer_config.json").is_file():
        settings = json.loads(path.read_text())
    source = settings.get("chat_template")
    if (path := folder / "chat_template.jinja").is_file():
        source = path.read_text()
    if not isinstance(source, str):
        return None
    tokens = {
        name: _token_text(settings[name])
        for name in ("bos_token", "eos_token")
        if settings.get(name)
    }
    return ChatTemplate(source, tokens)


def _token_text(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)
