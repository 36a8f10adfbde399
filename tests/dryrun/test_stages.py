from dataclasses import replace

import pytest

from plait.dryrun.model_source import decoder_source
from plait.dryrun.pretrain_job import PretrainJob
from plait.dryrun.stages import check_model, spread_of, stages_of
from plait.errors import ConfigError, PlanError
from plait.models.decoder_config import DecoderConfig
from plait.nn.experts import ExpertSettings
from plait.plan.parallel_plan import ParallelPlan

CONFIG = DecoderConfig(num_layers=6)
JOB = PretrainJob(name="job", model=CONFIG, batch_size=64, sequence_length=4096)


def test_layers_that_divide_are_shared_equally():
    stages = stages_of(decoder_source(CONFIG), 3)
    assert [dict(stage) for stage in stages] == [
        {"before": 1, "layer": 2},
        {"layer": 2},
        {"layer": 2, "behind": 1},
    ]


def test_where_layers_do_not_divide_embedding_and_head_count_as_layers():
    stages = stages_of(decoder_source(CONFIG), 4)
    assert [dict(stage) for stage in stages] == [
        {"before": 1, "layer": 1},
        {"layer": 2},
        {"layer": 2},
        {"layer": 1, "behind": 1},
    ]


def test_a_batch_is_spread_over_copies_and_micro_batches():
    plan = ParallelPlan(dp=2, fsdp=4, cp=2, tp=2)
    spread = spread_of(replace(JOB, micro_batch_size=2), plan, 32)
    assert (spread.copies, spread.num_micro_batches, spread.sequences) == (8, 4, 1.0)


@pytest.mark.parametrize(
    ("plan", "job", "message"),
    [
        (
            ParallelPlan(fsdp=4),
            JOB,
            "= 4, but the world has 32 ranks. Set",
        ),
        (
            ParallelPlan(fsdp=4, tp=3, pp=2),
            JOB,
            r"1 \* 3 \* 2 = 6 does not divide 32: choose plan.tp \(now 3\) from 1, 2, 4, 8, 16\.$",
        ),
        (
            ParallelPlan(cp=8, tp=8),
            JOB,
            r"choose plan.cp \(now 8\) from 1, 2, 4, or plan.tp \(now 8\) from 1, 2, 4\.$",
        ),
        (
            ParallelPlan(tp=3, pp=5),
            JOB,
            r"choose plan.cp \* plan.tp \* plan.pp from 1, 2, 4, 8, 16, 32\.$",
        ),
        (
            ParallelPlan(fsdp=32),
            replace(JOB, batch_size=24),
            "cannot be parted among dp",
        ),
        (
            ParallelPlan(fsdp=4, cp=8),
            replace(JOB, sequence_length=4100),
            "over cp=8. Choose cp from 1, 2, 4, 5, 10, or a sequence_length that 8 divides.$",
        ),
        (
            ParallelPlan(fsdp=4, cp=4, tp=2, sp=True),
            replace(JOB, sequence_length=4100),
            r"over cp=4 and tp=2 \(sp\). Choose cp from 1, 2, 5, or sp=False, or a sequence_length "
            "that 8 divides.$",
        ),
        (
            ParallelPlan(fsdp=2, cp=2, tp=8, sp=True),
            replace(JOB, sequence_length=4104),
            r"tp=8 \(sp\). Choose cp from 1, 3, or tp from 2, 3, 4, 6, 9, 12, or sp=False, or",
        ),
    ],
)
def test_a_number_that_does_not_divide_is_named_with_what_to_do(plan, job, message):
    with pytest.raises(PlanError, match=message):
        spread_of(job, plan, 32)


def test_experts_are_shared_by_a_divisor_of_their_number():
    experts = ExpertSettings(num_experts=8, experts_per_token=2, intermediate_size=64)
    source = decoder_source(replace(CONFIG, family="mixtral", experts=experts))
    check_model(source, ParallelPlan(fsdp=8, ep=4))
    with pytest.raises(PlanError, match="Choose ep from 1, 2, 4, 8"):
        check_model(source, ParallelPlan(fsdp=48, ep=16))
    with pytest.raises(PlanError, match="has none"):
        check_model(decoder_source(CONFIG), ParallelPlan(fsdp=8, ep=4))


def test_more_stages_than_layers_are_refused():
    with pytest.raises(PlanError, match="Choose at most 8 stages"):
        check_model(decoder_source(CONFIG), ParallelPlan(pp=16))


@pytest.mark.parametrize(
    "setting",
    [
        {"batch_size": 0},
        {"offload": 1.5},
        {"expert_load": 0.5},
        {"optimizer_bytes": -1},
        {"expert_percentile": 100.0},
        {"expert_percentile": 90.0, "expert_load": 1.5},
    ],
)
def test_a_job_checks_its_numbers(setting):
    with pytest.raises(ConfigError):
        replace(JOB, **setting)
