"""`ParallelPlan`: how a run is spread over ranks and over time. Pure data."""

import json
import re
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
    ALTERNATE = "alternate"  # all but attention and the first of every two products
    FULL = "full"  # all of a block but its inputs


class Pipeline(StrEnum):
    """The order in which pipeline ranks work on micro-batches [torch.distributed.pipelining]."""

    GPIPE = "gpipe"
    ONE_F_ONE_B = "1f1b"
    INTERLEAVED = "interleaved"  # 1F1B with several stages on a rank
    ZERO_BUBBLE = "zero_bubble"  # interleaved, with split backwards
    ZBV = "zbv"  # two stages on a rank, in a V
    DUAL_PIPE_V = "dualpipev"  # the same, with a forward beside each backward


_STAGES_PER_RANK = {
    Pipeline.GPIPE: (1, 1),
    Pipeline.ONE_F_ONE_B: (1, 1),
    Pipeline.INTERLEAVED: (2, None),
    Pipeline.ZERO_BUBBLE: (1, None),
    Pipeline.ZBV: (2, 2),
    Pipeline.DUAL_PIPE_V: (2, 2),
}
"""Fewest and most stages on a rank."""


@dataclass(frozen=True, kw_only=True)
class ParallelPlan:
    """Sizes of the mesh axes, and what is done over time.

    dp: copies of the model. fsdp: ranks that share each parameter. cp: ranks that share each
    sequence. tp: ranks that share each product; sp: between products they share the tokens. pp:
    stages. ep: ranks among those of dp, fsdp, cp (and with sp of tp) that share the experts.
    replicas: parts of the tokens whose communication hides behind each other's work, "auto", or,
    without sp, a number for each piece that communicates, in order, as a list or as "2,3,1";
    causal_split: they split causal attention too, equal to rounding, not to the bit. recompute: see
    `Recompute`. num_micro_batches: parts of the batch that run one after the other
    and add their gradients. split_backward: the gradients of parameters in a program of their own,
    after the others. pipeline, stages_per_rank: the order of the stages, and how many a rank has.
    reshard: parameters shared by fsdp are gathered for each layer and pass and dropped after it,
    not once for a step.

    cp, ep, pipeline, stages_per_rank and reshard are for the dry run; `capture` and `compile`
    refuse what they cannot place.
    """

    dp: int = 1
    fsdp: int = 1
    cp: int = 1
    tp: int = 1
    sp: bool = False
    pp: int = 1
    ep: int = 1
    replicas: int | str = 1
    causal_split: bool = False
    recompute: Recompute = Recompute.NONE
    num_micro_batches: int = 1
    split_backward: bool = False
    pipeline: Pipeline = Pipeline.ONE_F_ONE_B
    stages_per_rank: int = 1
    reshard: bool = False

    def __post_init__(self) -> None:
        """Check each size, and that they go together."""
        for name in ("dp", "fsdp", "cp", "tp", "pp", "ep", "num_micro_batches", "stages_per_rank"):
            size = getattr(self, name)
            if not _is_count(size):
                raise PlanError(f"{name} must be a whole number from 1, got {size!r}.")
        self._check_replicas()
        if self.causal_split and self.replicas == 1:
            raise PlanError(
                "causal_split=True says how replicas split attention: it needs replicas above 1, "
                'or "auto".'
            )
        if self.sp and self.tp == 1:
            raise PlanError("sp=True shares tokens among the ranks of tp: it needs tp above 1.")
        self._read("recompute", Recompute, "recompute policy")
        self._read("pipeline", Pipeline, "pipeline")
        self._check_stages()
        if self.num_expert_ranks % self.ep:
            legal = [str(n) for n in range(1, self.num_expert_ranks + 1)]
            legal = [n for n in legal if self.num_expert_ranks % int(n) == 0]
            raise PlanError(
                f"ep={self.ep} does not divide the {self.num_expert_ranks} ranks of dp, fsdp, cp"
                f"{' and tp' if self.sp else ''}. Choose ep from {', '.join(legal)}."
            )

    def _check_replicas(self) -> None:
        given: object = self.replicas
        if isinstance(given, tuple | list):
            given = ",".join(map(str, cast("Sequence[object]", given)))
            object.__setattr__(self, "replicas", given)
        if given == "auto" or _is_count(given):
            return
        if not isinstance(given, str) or not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", given):
            raise PlanError(
                'replicas must be "auto", a number from 1, or such numbers separated by commas, '
                f"got {self.replicas!r}."
            )
        if self.sp and len(set(given.split(","))) > 1:
            raise PlanError(
                f"replicas={given} with sp=True: ranks share the tokens replica by replica, so "
                "other numbers would need the tokens exchanged. Use one number, or sp=False."
            )

    @property
    def replicas_by_piece(self) -> tuple[int, ...] | None:
        """The numbers of replicas, where the plan has one for each piece."""
        if isinstance(self.replicas, int) or self.replicas == "auto":
            return None
        return tuple(map(int, self.replicas.split(",")))

    def _read(self, name: str, kind: type[StrEnum], what: str) -> None:
        given = str(getattr(self, name))
        try:
            object.__setattr__(self, name, kind(given))
        except ValueError:
            known = [each.value for each in kind]
            raise PlanError(f"there is no {what} {given!r}. {nearest_name(given, known)}") from None

    def _check_stages(self) -> None:
        fewest, most = _STAGES_PER_RANK[self.pipeline]
        if self.pp == 1 and self.stages_per_rank > 1:
            raise PlanError(f"stages_per_rank={self.stages_per_rank} needs pp above 1.")
        if self.pp > 1 and not fewest <= self.stages_per_rank <= (most or self.stages_per_rank):
            legal = f"{fewest}" if fewest == most else f"{fewest} or more"
            raise PlanError(
                f"pipeline {self.pipeline.value!r} has {legal} stages on a rank, got "
                f"stages_per_rank={self.stages_per_rank}."
            )

    @property
    def num_ranks(self) -> int:
        """Processes that the plan needs."""
        return self.dp * self.fsdp * self.cp * self.tp * self.pp

    @property
    def num_expert_ranks(self) -> int:
        """Ranks of a stage that hold different tokens, among which experts can be shared."""
        return self.dp * self.fsdp * self.cp * (self.tp if self.sp else 1)

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
