"""Chat templates: the Jinja program in `tokenizer_config.json`, run in a sandbox."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from plait.checkpoint.huggingface import read_if_there
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
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _raise
        try:
            return environment.from_string(self.source).render(
                messages=[asdict(message) for message in messages],
                add_generation_prompt=True,
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
