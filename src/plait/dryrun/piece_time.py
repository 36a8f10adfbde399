"""How long a piece takes on one rank: its operations on two streams, with what cp and ep add.

Tensor-parallel messages stand in the captured programs. Three things do not, and are priced in
closed form: the ring in which ranks of cp pass keys and values on, the exchanges of tokens between
ranks of ep, and the sums over a vocabulary that is parted over tp.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from plait.cost.clusters import Cluster
from plait.cost.collectives import Collective
from plait.cost.nccl_tests import Measured
from plait.cost.operations import Cost, Kind, operation_s
from plait.cost.simulate import (
    COMPUTE,
    FILLER,
    Operation,
    Priority,
    Simulation,
    communication,
    list_schedule,
    longest_paths_s,
    simulate,
)
from plait.cost.skewed_schedule import Lane, skewed_schedule
from plait.cost.table import Duration, Source, Table
from plait.cost.timeline import Timeline
from plait.cost.topology import Algorithm, Placement, message, place
from plait.dryrun.piece import BEFORE, BEHIND, Piece, Pieces, ScaledWork, Shape
from plait.dryrun.pieces import PieceStore
from plait.dryrun.work import Part, Work
from plait.plan.parallel_plan import Recompute

_FLOAT_BYTES, _BFLOAT16_BYTES = 4, 2
Sent = tuple[Collective, float, Placement]
"""A message: the collective, its bytes, and between whom."""


@dataclass(frozen=True, kw_only=True)
class PassTimes:
    """One pass of a piece: its time, and what it is made of, in seconds.

    exposed_s: in which something is communicated and nothing computed. interpolated_s: of the
    operators' time, what was estimated from measured ones; the rest is the roofline's. measured_s:
    of communication_s, what nccl-tests measured.
    """

    total_s: float = 0.0
    matrix_s: float = 0.0
    attention_s: float = 0.0
    memory_s: float = 0.0
    communication_s: float = 0.0
    exposed_s: float = 0.0
    interpolated_s: float = 0.0
    measured_s: float = 0.0
    matrix_flops: float = 0.0
    attention_flops: float = 0.0

    def plus(self, other: "PassTimes", times: float = 1.0) -> "PassTimes":
        """Both, one after the other, the second so many times."""
        names = self.__dataclass_fields__
        return PassTimes(
            **{name: getattr(self, name) + times * getattr(other, name) for name in names}
        )


@dataclass(frozen=True, kw_only=True)
class PieceTimes:
    """A piece forward and backward; weight_s: of the backward, what only weights rest on.

    exchange_s: of either pass, messages of ep, which nothing in the piece runs beside.
    """

    forward: PassTimes
    backward: PassTimes
    backward_input_s: float
    backward_weight_s: float
    exchange_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the time of a piece depends on besides its shape.

    sequences: in a micro-batch on this rank, a fraction where cp parts them. overlap: messages run
    beside whatever does not need them, by list scheduling; else as captured. expert_load: rows of
    the busiest rank's experts over the mean.
    """

    shape: Shape
    sequences: float
    cp: int = 1
    cp_stride: int = 1
    ep: int = 1
    ep_stride: int = 1
    overlap: bool = False
    expert_load: float = 1.0


