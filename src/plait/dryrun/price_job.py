"""`price_job`: the step time and the memory of a large job, from captured and priced pieces.

Ranks of dp, fsdp, cp, ep and tp do the same; pipeline ranks differ by their stages. So a job of
thousands of ranks is a few pieces, each captured once on fake tensors, timed on two streams, put
together to stages and played through the table of the pipeline.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from plait.cost.clusters import Cluster
from plait.cost.nccl_tests import Measured
from plait.cost.simulate import beside_s
from plait.cost.table import Source
from plait.cost.table import Table as MeasuredTable
from plait.cost.timeline import Timeline
from plait.cost.topology import send_s
from plait.dryrun.data_parallel import Gathered, gathered, owners_of
from plait.dryrun.job_fragments import Fragments, RankRequests
from plait.dryrun.job_memory import STATE_KINDS, gathered_bytes, ledger_of
from plait.dryrun.job_messages import note_of_unmatched, sources_of_messages
from plait.dryrun.job_notes import closed_forms
from plait.dryrun.job_price import JobPrice, RankClass, TimeParts, interval_s
from plait.dryrun.model_source import ModelSource, decoder_source
from plait.dryrun.owners import Owner, owners_of_rank
from plait.dryrun.piece import BEFORE, BEHIND, Piece, Pieces, Shape
from plait.dryrun.piece_time import PassTimes, PieceClock, PieceTimes, Setting
from plait.dryrun.pieces import PieceStore
from plait.dryrun.pipeline import (
    InFlight,
    PipelineRun,
    StageTimes,
    in_flight,
    play,
    shorter,
    with_offload,
)
from plait.dryrun.pipeline_tables import Table, table_of, table_of_one
from plait.dryrun.pretrain_job import PretrainJob
from plait.dryrun.routing import expert_load
from plait.dryrun.stages import Spread, Stage, check_model, spread_of, stages_of
from plait.errors import PlanError
from plait.plan.parallel_plan import ParallelPlan, Pipeline, Recompute

_ACTIVATION_BYTES = 2
_LARGEST = 8  # owners of memory that a price names
_OPTIMIZER_BYTES = 34
"""Adam reads a gradient, a master copy and two moments in float32 and writes three of them, and a
bfloat16 copy: 4 * 4 + 3 * 4 + 2 bytes a parameter; before it the norm of gradients reads them."""
_FOREACH_OPTIMIZER_BYTES = 92
"""A kernel a line [torch/optim/adamw.py, _multi_tensor_adamw]: decay 8, both moments 12 + 8 + 12,
root 8, its corrections 8 + 8, update 16; clipping reads the gradients, then reads and writes them,
4 + 8."""


@dataclass
class Pricer:
    """Prices plans of one job on one cluster; pieces are captured and timed once for all of them.

    Raises PlanError for a plan that does not divide what it should.
    """

    job: PretrainJob
    cluster: Cluster
    source: ModelSource
    measured: Sequence[Measured] = ()
    table: MeasuredTable | None = None
    moved: dict[tuple[object, ...], Gathered] = field(default_factory=dict)
    flops: dict[tuple[object, ...], float] = field(default_factory=dict)
    fragments: dict[tuple[object, ...], Fragments] = field(default_factory=dict)
    last_run: tuple[object, PipelineRun, float] | None = None
    store: PieceStore = field(init=False)
    clock: PieceClock = field(init=False)

    def __post_init__(self) -> None:
        """Make the stores. Raises PlanError for a table of another device."""
        if self.table is not None:
            self.table.check_device(self.cluster)
        self.store = PieceStore(self.source, self.cluster)
        self.clock = PieceClock(self.store, self.cluster, self.measured, self.table)

    def lower_bounds(self) -> "Pricer":
        """A pricer that takes a share of a sequence (cp) for at most its cost by the roofline.

        For that it needs no capture but those of whole sequences, which both share.
        """
        other = Pricer(self.job, self.cluster, self.source, self.measured, self.table)
        other.store.bounds_shares = True
        other.store.graphs, other.store.pieces = self.store.graphs, self.store.pieces
        return other

    def price(self, job: PretrainJob, *, fragments: bool = True) -> JobPrice:
        """The price of a job that differs in its plan and micro-batches only.

        fragments: play the allocator on a rank of each class too, which takes longest.
        """
        planned = PlannedJob(self, job, exact=True)
        price = planned.price()
        return replace(price, classes=planned.with_fragments()) if fragments else price

    def planned(self, job: PretrainJob) -> "PlannedJob":
        """The job with its memory; its price takes long pipelines from two short ones."""
        return PlannedJob(self, job, exact=False)


def price_job(
    job: PretrainJob,
    cluster: Cluster,
    *,
    source: ModelSource | None = None,
    measured: Sequence[Measured] = (),
    table: MeasuredTable | None = None,
) -> JobPrice:
    """Price a job on a cluster, all of whose ranks its plan must use.

    source: of a model that is not one of Plait's own. measured: runs of nccl-tests. table: what
    `plait calibrate` measured of the cluster's device; else times are those of the roofline.
    """
    return Pricer(job, cluster, source or source_of(job), measured, table).price(job)


def source_of(job: PretrainJob) -> ModelSource:
    """The source of the job's model."""
    if job.model is None:
        raise PlanError(f"the job {job.name!r} has no model. Set its model, or give a source.")
    return decoder_source(job.model, job.name)


