"""Conversations, encoded for fine-tuning: what the assistant says is learnt, the rest is read.

A row has `messages` (role and content), or `prompt` and `completion`, each a text or messages. Rows
of preferences have `prompt`, `chosen` and `rejected`, and make two samples. Further fields of a row
are counted by name, a message with more than role and content is a problem.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from plait.checkpoint.chat_template import ChatTemplate, Message
from plait.errors import ModelError
from plait.train.encode_rows import Sample
from plait.train.rows import Problem, Row, is_unicode

_MESSAGE = ("role", "content")
_CHAT_FIELDS = ("messages", "prompt", "completion")
_PREFERENCE_FIELDS = ("prompt", "chosen", "rejected")


class _Unusable(Exception):
    """Why a row cannot be used."""


@dataclass(frozen=True)
class ChatEncoder:
    """Encodes rows by a chat template; without one, only rows of plain prompt and completion.

    max_tokens: rows of more are problems.
    """

    tokenizer: Tokenizer
    template: ChatTemplate | None
    end_of_text: int
    max_tokens: int
    special: tuple[str, ...] = field(default=())

    def __call__(self, rows: list[Row]) -> list[Sample | Problem]:
        """Encode some rows at once."""
        return [self._guarded(row.place, row.value) for row in rows]

    def _guarded(self, place: str, value: Mapping[str, Any]) -> Sample | Problem:
        try:
            return self.encode(place, value)
        except (_Unusable, ModelError) as error:
            return Problem(place, str(error).rstrip("."))

    def encode(self, place: str, value: Mapping[str, Any]) -> Sample:
        """Encode one row."""
        if "messages" in value:
            sample = self._chat(place, _messages(value, "messages"))
        elif "prompt" in value and "completion" in value:
            sample = self._pair(place, value["prompt"], value["completion"], "completion")
        else:
            raise _Unusable(
                "needs 'messages', or 'prompt' and 'completion'; it has "
                f"{', '.join(map(repr, value)) or 'nothing'}"
            )
        return self._checked(sample)

    def _pair(self, place: str, prompt: Any, answer: Any, name: str) -> Sample:
        if isinstance(prompt, str) and isinstance(answer, str):
            return self._plain(place, prompt, answer, name)
        rows = {"prompt": prompt, name: answer}
        return self._chat(place, _messages(rows, "prompt") + _messages(rows, name))

    def _plain(self, place: str, prompt: str, answer: str, name: str) -> Sample:
        if not answer:
            raise _Unusable(f"{name!r} is empty")
        self._refuse_special(prompt)
        self._refuse_special(answer)
        before = self.tokenizer.encode(prompt).ids
        behind = self.tokenizer.encode(answer, add_special_tokens=False).ids
        tokens = np.array([*before, *behind, self.end_of_text], np.uint32)
        return Sample(place, tokens, np.arange(len(tokens)) >= len(before))

    def _chat(self, place: str, messages: list[Message]) -> Sample:
        if self.template is None:
            raise ModelError(
                "messages need a chat template, and the model has none. Name one: template=plain, "
                "or a Jinja file."
            )
        if not any(message.role == "assistant" for message in messages):
            raise _Unusable("no message is the assistant's, so there is nothing to learn")
        for message in messages:
            self._refuse_special(message.content)
        rendered = self.template.render_marked(messages)
        encoding = self.tokenizer.encode(rendered.text, add_special_tokens=False)
        starts = np.array([start for start, _ in encoding.offsets], np.int64)
        counted = np.zeros(len(starts), np.bool_)
        for begin, end in rendered.spans:
            counted |= (begin <= starts) & (starts < end)
        return Sample(place, np.array(encoding.ids, np.uint32), counted)

    def _refuse_special(self, text: str) -> None:
        """A text must not end the conversation that it stands in."""
        if not is_unicode(text):
            raise _Unusable("a text holds half of a surrogate pair")
        for token in self.special:
            if token in text:
                raise _Unusable(f"a text spells the special token {token!r}")

    def _checked(self, sample: Sample) -> Sample:
        if len(sample.tokens) > self.max_tokens:
            raise _Unusable(
                f"{len(sample.tokens)} tokens are more than the {self.max_tokens} of a sequence"
            )
        if not sample.counted[1:].any():
            raise _Unusable("no token of it is learnt")
        return sample


@dataclass(frozen=True)
class PreferenceEncoder:
    """Encodes rows of preferences: the chosen sample, then the rejected one."""

    chat: ChatEncoder

    def __call__(self, rows: list[Row]) -> list[Sample | Problem]:
        """Encode some rows at once; a row is used whole or not at all."""
        results: list[Sample | Problem] = []
        for row in rows:
            try:
                results += self._both(row)
            except (_Unusable, ModelError) as error:
                results.append(Problem(row.place, str(error).rstrip(".")))
        return results

    def _both(self, row: Row) -> list[Sample]:
        missing = {"prompt", "chosen", "rejected"} - row.value.keys()
        if missing:
            raise _Unusable(f"lacks {', '.join(map(repr, sorted(missing)))}")
        prompt = row.value["prompt"]
        return [
            self.chat._checked(self.chat._pair(row.place, prompt, row.value[name], name))
            for name in ("chosen", "rejected")
        ]


def unread_fields(row: Row, *, preferences: bool) -> list[str]:
    """Fields of a row that no encoder looks at."""
    read = _PREFERENCE_FIELDS if preferences else _CHAT_FIELDS
    if not preferences and "messages" in row.value:
        read = _CHAT_FIELDS[:1]
    return [name for name in row.value if name not in read]


def special_tokens(tokenizer: Tokenizer) -> tuple[str, ...]:
    """Texts of the tokens that a tokenizer treats as special."""
    return tuple(
        token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special
    )


def _messages(value: Mapping[str, Any], name: str) -> list[Message]:
    given = value[name]
    if not isinstance(given, list) or not given:
        raise _Unusable(f"{name!r} is {given!r:.60}, not a list of messages")
    messages: list[Message] = []
    for number, entry in enumerate(given):
        if not isinstance(entry, dict):
            raise _Unusable(f"message {number} of {name!r} is {entry!r:.60}, not an object")
        for key in ("role", "content"):
            if not isinstance(entry.get(key), str):
                raise _Unusable(f"message {number} of {name!r} has no text {key!r}")
        # Left out, these would silently change what the model learns to say.
        if more := [key for key, given in entry.items() if key not in _MESSAGE and given]:
            raise _Unusable(
                f"message {number} of {name!r} has {', '.join(map(repr, more))} beside role and "
                "content, which is not read"
            )
        messages.append(Message(entry["role"], entry["content"]))
    return messages