@dataclass
class PieceClock:
    """Times pieces, each once for each setting.

    measured: runs of nccl-tests. table: what was measured of the cluster's device.
    """

    store: PieceStore
    cluster: Cluster
    measured: Sequence[Measured] = ()
    table: Table | None = None
    known: dict[tuple[str, Setting], PieceTimes] = field(default_factory=dict)

    def times(self, name: str, setting: Setting) -> PieceTimes:
        """The times of the piece of that name: "before", "behind", or a kind of layer."""
        if (name, setting) not in self.known:
            pieces = self.store.find(setting.shape, setting.sequences)
            self.known[name, setting] = self._times(_named(pieces, name), setting, pieces)
        return self.known[name, setting]

    def timelines(self, name: str, setting: Setting) -> list[tuple[str, Timeline]]:
        """The forward and the backward of a piece on their streams."""
        piece = _named(self.store.find(setting.shape, setting.sequences), name)
        programs = (("forward", piece.forward), ("backward", piece.backward))
        return [
            (title, self._simulation(_at(program, setting), setting).timeline(title))
            for title, program in programs
        ]

    def placement(self, axis: str, size: int, stride: int) -> Placement:
        """How an axis lies."""
        return place(self.cluster, axis, size=size, stride=stride)

    def message_s(self, kind: Collective, num_bytes: float, where: Placement) -> float:
        """The time of a message."""
        return message(kind, num_bytes, where, self.measured).duration_s

    def measured_s(self, sent: Sequence[Sent]) -> float:
        """Of the time of messages, what nccl-tests measured."""
        if not self.measured:
            return 0.0
        found = [message(*each, self.measured) for each in sent]
        return sum(x.duration_s for x in found if x.algorithm is Algorithm.MEASURED)

    def _times(self, piece: Piece, setting: Setting, pieces: Pieces) -> PieceTimes:
        shape = setting.shape
        if shape.reruns_all and shape.recompute is Recompute.FULL:
            shape = replace(shape, recompute=Recompute.NONE)
            once = self.times(piece.name, replace(setting, shape=shape))
            if piece.name in (BEFORE, BEHIND):
                return once
            return replace(
                once,
                backward=once.forward.plus(once.backward),
                backward_input_s=once.forward.total_s + once.backward_input_s,
            )
        forward = _at(piece.forward, setting)
        backward = _at(piece.backward, setting)
        inputs = _only(backward, is_weight=False)
        weight_s = sum(self._operation(w, setting).duration_s for w in backward if w.is_weight_only)
        extra_forward, extra_backward = self._extra(piece, setting, pieces)
        whole = self._pass(backward, setting, extra_backward)
        return PieceTimes(
            forward=self._pass(forward, setting, extra_forward),
            backward=whole,
            backward_input_s=self._pass(inputs, setting, extra_backward).total_s,
            backward_weight_s=weight_s,
            exchange_s=sum(self.message_s(*each) for each in self._exchange(piece, setting)),
        )

    def _pass(self, work: Sequence[Work], setting: Setting, extra: Sequence[Sent]) -> PassTimes:
        run = self._simulation(work, setting)
        extra_s = sum(self.message_s(*each) for each in extra)
        sums = dict.fromkeys(Kind, 0.0)
        interpolated_s = 0.0
        for each in work:
            if each.collective is None:
                sums[each.cost.kind] += self._operation(each, setting).duration_s
                interpolated_s += self._from_table_s(each)
        ring_s = sum(self._ring_exposed_s(each, setting) for each in work)
        return PassTimes(
            total_s=run.total_s + extra_s,
            matrix_s=sums[Kind.MATRIX],
            attention_s=sums[Kind.ATTENTION] - ring_s,
            memory_s=sums[Kind.MEMORY],
            communication_s=run.communication_s + ring_s + extra_s,
            exposed_s=run.exposed_s + ring_s + extra_s,
            interpolated_s=interpolated_s,
            measured_s=self.measured_s([*self._sent(work, setting), *extra]),
            matrix_flops=_flops(work, Kind.MATRIX),
            attention_flops=_flops(work, Kind.ATTENTION),
        )

    def _simulation(self, work: Sequence[Work], setting: Setting) -> Simulation:
        operations = [self._operation(each, setting) for each in work]
        slowdown = self.cluster.device.interference
        if not setting.overlap:
            return simulate(operations, range(len(operations)), slowdown=slowdown)
        free = [
            replace(each, depends_on=_through_waits(work, each.depends_on)) for each in operations
        ]
        if setting.shape.replicas != 1:  # ordered as the compiler does (`order.py`)
            lanes = [
                Lane(replica=each.replica, place=each.place, is_filler=each.is_weight_only)
                for each in work
            ]
            return skewed_schedule(free, lanes, slowdown=slowdown)
        priorities: list[Priority] = [
            FILLER if each.is_weight_only else (-path_s, float(i))
            for i, (each, path_s) in enumerate(zip(work, longest_paths_s(free), strict=True))
        ]
        return list_schedule(free, priorities, slowdown=slowdown)

    def _operation(self, work: Work, setting: Setting) -> Operation:
        if work.collective is not None:
            duration_s = sum(self.message_s(*each) for each in self._sent([work], setting))
            return Operation(work.name, communication(work.group), duration_s, work.depends_on)
        duration_s = 0.0 if work.is_wait else self._kernels_s(work)
        if work.part is Part.EXPERTS:
            duration_s *= setting.expert_load
        return Operation(
            work.name, COMPUTE, duration_s + self._ring_exposed_s(work, setting), work.depends_on
        )

    def _sent(self, work: Sequence[Work], setting: Setting) -> list[Sent]:
        """Messages of tp; copies of an expert lie elsewhere (`data_parallel.py`)."""
        size = setting.shape.tp
        return [
            (each.collective, each.num_bytes, self.placement(each.group, size, 1))
            for each in work
            if each.collective is not None and each.part is not Part.EXPERTS
        ]

    def _kernels_s(self, work: Work) -> float:
        if self.table is None:
            device = self.cluster.device
            return sum(operation_s(each, device) for each in work.kernels or (work.cost,))
        return sum(each.seconds for each in self._durations(self.table, work))

    def _from_table_s(self, work: Work) -> float:
        if self.table is None or work.is_wait:
            return 0.0
        found = self._durations(self.table, work)
        return sum(each.seconds for each in found if each.source is not Source.ROOFLINE)

    def _durations(self, table: Table, work: Work) -> list[Duration]:
        """By the table's families: sizes of a scaled piece are known, its forms are not."""
        if work.kernels:
            return [table.duration("", "", each) for each in work.kernels]
        return [table.duration(work.operator, "", work.cost)]

    def _ring_exposed_s(self, work: Work, setting: Setting) -> float:
        """What attention waits for while keys and values go round the ranks of cp.

        Each of cp - 1 steps sends the rank's part on, beside attention to the part at hand [ring
        attention, arXiv 2310.01889, section 3]; backward their gradients travel too.
        """
        if setting.cp == 1 or work.part is not Part.ATTENTION:
            return 0.0
        where = self.placement("cp", setting.cp, setting.cp_stride)
        link = where.inside if where.num_nodes == 1 else where.between
        sent = work.key_bytes * (2 if "backward" in work.name else 1)
        ring_s = (setting.cp - 1) * (link.latency_s + sent / link.bandwidth_bytes_per_s)
        beside_s = operation_s(work.cost, self.cluster.device) * (setting.cp - 1) / setting.cp
        return max(0.0, ring_s - beside_s)

    def _exchange(self, piece: Piece, setting: Setting) -> list[Sent]:
        """Tokens to their experts and back."""
        if not piece.num_expert_elements or setting.ep == 1:
            return []
        shape, source = setting.shape, self.store.source
        tokens = setting.sequences * shape.sequence_length / (shape.tp if shape.sp else 1)
        rows = tokens * source.expert_rows * setting.expert_load
        num_bytes = rows * source.hidden_size * _BFLOAT16_BYTES
        where = self.placement("ep", setting.ep, setting.ep_stride)
        return 2 * [(Collective.ALL_TO_ALL, num_bytes, where)]

    def _extra(
        self, piece: Piece, setting: Setting, pieces: Pieces
    ) -> tuple[list[Sent], list[Sent]]:
        """Messages that are not in the captured programs, forward and backward."""
        shape, source = setting.shape, self.store.source
        tokens = setting.sequences * shape.sequence_length
        exchange = self._exchange(piece, setting)
        forward, backward = list(exchange), list(exchange)
        if pieces.is_shared_head:
            where = self.placement("tp", shape.tp, 1)
            kind = Collective.REDUCE_SCATTER if shape.sp else Collective.ALL_REDUCE
            hidden = tokens * source.hidden_size * _BFLOAT16_BYTES
            if piece.name == BEFORE:
                forward.append((kind, hidden, where))
            if piece.name == BEHIND:
                # Largest logit, sum of exponentials and the target's logit of each token, then the
                # gradient of the hidden states.
                row = tokens * _FLOAT_BYTES
                forward += 3 * [(Collective.ALL_REDUCE, row, where)]
                backward.append((kind, hidden, where))
        return forward, backward


