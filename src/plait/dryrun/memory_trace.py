"""Memory over a run: what was allocated and freed, in order, and for what.

A replay of a schedule makes one, and so does an eager step on fake tensors (`eager.py`).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum


class Kind(StrEnum):
    """What memory is for."""

    PARAMETERS = "parameters"
    GRADIENTS = "gradients"
    OPTIMIZER = "optimizer state"
    ACTIVATIONS = "saved activations"
    TEMPORARIES = "temporaries"
    INPUTS = "inputs"
    COMMUNICATION = "communication"
    WORKSPACE = "workspace"
    CONTEXT = "context"


@dataclass(slots=True)
class Storage:
    """One allocation. moment: the number of the operator that made it; -1, it was there before.

    name: of the value, or of the parameter. operator, source: what made it, the user's line.
    """

    num_bytes: int
    kind: Kind
    moment: int = -1
    name: str = ""
    operator: str = ""
    source: str = ""


@dataclass
class MemoryTrace:
    """Allocations by number, and each change: (moment, storage, whether it is allocated)."""

    storages: list[Storage] = field(default_factory=list[Storage])
    changes: list[tuple[int, int, bool]] = field(default_factory=list[tuple[int, int, bool]])

    def allocate(self, storage: Storage) -> int:
        """Note an allocation; returns its number."""
        number = len(self.storages)
        self.storages.append(storage)
        self.changes.append((storage.moment, number, True))
        return number

    def free(self, number: int, moment: int) -> None:
        """Note that it is given back."""
        self.changes.append((moment, number, False))

    def curve(self) -> Iterator[tuple[int, int]]:
        """Yield moment and live bytes after each change."""
        live = 0
        for moment, number, is_allocated in self.changes:
            num_bytes = self.storages[number].num_bytes
            live += num_bytes if is_allocated else -num_bytes
            yield moment, live

    def live_at(self, position: int) -> list[int]:
        """Numbers of what is allocated after the change at that position."""
        live: dict[int, None] = {}
        for _, number, is_allocated in self.changes[: position + 1]:
            if is_allocated:
                live[number] = None
            else:
                del live[number]
        return list(live)
