"""How long each launch of a replay takes, on which stream, and what it waits for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from plait.cost.clusters import Cluster
from plait.cost.collectives import waits
from plait.cost.nccl_tests import Measured
from plait.cost.operations import Kind
from plait.cost.simulate import COMPUTE, Operation, communication
from plait.cost.table import Duration, Source, Table, roofline
from plait.cost.topology import Algorithm, Placement, message, place
from plait.dryrun.replay import Launched
from plait.errors import GraphError

_INNERMOST_FIRST = ("tp", "ep", "cp", "fsdp", "dp", "pp")
"""Neighbours on an axis are as far apart as the sizes of the axes before it, multiplied."""
_MODEL_LOW, _MODEL_HIGH = 0.8, 1.4
"""How far a collective may be off its model (assumed)."""
_MEASURED_LOW, _MEASURED_HIGH = 0.9, 1.2
"""How far a collective may be off nccl-tests, which print a mean of many alone (assumed)."""
_BESIDE_HIGH = 2.0  # of what messages take beside: ranks differ more in one step than in another
_NOTHING = Duration(seconds=0.0, low_s=0.0, high_s=0.0, source=Source.MEASURED)


@dataclass(frozen=True)
class TimedLaunch:
    """An operation for the simulation, and its duration. is_priced: it takes time of its own."""

    operation: Operation
    duration: Duration
    is_priced: bool


def timed_launches(
    launched: Sequence[Launched],
    groups: Mapping[str, int],
    cluster: Cluster,
    table: Table | None,
    measured: Sequence[Measured] = (),
    repeated: range = range(0),
) -> list[TimedLaunch]:
    """The work of consecutive launches; what depends on earlier ones does not wait for them.

    measured: runs of nccl-tests, which go before the model of a message. repeated: numbers of
    launches in micro-batches behind the first.
    """
    durations = _Durations(cluster, table, groups, measured)
    if not launched:
        return []
    first = launched[0].number
    found: list[TimedLaunch] = []
    for each in launched:
        duration = durations.of(each, is_repeated=each.number in repeated)
        operation = Operation(
            each.step.name,
            COMPUTE if each.outcome.collective is None else communication(each.group),
            duration.seconds,
            tuple(i - first for i in each.depends_on if i >= first),
        )
        found.append(TimedLaunch(operation, duration, is_priced=duration is not _NOTHING))
    return found


def placements_of(cluster: Cluster, groups: Mapping[str, int]) -> dict[str, Placement]:
    """How each axis on which a schedule communicates lies in the cluster."""
    placements: dict[str, Placement] = {}
    stride = 1
    known = [axis for axis in _INNERMOST_FIRST if axis in groups]
    for axis in (*known, *(axis for axis in groups if axis not in known)):
        placements[axis] = place(cluster, axis, size=groups[axis], stride=stride)
        stride *= groups[axis]
    return placements


class _Durations:
    def __init__(
        self,
        cluster: Cluster,
        table: Table | None,
        groups: Mapping[str, int],
        measured: Sequence[Measured],
    ) -> None:
        self.cluster, self.table, self.measured = cluster, table, measured
        self.placements = placements_of(cluster, groups)
        # By identity of the outcome, which the launch keeps.
        self.known: dict[tuple[int, bool], Duration] = {}

    def of(self, each: Launched, *, is_repeated: bool) -> Duration:
        if each.outcome.collective is not None:
            return self._message(each)
        if waits(each.step.target):
            return _NOTHING
        key = id(each.outcome), is_repeated
        if key not in self.known:
            self.known[key] = self._compute(each, is_repeated=is_repeated)
        return self.known[key]

    def _compute(self, each: Launched, *, is_repeated: bool) -> Duration:
        cost = each.outcome.cost
        assert cost is not None
        if self.table is None:
            return _NOTHING if cost.kind is Kind.FREE else roofline(cost, self.cluster.device)
        found = self.table.duration(
            each.step.target, each.outcome.key, cost, is_repeated=is_repeated
        )
        launch_s = self.table.launch_s
        return Duration(
            seconds=max(found.seconds + launch_s, 0.0),
            low_s=max(found.low_s + launch_s, 0.0),
            high_s=max(found.high_s + launch_s, 0.0),
            source=found.source,
        )

    def _message(self, each: Launched) -> Duration:
        kind = each.outcome.collective
        assert kind is not None
        if each.group not in self.placements:
            raise GraphError(
                f"{each.step.target} communicates over the group {each.group!r}, whose size the "
                f"schedule does not say. It knows {', '.join(self.placements) or 'none'}: name "
                "groups by the axes of the plan."
            )
        placement = self.placements[each.group]
        found = message(kind, each.outcome.collective_bytes, placement, self.measured)
        is_measured = found.algorithm is Algorithm.MEASURED
        beside_s = 0.0 if self.table is None else self.table.message_s
        return Duration(
            seconds=found.duration_s + beside_s,
            low_s=found.duration_s * (_MEASURED_LOW if is_measured else _MODEL_LOW),
            high_s=found.duration_s * (_MEASURED_HIGH if is_measured else _MODEL_HIGH)
            + _BESIDE_HIGH * beside_s,
            source=Source.MEASURED if is_measured else Source.ROOFLINE,
        )
