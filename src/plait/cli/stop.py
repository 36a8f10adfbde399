"""Ctrl-C in work that can end between two of its parts.

A KeyboardInterrupt may come where Python cannot raise it, in a callback of the garbage collector or
of PyTorch, and is lost there. So the first Ctrl-C is noted, and the work asks.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from plait.cli.output import say


class Stop:
    """While parts are done, the first Ctrl-C asks to stop; elsewhere it interrupts at once."""

    def __init__(self, message: str) -> None:
        """Take what is said when it is noted."""
        self.message = message
        self._asked = self._deferring = False

    def defer(self) -> None:
        """From now on, somebody asks."""
        self._deferring = True

    def is_set(self) -> bool:
        """Whether to stop."""
        return self._asked

    def ask(self, signal_number: int, frame: FrameType | None) -> None:
        """What the signal does."""
        if self._asked or not self._deferring:
            raise KeyboardInterrupt
        self._asked = True
        say(f"{self.message}; press Ctrl-C again to stop at once")


@contextmanager
def stop_on_interrupt(message: str) -> Iterator[Stop]:
    """Put it in the place of Python's own handler."""
    stop = Stop(message)
    before = signal.signal(signal.SIGINT, stop.ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