@dataclass(frozen=True, kw_only=True)
class _StageSums:
    """A stage: its times, and what they are made of."""

    times: StageTimes
    parts: PassTimes
    gather_exposed_s: float
    gathers: tuple[Gathered, ...]
    alone_forward_s: float
    alone_backward_s: float


class PlannedJob:
    """One job being priced: its memory at once, its time when it is asked for."""

    def __init__(self, pricer: Pricer, job: PretrainJob, *, exact: bool) -> None:
        """Spread the job and find its pieces."""
        self.pricer, self.exact = pricer, exact
        self.cluster, self.clock, self.source = pricer.cluster, pricer.clock, pricer.source
        self.known_classes: tuple[RankClass, ...] | None = None
        check_model(self.source, job.plan)
        self.spread: Spread = spread_of(job, job.plan, self.cluster.num_ranks)
        given = job.plan.num_micro_batches
        if given not in (1, self.spread.num_micro_batches):
            raise PlanError(
                f"plan.num_micro_batches={given}, but batch_size={job.batch_size} over "
                f"{self.spread.copies} copies in micro-batches of {job.micro_batch_size} makes "
                f"{self.spread.num_micro_batches}. Leave it at 1, or change micro_batch_size."
            )
        self.job, self.plan = job, job.plan
        self.shape = shape_of(job)
        self.setting = self._setting()
        self.pieces: Pieces = pricer.store.find(self.shape, self.spread.sequences)
        self.by_name = {
            BEFORE: self.pieces.before,
            BEHIND: self.pieces.behind,
            **self.pieces.layers,
        }
        self.stages = stages_of(self.source, self.plan.pp * self.plan.stages_per_rank)
        rank_of_stage = self._table(shorter(self.spread.num_micro_batches, self.plan.pp))
        self.ranks = [
            [i for i in range(len(self.stages)) if rank_of_stage.rank_of_stage[i] == rank]
            for rank in range(self.plan.pp)
        ]

    def _setting(self) -> Setting:
        plan, job = self.plan, self.job
        return Setting(
            shape=self.shape,
            sequences=self.spread.sequences,
            cp=plan.cp,
            cp_stride=plan.tp,
            ep=plan.ep,
            ep_stride=1 if plan.sp else plan.tp,
            overlap=job.overlap,
            expert_load=self.expert_load,
        )

    @property
    def expert_load(self) -> float:
        """Rows of the busiest rank's experts over the mean."""
        tokens = self.spread.sequences * self.job.sequence_length * self.plan.ep
        own = tokens / (self.plan.tp if self.plan.sp else 1)
        return expert_load(self.job, self.source, own)

    def price(self) -> JobPrice:
        """Put stages, pipeline, data parallelism and optimizer together."""
        stages, ranks = self.stages, self.ranks
        sums = {stage: self._stage(stage) for stage in dict.fromkeys(stages)}
        run, makespan_s = self._pipeline([sums[stage].times for stage in stages])
        ends = [self._end_s([sums[stages[i]] for i in held]) for held in ranks]
        optimizer = [self._optimizer_s([stages[i] for i in held]) for held in ranks]
        tail_s = max(a + b for a, b in zip(ends, optimizer, strict=True))
        step_s = makespan_s + tail_s
        busiest = max(range(self.plan.pp), key=lambda rank: run.busy_s[rank])
        busiest_sums = [sums[stages[i]] for i in ranks[busiest]]
        parts = self._parts(
            busiest_sums,
            makespan_s,
            tail_s,
            max(optimizer),
            hidden_s=run.hidden_s[busiest] * self.spread.num_micro_batches / run.num_micro_batches,
        )
        count = self.spread.num_micro_batches
        interpolated_s = count * sum(each.parts.interpolated_s for each in busiest_sums)
        low_s, high_s = interval_s(
            step_s, parts, interpolated_s=interpolated_s, spread=self._table_spread()
        )
        saved = tuple(sums[stage].times.saved_bytes for stage in stages)
        return JobPrice(
            job=self.job,
            cluster=self.cluster.name,
            num_ranks=self.cluster.num_ranks,
            step_s=step_s,
            low_s=low_s,
            high_s=high_s,
            tokens_per_step=self.job.batch_size * self.job.sequence_length,
            flops_per_token=self._model_flops_per_token(),
            peak_flops_per_s=self.cluster.device.peak(torch.bfloat16),
            memory_limit_bytes=self.cluster.device.memory_bytes,
            num_micro_batches=self.spread.num_micro_batches,
            parts=parts,
            classes=self.classes(),
            sources=self._sources(busiest_sums, parts, interpolated_s),
            notes=(
                *self.pieces.notes,
                *closed_forms(self.job, self.expert_load, self.pieces.is_shared_head),
                *self._unmatched(list(sums.values())),
            ),
            run=run,
            largest=self._largest() if self.exact else (),
            stage_saved_bytes=saved,
            timelines=self._timelines() if self.exact else (),
        )

    def _table_spread(self) -> float:
        """How far times from the table are off: of most families, and of whole programs."""
        table = self.pricer.table
        return 0.0 if table is None else math.hypot(table.spread or 0.0, table.program_spread)

    def _sources(
        self, held: list[_StageSums], parts: TimeParts, interpolated_s: float
    ) -> tuple[tuple[str, float], ...]:
        compute_s = parts.matrix_s + parts.attention_s + parts.memory_s + parts.optimizer_s
        passes, gathers = _together(held, self.spread.num_micro_batches)
        return (
            (Source.INTERPOLATED.value, interpolated_s),
            (Source.ROOFLINE.value, compute_s - interpolated_s),
            *sources_of_messages(passes, gathers, parts),
        )

    def _largest(self) -> tuple[Owner, ...]:
        fullest = max(self.classes(), key=lambda each: each.ledger.total_bytes)
        kinds = fullest.ledger.bytes_by_kind
        return owners_of_rank(
            [(self.piece(name), count) for stage in fullest.stages for name, count in stage],
            state_bytes=sum(kinds[kind] for kind in STATE_KINDS),
            saved_bytes=kinds["saved activations"],
            top=_LARGEST,
        )

    def _timelines(self) -> tuple[tuple[str, Timeline], ...]:
        """Of the kind of layer that there are most of."""
        ((kind, _),) = Counter(self.source.kinds).most_common(1)
        title = "a layer" if kind == "layer" else f"a layer with {kind}"
        return tuple(
            (f"{title}, {which}", timeline)
            for which, timeline in self.clock.timelines(kind, self.setting)
        )

    def _table(self, count: int) -> Table:
        plan = self.plan
        if plan.pp == 1:
            return table_of_one(count)
        return table_of(plan.pipeline, plan.pp, plan.stages_per_rank, count)

    def _pipeline(self, times: list[StageTimes]) -> tuple[PipelineRun, float]:
        """The run, of a few micro-batches unless it is to be exact, and the time of all.

        Plans that differ in how they share parameters have the same run, unless with reshard.
        """
        count = self.spread.num_micro_batches
        hop_s = 0.0
        if self.plan.pp > 1:
            hop_s = send_s(self._boundary_bytes(), self.cluster, stride=self._pp_stride())
        short = count if self.exact else shorter(count, self.plan.pp)
        table = self._table(short)
        key = (table, tuple(times), hop_s, count)
        if self.pricer.last_run is None or self.pricer.last_run[0] != key:
            interference = self.cluster.device.interference
            run = play(table, times, send_s=hop_s, interference=interference)
            whole_s = run.total_s
            if short < count:
                before = self._table(short - self.plan.pp)
                before_s = play(before, times, send_s=hop_s, interference=interference).total_s
                whole_s += (count - short) // self.plan.pp * (run.total_s - before_s)
            self.pricer.last_run = key, run, whole_s
        return self.pricer.last_run[1:]

    def _pp_stride(self) -> int:
        return self.cluster.num_ranks // self.plan.pp

    def _boundary_bytes(self) -> float:
        tokens = self.spread.sequences * self.job.sequence_length
        own = tokens / (self.plan.tp if self.plan.sp else 1)
        return own * self.source.hidden_size * _ACTIVATION_BYTES

    def _stage(self, stage: Stage) -> _StageSums:
        """Sum the pieces of a stage; with reshard their parameters travel beside them."""
        forward_s = input_s = weight_s = exposed_s = saved = exchange_s = 0.0
        parts = PassTimes()
        gathers: list[Gathered] = []
        interference = self.cluster.device.interference
        for name, count in stage:
            piece = self.piece(name)
            times: PieceTimes = self.clock.times(name, self.setting)
            moved = self._gathered(piece)
            gathers += [moved] * count
            ahead, behind = times.forward.total_s, times.backward.total_s
            if self.plan.reshard:
                ahead = beside_s(ahead, moved.gather_s, interference)
                behind = beside_s(
                    behind, moved.gather_s + moved.scatter_s + moved.sum_s, interference
                )
            late_s = behind - times.backward.total_s
            exposed_s += count * (ahead - times.forward.total_s + late_s)
            forward_s += count * ahead
            own_input_s, own_weight_s = self._split(times)
            input_s += count * (own_input_s + late_s)
            weight_s += count * own_weight_s
            saved += count * piece.saved.at(self.spread.sequences)
            exchange_s += count * times.exchange_s
            parts = parts.plus(times.forward, count).plus(times.backward, count)
        stage_times = StageTimes(
            forward_s=forward_s,
            backward_input_s=input_s,
            backward_weight_s=weight_s,
            saved_bytes=saved,
            exchange_s=exchange_s,
        )
        if self.job.offload:
            bandwidth = self.cluster.device.host_bandwidth_bytes_per_s
            stage_times = with_offload(stage_times, self.job.offload, bandwidth)
        return _StageSums(
            times=stage_times,
            parts=parts,
            gather_exposed_s=exposed_s,
            gathers=tuple(gathers),
            alone_forward_s=forward_s,
            alone_backward_s=input_s + weight_s,
        )

    def _gathered(self, piece: Piece) -> Gathered:
        plan = self.plan
        key = (piece.name, plan.dp, plan.fsdp, plan.cp, plan.tp, plan.sp, plan.ep)
        key = (*key, self.job.gradient_bytes)
        if key not in self.pricer.moved:
            self.pricer.moved[key] = gathered(
                piece, plan, self.clock, gradient_bytes=self.job.gradient_bytes
            )
        return self.pricer.moved[key]

    def _split(self, times: PieceTimes) -> tuple[float, float]:
        """The backward's two parts: as they take apart, or together where nobody parts them."""
        if self.plan.pipeline in (Pipeline.ZERO_BUBBLE, Pipeline.ZBV, Pipeline.DUAL_PIPE_V):
            return times.backward_input_s, times.backward_weight_s
        whole_s = times.backward.total_s
        return max(0.0, whole_s - times.backward_weight_s), min(whole_s, times.backward_weight_s)

    def _end_s(self, held: list[_StageSums]) -> float:
        """What is left of gathers and sums that happen once in a step.

        They run beside the first forward and the last backward of the rank; the first and the last
        piece have nothing to run beside.
        """
        if self.plan.reshard or self.cluster.num_ranks == 1:
            return 0.0
        pieces = [each for sums in held for each in sums.gathers]
        shared = owners_of(self.plan).shards > 1 or owners_of(self.plan).expert_shards > 1
        gathers = [each.gather_s if shared else 0.0 for each in pieces]
        sums_s = [each.scatter_s + each.sum_s for each in pieces]
        if not self.job.overlap:
            return sum(gathers) + sum(sums_s)
        forward_s = sum(each.alone_forward_s for each in held)
        backward_s = sum(each.alone_backward_s for each in held)
        interference = self.cluster.device.interference
        late = [
            beside_s(forward_s, sum(gathers[1:]), interference) - forward_s,
            beside_s(backward_s, sum(sums_s[1:]), interference) - backward_s,
        ]
        return gathers[0] + sums_s[0] + sum(late)

    def _optimizer_s(self, stages: list[Stage]) -> float:
        owners = owners_of(self.plan)
        shared = 0.0
        for stage in stages:
            for name, count in stage:
                piece = self.piece(name)
                shared += count * piece.num_elements / owners.shards
                shared += count * piece.num_expert_elements / self.plan.ep / owners.expert_shards
        each = _OPTIMIZER_BYTES if self.job.fused_optimizer else _FOREACH_OPTIMIZER_BYTES
        return shared * each / self.cluster.device.memory_bandwidth_bytes_per_s

    def classes(self) -> tuple[RankClass, ...]:
        """Ranks that hold the same stages and as many micro-batches, with their memory."""
        if self.known_classes is None:
            self.known_classes = self._classes()
        return self.known_classes

    def _classes(self) -> tuple[RankClass, ...]:
        stages = self.stages
        saved = [
            sum(n * self.piece(name).saved.at(self.spread.sequences) for name, n in stage)
            for stage in stages
        ]
        table = self._table(shorter(self.spread.num_micro_batches, self.plan.pp))
        held_now: InFlight = in_flight(table, [(1 - self.job.offload) * each for each in saved])
        found: dict[tuple[object, ...], RankClass] = {}
        for rank, held in enumerate(self.ranks):
            key = (tuple(stages[i] for i in held), held_now.micro_batches[rank])
            if key in found:
                known = found[key]
                found[key] = replace(known, pipeline_ranks=(*known.pipeline_ranks, rank))
                continue
            ledger = ledger_of(
                [(self.piece(name), count) for i in held for name, count in stages[i]],
                self.job,
                self.plan,
                device=self.cluster.device,
                sequences=self.spread.sequences,
                saved_bytes=held_now.saved_bytes[rank],
                boundary_bytes=self._boundary_bytes(),
            )
            found[key] = RankClass(
                pipeline_ranks=(rank,),
                stages=tuple(stages[i] for i in held),
                ranks_each=self.cluster.num_ranks // self.plan.pp,
                in_flight=held_now.micro_batches[rank],
                ledger=ledger,
            )
        return tuple(found.values())

    def with_fragments(self, *, while_they_fit: bool = False) -> tuple[RankClass, ...]:
        """The classes with what the allocator reserves on one rank of each.

        while_they_fit: the fullest first, and none any more behind one that does not fit.
        """
        table = self._table(self.spread.num_micro_batches)
        found = list(self.classes())
        fullest_first = sorted(range(len(found)), key=lambda i: -found[i].ledger.total_bytes)
        for i in fullest_first:
            fragments = self._fragments(found[i], table)
            found[i] = replace(found[i], fragments=fragments)
            if while_they_fit and not fragments.fixed.fits:
                break
        return tuple(found)

    def _fragments(self, each: RankClass, table: Table) -> Fragments:
        """Played once for all plans that ask for the same."""
        rank = each.pipeline_ranks[0]
        boundary_bytes = round(self._boundary_bytes())
        gathered = {
            name: round(gathered_bytes(piece, self.plan)) if self.plan.reshard else 0
            for name, piece in self.by_name.items()
        }
        limit_bytes = max(0, self.cluster.device.memory_bytes - each.ledger.outside_bytes)
        state_bytes = [each.ledger.bytes_by_kind[kind] for kind in STATE_KINDS]
        key = (
            *(self.shape, self.spread.sequences, self.plan.ep, self.job.offload),
            *(each.stages, table, rank, boundary_bytes, limit_bytes),
            *(tuple(gathered.items()), tuple(state_bytes)),
        )
        if key not in self.pricer.fragments:
            requests = RankRequests(
                job=self.job,
                plan=self.plan,
                stages={
                    i: [self.piece(name) for name, count in self.stages[i] for _ in range(count)]
                    for i in self.ranks[rank]
                },
                tasks=table.tasks[rank],
                sequences=self.spread.sequences,
                state_bytes=each.ledger.bytes_by_kind,
                gathered_bytes=gathered,
                boundary_bytes=boundary_bytes,
            )
            self.pricer.fragments[key] = requests.reserved(limit_bytes)
        return self.pricer.fragments[key]

    def _parts(
        self,
        held: list[_StageSums],
        makespan_s: float,
        tail_s: float,
        optimizer_s: float,
        *,
        hidden_s: float,
    ) -> TimeParts:
        count = self.spread.num_micro_batches
        total, _ = _together(held, count)
        gather_s = count * sum(sums.gather_exposed_s for sums in held)
        busy_s = total.total_s + gather_s - hidden_s
        slowed_s = (
            total.total_s - total.matrix_s - total.attention_s - total.memory_s - total.exposed_s
        )
        return TimeParts(
            matrix_s=total.matrix_s,
            attention_s=total.attention_s,
            memory_s=total.memory_s,
            exposed_s=total.exposed_s - hidden_s,
            interference_s=max(0.0, slowed_s),
            data_parallel_s=gather_s + tail_s - optimizer_s,
            optimizer_s=optimizer_s,
            bubble_s=max(0.0, makespan_s - busy_s),
            communication_s=total.communication_s,
        )

    def _model_flops_per_token(self) -> float:
        """Products and attention of a forward and backward without recompute, over all of tp.

        Attention's backward counts twice its forward, as is usual for MFU [PaLM, arXiv 2204.02311,
        appendix B], though kernels do more; pairs of causal attention count once.
        """
        shape = replace(self.shape, recompute=Recompute.NONE, replicas=1)
        key = (shape, self.spread.sequences)
        if key not in self.pricer.flops:
            self.pricer.flops[key] = self._count_flops(replace(self.setting, shape=shape))
        return self.pricer.flops[key]

    def _count_flops(self, setting: Setting) -> float:
        flops = 0.0
        counts: dict[str, int] = {BEFORE: 1, BEHIND: 1}
        for kind in self.source.kinds:
            counts[kind] = counts.get(kind, 0) + 1
        for name, count in counts.items():
            times = self.clock.times(name, setting)
            one = times.forward.matrix_flops + times.backward.matrix_flops
            one += 3 * times.forward.attention_flops
            ranks = self.plan.tp
            if name == BEHIND and not self.pieces.is_shared_head:
                ranks = 1
            flops += count * one * ranks
        return flops / (self.spread.sequences * self.job.sequence_length)

    def piece(self, name: str) -> Piece:
        """The piece of that name."""
        return self.by_name[name]

    def _unmatched(self, stages: list[_StageSums]) -> tuple[str, ...]:
        return note_of_unmatched(*_together(stages), self.plan, self.setting, self.clock)


def _together(held: list[_StageSums], times: int = 1) -> tuple[PassTimes, list[Gathered]]:
    """Passes of stages so many times, and what is gathered of their pieces once."""
    total = PassTimes()
    for sums in held:
        total = total.plus(sums.parts, times)
    return total, [each for sums in held for each in sums.gathers]


def shape_of(job: PretrainJob) -> Shape:
    """What a job's pieces depend on. Raises PlanError if its layers differ in replicas."""
    plan = job.plan
    if plan.replicas_by_piece is not None:
        raise PlanError(
            f"replicas={plan.replicas}: a cluster is priced with one number of replicas for all "
            'layers, or "auto".'
        )
    return Shape(
        sequence_length=job.sequence_length,
        tp=plan.tp,
        sp=plan.sp,
        replicas=plan.replicas,
        recompute=plan.recompute,
        kernels=job.kernels,
        share_head=job.share_head,
        attention=job.attention,
        reruns_all=job.reruns_all,
    )


def with_plan(job: PretrainJob, plan: ParallelPlan, micro_batch_size: int) -> PretrainJob:
    """The job with another plan."""
    return replace(job, plan=plan, micro_batch_size=micro_batch_size)
