"""`ParallelPlan`: how a run is spread over ranks and over time. Pure data."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any, cast

from torch import Tensor

from plait.errors import PlanError, nearest_name


class Recompute(StrEnum):
    """Which values of the forward the backward computes again instead of keeping them."""

    NONE = "none"
    SELECTIVE = "selective"  # what costs little time for the bytes it frees
    FULL = "full"  # all of a block but its inputs


@dataclass(frozen=True, kw_only=True)
class ParallelPlan:
    """Sizes of the mesh axes, and what is done over time.

    dp: copies of the model. fsdp: ranks that share each parameter. tp: ranks that share each
    product; sp: between products they share the tokens. pp: stages. replicas: parts of the tokens
    whose communication hides behind each other's work, or "auto"; causal_split: they split causal
    attention too, equal to rounding, not to the bit. recompute: see `Recompute`.
    num_micro_batches: parts of the batch that run one after the other and add their gradients.
    split_backward: the gradients of parameters in a program of their own, after the others.
    """

    dp: int = 1
    fsdp: int = 1
    tp: int = 1
    sp: bool = False
    pp: int = 1
    replicas: int | str = 1
    causal_split: bool = False
    recompute: Recompute = Recompute.NONE
    num_micro_batches: int = 1
    split_backward: bool = False

    def __post_init__(self) -> None:
        """Check each size, and that they go together."""
        for name in ("dp", "fsdp", "tp", "pp", "num_micro_batches"):
            size = getattr(self, name)
            if not _is_count(size):
                raise PlanError(f"{name} must be a whole number from 1, got {size!r}.")
        if self.replicas != "auto" and not _is_count(self.replicas):
            raise PlanError(f'replicas must be "auto" or a number from 1, got {self.replicas!r}.')
        if self.causal_split and self.replicas == 1:
            raise PlanError(
                "causal_split=True says how replicas split attention: it needs replicas above 1, "
                'or "auto".'
            )
        if self.sp and self.tp == 1:
            raise PlanError("sp=True shares tokens among the ranks of tp: it needs tp above 1.")
        try:
            object.__setattr__(self, "recompute", Recompute(self.recompute))
        except ValueError:
            message = f"there is no recompute policy {str(self.recompute)!r}. "
            known = [policy.value for policy in Recompute]
            raise PlanError(message + nearest_name(str(self.recompute), known)) from None

    @property
    def num_ranks(self) -> int:
        """Processes that the plan needs."""
        return self.dp * self.fsdp * self.tp * self.pp

    def check_inputs(self, inputs: Sequence[object]) -> None:
        """Raise PlanError if the inputs' first dim, the batch, cannot be parted as planned."""
        for i, x in enumerate(inputs):
            if isinstance(x, Tensor) and x.dim() > 0 and x.shape[0] % self.num_micro_batches:
                raise PlanError(
                    f"input {i} has {x.shape[0]} rows, which num_micro_batches="
                    f"{self.num_micro_batches} does not divide. {_choices(x.shape[0])}"
                )

    def to_json(self) -> str:
        """One line of JSON, from which `from_json` makes an equal plan."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "ParallelPlan":
        """Read what `to_json` wrote. Raises PlanError for anything else."""
        try:
            data: object = json.loads(text)
        except ValueError as error:
            raise PlanError(f"this is not JSON: {error}.") from error
        if not isinstance(data, Mapping):
            raise PlanError(f"a plan is a JSON object, got {type(data).__name__}.")
        known = {field.name: field for field in fields(cls)}
        settings = cast("Mapping[str, object]", data)
        for name in settings:
            if name not in known:
                raise PlanError(f"a plan has no field {name!r}. {nearest_name(name, known)}")
        return cls(**cast("dict[str, Any]", dict(settings)))


def _is_count(x: object) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x >= 1


def _choices(rows: int) -> str:
    legal = [str(n) for n in range(1, rows + 1) if rows % n == 0]
    return f"Choose from {', '.join(legal)}."
