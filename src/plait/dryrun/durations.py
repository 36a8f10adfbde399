"""How long each launch of a replay takes, on which stream, and what it waits for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from plait.cost.clusters import Cluster, Link
from plait.cost.collectives import collective_s
from plait.cost.operations import Kind
from plait.cost.simulate import COMPUTE, Operation, communication
from plait.cost.table import Duration, Source, Table, roofline
from plait.dryrun.replay import Launched

_INNERMOST_FIRST = ("tp", "ep", "cp", "fsdp", "dp", "pp")
"""Neighbours on an axis are as far apart as the sizes of the axes before it, multiplied."""
_WAIT = ".wait_tensor.default"
_COLLECTIVE_LOW, _COLLECTIVE_HIGH = 0.8, 1.4
"""How far a collective may be off the alpha-beta model (assumed)."""
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
) -> list[TimedLaunch]:
    """The work of consecutive launches; what depends on earlier ones does not wait for them."""
    durations = _Durations(cluster, table, groups)
    if not launched:
        return []
    first = launched[0].number
    found: list[TimedLaunch] = []
    for each in launched:
        duration = durations.of(each)
        operation = Operation(
            each.step.name,
            COMPUTE if each.outcome.collective is None else communication(each.group),
            duration.seconds,
            tuple(i - first for i in each.depends_on if i >= first),
        )
        found.append(TimedLaunch(operation, duration, is_priced=duration is not _NOTHING))
    return found


def links_of(cluster: Cluster, groups: Mapping[str, int]) -> dict[str, Link]:
    """The link of each axis on which a schedule communicates."""
    links: dict[str, Link] = {}
    stride = 1
    known = [axis for axis in _INNERMOST_FIRST if axis in groups]
    for axis in (*known, *(axis for axis in groups if axis not in known)):
        links[axis] = cluster.link(axis, size=groups[axis], stride=stride)
        stride *= groups[axis]
    return links


class _Durations:
    def __init__(self, cluster: Cluster, table: Table | None, groups: Mapping[str, int]) -> None:
        self.cluster, self.table, self.groups = cluster, table, groups
        self.links = links_of(cluster, groups)
        self.known: dict[int, Duration] = {}  # by identity of the outcome, which the launch keeps

    def of(self, each: Launched) -> Duration:
        if each.outcome.collective is not None:
            return self._message(each)
        if each.step.target.endswith(_WAIT):
            return _NOTHING
        known = self.known.get(id(each.outcome))
        if known is None:
            known = self.known[id(each.outcome)] = self._compute(each)
        return known

    def _compute(self, each: Launched) -> Duration:
        cost = each.outcome.cost
        assert cost is not None
        if self.table is None:
            return _NOTHING if cost.kind is Kind.FREE else roofline(cost, self.cluster.device)
        found = self.table.duration(each.step.target, each.outcome.key, cost)
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
        size = self.groups.get(each.group, 1)
        link = self.links.get(each.group, self.cluster.between)
        seconds = collective_s(kind, each.outcome.collective_bytes, size, link)
        return Duration(
            seconds=seconds,
            low_s=seconds * _COLLECTIVE_LOW,
            high_s=seconds * _COLLECTIVE_HIGH,
            source=Source.ROOFLINE,
        )