def _flops(work: Sequence[Work], kind: Kind) -> float:
    return sum(each.cost.flops for each in work if each.cost.kind is kind)


def _named(pieces: Pieces, name: str) -> Piece:
    return {BEFORE: pieces.before, BEHIND: pieces.behind, **pieces.layers}[name]


def _at(program: Sequence[ScaledWork], setting: Setting) -> list[Work]:
    return [_with_experts(each, setting) for each in program]


def _with_experts(scaled: ScaledWork, setting: Setting) -> Work:
    """The work for these sequences; a rank of ep reads its own experts for the rows of all."""
    work = scaled.at(setting.sequences)
    if work.part is not Part.EXPERTS or setting.ep == 1 or work.cost.sizes is None:
        return work
    weights = work.expert_bytes
    rows, inner, columns = work.cost.sizes
    cost = Cost(
        kind=work.cost.kind,
        bytes=work.cost.bytes - weights + weights // setting.ep,
        flops=work.cost.flops,
        dtype=work.cost.dtype,
        sizes=(rows * setting.ep, inner, columns),
    )
    return replace(work, cost=cost)


def _only(work: Sequence[Work], *, is_weight: bool) -> list[Work]:
    """The work without the other kind, its dependencies numbered anew."""
    kept = [i for i, each in enumerate(work) if each.is_weight_only == is_weight]
    place_of = {i: n for n, i in enumerate(kept)}
    return [
        replace(work[i], depends_on=tuple(place_of[k] for k in work[i].depends_on if k in place_of))
        for i in kept
    ]


def _through_waits(work: Sequence[Work], depends_on: Sequence[int]) -> tuple[int, ...]:
    found: set[int] = set()
    for i in depends_on:
        found |= set(_through_waits(work, work[i].depends_on)) if work[i].is_wait else {i}
    return tuple(sorted(found))
