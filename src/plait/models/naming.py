"""How parameters are called, and laid out, in a family's checkpoints.

Our names are those of most checkpoints without "model.". A family may differ by other words, by
matrices stored as (in, out), and by experts that lie one by one where we stack them. Bytes stay.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_STACK = re.compile(r"(.*\.experts)\.(gate_proj|up_proj|down_proj)")
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")


@dataclass(frozen=True, kw_only=True)
class Naming:
    """Rules between our names and a checkpoint's.

    prefix: of all names but that of the output head. words: pairs (ours, theirs), replaced in this
    order on the way out and in reverse on the way in. transposed: ends of our names whose matrices
    are stored as (in, out). ignored: patterns of checkpoint names that hold no parameter.
    """

    prefix: str = "model."
    words: tuple[tuple[str, str], ...] = ()
    transposed: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    def to_checkpoint_name(self, name: str) -> str:
        """Name of one of our parameters, or of one expert's part of it, in a checkpoint."""
        for ours, theirs in self.words:
            name = name.replace(ours, theirs)
        return name if name.startswith("lm_head.") else f"{self.prefix}{name}"

    def from_checkpoint_name(self, name: str) -> str:
        """Undo `to_checkpoint_name`."""
        name = name.removeprefix(self.prefix)
        for ours, theirs in reversed(self.words):
            name = name.replace(theirs, ours)
        return name

    def to_checkpoint(self, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Lay out our parameters as a checkpoint has them."""
        return {
            self.to_checkpoint_name(name): part
            for ours, leaf in leaves.items()
            for name, part in self._parts(ours, leaf)
        }

    def from_checkpoint(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Undo `to_checkpoint`; what is ignored is left out."""
        leaves: dict[str, Tensor] = {}
        experts: dict[str, dict[int, Tensor]] = {}
        for theirs, tensor in tensors.items():
            if any(re.search(pattern, theirs) for pattern in self.ignored):
                continue
            name = self.from_checkpoint_name(theirs)
            if match := _EXPERT.fullmatch(name):
                stack = experts.setdefault(f"{match[1]}.{match[3]}", {})
                stack[int(match[2])] = tensor
            else:
                leaves[name] = tensor.T.contiguous() if name.endswith(self.transposed) else tensor
        for name, stack in experts.items():
            leaves[name] = torch.stack([stack[number] for number in sorted(stack)])
        return leaves

    def _parts(self, name: str, leaf: Tensor) -> Iterator[tuple[str, Tensor]]:
        if match := _STACK.fullmatch(name):
            for number, part in enumerate(leaf):
                yield f"{match[1]}.{number}.{match[2]}.weight", part
        else:
            is_transposed = name.endswith(self.transposed) if self.transposed else False
            yield name, leaf.T if is_transposed else leaf
