"""What a pass did, and what it could not do: said in the report, never skipped in silence."""

from collections.abc import Iterable
from dataclasses import dataclass

CAPTURE = "capture"
"""Who notes what is not captured block by block, and why."""


@dataclass(frozen=True, kw_only=True)
class Note:
    """Of `count` nodes with this operator, `node` the first of them.

    is_refusal: the pass left them as they were, and `text` is the reason; else it is what was done.
    """

    by: str  # the pass
    operator: str
    node: str
    text: str
    count: int = 1
    is_refusal: bool = False

    def __str__(self) -> str:
        nodes = self.node if self.count == 1 else f"{self.node} and {self.count - 1} more"
        verb = "left" if self.is_refusal else "changed"
        return f"{self.by}: {verb} {self.operator} ({nodes}): {self.text}"


def gathered(notes: Iterable[Note]) -> tuple[Note, ...]:
    """One note for each operator and reason, counted; what was done comes first."""
    found: dict[tuple[object, ...], Note] = {}
    for note in notes:
        key = (note.is_refusal, note.by, note.operator, note.text)
        known = found.get(key)
        count = note.count + (known.count if known else 0)
        found[key] = Note(
            by=note.by,
            operator=note.operator,
            node=known.node if known else note.node,
            text=note.text,
            count=count,
            is_refusal=note.is_refusal,
        )
    return tuple(sorted(found.values(), key=lambda note: note.is_refusal))
