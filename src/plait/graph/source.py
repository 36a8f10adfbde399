"""The user's line that a node came from, out of the stack trace that capture left with it."""

# pyright: basic
# (The metadata of fx nodes is not typed.)

import re
from pathlib import Path

import torch
from torch import fx

_FRAME = re.compile(
    r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<where>.+)\n\s*(?P<code>.+)'
)
_RESUMED = re.compile(r"torch_dynamo_resume_in_(.+?)_at_(\d+)")
_LIBRARIES = (str(Path(torch.__file__).parent), str(Path(__file__).parent))


def source_of(node: fx.Node) -> str:
    """The user's line behind a node: "file:line, in function: code", or "".

    It is the innermost one outside of PyTorch and of what spreads a model over ranks: where a layer
    is called, not where it is defined.
    """
    frames = list(_FRAME.finditer(node.meta.get("stack_trace") or ""))
    if not frames:
        return ""
    own = [frame for frame in frames if not frame["file"].startswith(_LIBRARIES)]
    frame = (own or frames)[-1]
    where = resumed(frame["where"].strip())
    return f"{frame['file']}:{frame['line']}, in {where}: {frame['code'].strip()}"


def resumed(name: str) -> str:
    """The user's name of a function that TorchDynamo goes on with after a break."""
    return _RESUMED.sub(r"\1 after line \2", name)


def place_of(node: fx.Node) -> str:
    """Name of the file and number of the user's line: "model.py:12", or ""."""
    place, _, _ = source_of(node).partition(", in ")
    return Path(place).name
