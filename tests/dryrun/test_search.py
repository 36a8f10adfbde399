from dataclasses import replace

import pytest
import torch

from plait.cost.accelerators import find_cluster
from plait.cost.table import Table
from plait.dryrun.job_report import search_json, search_report
from plait.dryrun.legal_plans import Candidate, Choices, candidates, describe
from plait.dryrun.model_source import decoder_source, module_source
from plait.dryrun.pretrain_job import PretrainJob
from plait.dryrun.price_job import Pricer, with_plan
from plait.dryrun.search import least_offload, search
from plait.errors import PlanError
from plait.models.decoder_config import DecoderConfig
from plait.plan.parallel_plan import ParallelPlan, Pipeline, Recompute

CONFIG = DecoderConfig(
    vocab_size=4096,
    hidden_size=1024,
    intermediate_size=2816,
    num_layers=6,
    num_heads=8,
    num_kv_heads=4,
    head_size=128,
    max_positions=2048,
)
JOB = PretrainJob(name="small", model=CONFIG, sequence_length=2048, batch_size=32)
JOB_OF_TWO_STAGES = replace(JOB, plan=ParallelPlan(pp=2, fsdp=2))
WORLD = 4
ONE = (1,)
LIMIT = 19 * 2**30 // 10  # a quarter of the plans need more


@pytest.fixture(scope="module")
def cluster():
    return find_cluster("h100", WORLD)


@pytest.fixture(scope="module")
def result(cluster):
    return search(JOB, cluster, memory_bytes=LIMIT, micro_batch_sizes=ONE)


def legal_plans():
    choices = Choices(micro_batch_sizes=ONE)
    found = candidates(JOB, decoder_source(CONFIG), WORLD, ranks_per_node=8, choices=choices)
    return [each for each in found if isinstance(each, Candidate)]


def job_of(candidate):
    return replace(with_plan(JOB, candidate.plan, 1), offload=candidate.offload)


def test_the_best_plans_come_first_and_fit(result):
    steps = [each.price.step_s for each in result.best]
    assert result.is_complete
    assert len(steps) == 10
    assert steps == sorted(steps)
    assert all(each.price.peak_bytes <= LIMIT for each in result.best)


def test_what_is_fixed_every_plan_has_and_the_others_say_so(cluster):
    fixed = {"tp": 2, "recompute": Recompute.FULL}
    found = search(JOB, cluster, micro_batch_sizes=ONE, fixed=fixed)
    assert found.best
    for each in found.best:
        plan = each.candidate.plan
        assert (plan.tp, plan.recompute) == (2, Recompute.FULL)
    assert found.rejected["not tp=2, which is fixed"] > 0
    assert found.rejected["not recompute=full, which is fixed"] > 0
    with pytest.raises(PlanError, match=r"plan.causal_split cannot be fixed.* tp, pp"):
        search(JOB, cluster, fixed={"causal_split": True})
    with pytest.raises(PlanError, match=r"no plan .*not tp=3, which is fixed"):
        search(JOB, cluster, micro_batch_sizes=ONE, fixed={"tp": 3})


def test_what_is_not_tried_is_listed_with_the_setting_that_tries_it(cluster, result):
    listed = " ".join(result.not_tried)
    assert "plan.recompute=alternate" in listed
    assert listed in " ".join(search_report(result).split())
    assert search_json(result)["not_tried"] == result.not_tried
    for fixed in (
        {"pp": 2, "pipeline": Pipeline.GPIPE, "recompute": Recompute.ALTERNATE},
        {"pp": 2, "pipeline": Pipeline.DUAL_PIPE_V},
        {"pp": 2, "stages_per_rank": 3, "recompute": "alternate"},
    ):
        found = search(JOB, cluster, micro_batch_sizes=ONE, fixed=fixed, top=3)
        for each in found.best:
            plan = each.candidate.plan
            assert {name: getattr(plan, name) for name in fixed} == fixed
        for name in fixed.keys() - {"pp"}:
            assert f"plan.{name}={fixed[name]}" not in " ".join(found.not_tried)


def test_plans_that_recompute_all_are_tried_with_half_of_it(cluster):
    found = search(JOB, cluster, memory_bytes=17 * 2**30 // 10, micro_batch_sizes=ONE, top=3)
    by_policy = {each.candidate.plan.recompute: each.price for each in found.best}
    full, half = by_policy[Recompute.FULL], by_policy[Recompute.ALTERNATE]
    assert half.step_s < full.step_s
    assert half.peak_bytes > full.peak_bytes
    lacking = search(JOB, cluster, memory_bytes=3 * 2**29, micro_batch_sizes=ONE, top=3)
    assert lacking.rejected["recompute alternate: the ledger exceeds the memory"] > 0


def test_a_plan_that_a_model_cannot_have_is_rejected_and_the_others_are_priced(cluster):
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = torch.nn.Linear(256, 512), torch.nn.Linear(512, 256)

        def forward(self, x):
            return x + self.down(self.up(x).relu())

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(512, 256)
            self.layers = torch.nn.ModuleList(Layer() for _ in range(4))
            self.head = torch.nn.Linear(256, 512)

        def forward(self, tokens_BT):
            x = self.embed(tokens_BT)
            for layer in self.layers:
                x = layer(x)
            return self.head(x)

    def loss(model, tokens_BT):
        return model(tokens_BT).logsumexp(-1).mean()

    source = module_source(Model(), loss=loss, hidden_size=256, vocab_size=512)
    job = PretrainJob(name="own", sequence_length=1024, batch_size=32)
    found = search(job, cluster, source=source, micro_batch_sizes=ONE, top=2)
    assert all(each.candidate.plan.tp == 1 for each in found.best)
    (reason,) = (each for each in found.rejected if "cannot be parted over tp" in each)
    assert "share_head=False" in reason


def test_more_memory_than_the_device_has_is_refused(cluster):
    with pytest.raises(PlanError, match=r"100.0 GiB, but h100 has 74.5"):
        search(JOB, cluster, memory_bytes=100 * 2**30)


def test_a_search_takes_the_times_of_a_table(result, cluster):
    device = cluster.device
    slow = replace(
        device,
        peak_flops_per_s={dtype: each / 3 for dtype, each in device.peak_flops_per_s.items()},
    )
    table = Table("an H100 at a third of its clock", (), slow)
    found = search(JOB, cluster, memory_bytes=LIMIT, micro_batch_sizes=ONE, top=1, table=table)
    assert found.best[0].price.step_s > 1.5 * result.best[0].price.step_s
    with pytest.raises(PlanError, match="measured on h100"):
        search(JOB, find_cluster("a100", WORLD), table=table)


def test_every_legal_plan_is_priced_or_rejected_with_a_reason(result, cluster):
    legal = legal_plans()
    assert result.num_candidates == len(legal) == len(set(legal))
    of_memory = sum(
        count
        for reason, count in result.rejected.items()
        if "exceed" in reason or "pipeline" in reason
    )
    assert of_memory > 0
    assert result.num_priced >= len(legal) - sum(result.rejected.values())
    assert set(result.examples) == set(result.rejected)


def test_no_plan_that_fits_is_better_than_those_listed(result, cluster):
    """Against the exact price of every plan: shares of sequences captured, pipelines whole."""
    tight = replace(cluster, device=replace(cluster.device, memory_bytes=LIMIT))
    pricer = Pricer(JOB, tight, decoder_source(CONFIG))
    listed = {each.candidate: each.price.step_s for each in result.best}
    num_priced, shares = 0, 0
    for each in legal_plans():
        try:
            price = pricer.price(job_of(each), fragments=False)
        except PlanError:
            assert each.plan.pp > 1  # what PyTorch has no table for
            continue
        num_priced += 1
        shares += each.plan.cp > 1
        assert price.peak_bytes > LIMIT or price.step_s >= result.best[0].price.step_s
        if each in listed:
            assert price.step_s == listed[each]
        elif price.fits and price.step_s < result.best[-1].price.step_s:
            assert not pricer.price(job_of(each)).fits, "without room for the allocator's fragments"
    assert num_priced > len(legal_plans()) / 2
    assert shares > 10
    assert all(each.is_exact for each in result.best)


@pytest.mark.slow
def test_no_plan_with_replicas_or_without_sp_is_better_than_the_best(result, cluster):
    pricer = Pricer(JOB, cluster, decoder_source(CONFIG))
    plans = [each.plan for each in legal_plans() if each.plan.tp == each.plan.fsdp == 2]
    plans = [plan for plan in plans if plan.recompute is Recompute.NONE]
    variants = [replace(plan, replicas=n) for plan in plans for n in (2, 3, 4)]
    variants += [replace(plan, sp=False) for plan in plans]
    assert len(variants) == 4 * 2  # with and without reshard
    for plan in variants:
        price = pricer.price(job_of(Candidate(plan, 1)), fragments=False)
        assert price.peak_bytes > LIMIT or price.step_s >= result.best[0].price.step_s


def test_zero_bubble_schedules_of_every_number_of_stages_are_legal_plans():
    of_two = [each.plan for each in legal_plans() if each.plan.pp == 2]
    stages = {p.stages_per_rank for p in of_two if p.pipeline is Pipeline.ZERO_BUBBLE}
    assert stages == {1, 2, 4}  # eight on each of two ranks are more than six layers and two
    assert {p.pipeline for p in of_two} == {
        *(Pipeline.ONE_F_ONE_B, Pipeline.INTERLEAVED, Pipeline.ZERO_BUBBLE, Pipeline.ZBV)
    }


@pytest.mark.slow
def test_the_best_plans_are_tried_with_replicas_and_without_sp():
    found = search(JOB, find_cluster("h100", 2), micro_batch_sizes=ONE, top=100)
    spread = [each.candidate for each in found.best if each.candidate.plan.tp > 1]
    assert {each.plan.replicas for each in spread} == {1, 2, 3, 4}
    assert {each.plan.sp for each in spread} == {True, False}
    for words in ("replicas 3", "replicas 4", "without sp"):
        assert any(words in describe(each) for each in spread)


@pytest.mark.slow
def test_a_plan_that_lacks_memory_offloads_the_least_that_makes_it_fit(result, cluster):
    found = search(JOB, cluster, memory_bytes=LIMIT, micro_batch_sizes=ONE, can_offload=True)
    assert all(each.candidate.offload == 0 for each in result.best)
    assert found.num_priced > result.num_priced
    assert found.best[0].price.step_s <= result.best[0].price.step_s
    moved = [each for each in found.best if each.candidate.offload]
    assert moved
    tight = replace(cluster, device=replace(cluster.device, memory_bytes=LIMIT))
    pricer = Pricer(JOB, tight, decoder_source(CONFIG))
    for each in moved:
        assert each.price.peak_bytes <= LIMIT
        assert "wait in the host's memory" in each.price.notes[-1]
        assert f"offload {each.candidate.offload:.0%}" in describe(each.candidate)
        less = replace(each.candidate, offload=round(each.candidate.offload - 0.05, 2))
        assert not pricer.price(job_of(less)).fits


def test_the_least_offload_is_that_of_the_fullest_rank_in_twentieths(cluster):
    classes = Pricer(JOB, cluster, decoder_source(CONFIG)).planned(JOB_OF_TWO_STAGES).classes()
    totals = [each.ledger.total_bytes for each in classes]
    kept = max(classes, key=lambda each: each.ledger.total_bytes).ledger.bytes_by_kind
    assert least_offload(classes, max(totals), offload=0.0) == 0.0
    lack = round(0.12 * kept["saved activations"])
    assert least_offload(classes, max(totals) - lack, offload=0.0) == 0.15
    assert least_offload(classes, kept["context"], offload=0.0) == 1.0
    assert least_offload(classes, max(totals), offload=0.4) == 0.4


def test_two_plans_are_explained_part_by_part(result):
    text = result.explain(1, 2)
    assert describe(result.best[0].candidate) in text
    assert "matrix products" in text
    assert "saved activations" in text
    with pytest.raises(PlanError, match="the plans are 1 to 10"):
        result.explain(1, 11)


def test_a_report_has_plans_reasons_and_what_binds(result):
    text = search_report(result)
    assert "rejected" in text
    assert "the best is bound by" in text
    found = search_json(result)
    assert len(found["best"]) == 10
    assert found["rejected"][0]["count"] >= 1


def test_an_interrupted_search_returns_the_best_so_far(cluster):
    def interrupt(text):
        if "plans, best" in text:
            raise KeyboardInterrupt

    got = search(JOB, cluster, micro_batch_sizes=ONE, on_progress=interrupt)
    assert not got.is_complete
    assert 0 < len(got.best) <= 10


def test_a_search_that_is_stopped_at_its_very_end_loses_nothing(cluster, result):
    judged = []

    def should_stop():
        return bool(judged) and next(judged[0]) == 3

    def tell(text):
        if "allocator" in text:
            judged.append(iter(range(10)))

    got = search(
        JOB,
        cluster,
        memory_bytes=LIMIT,
        micro_batch_sizes=ONE,
        on_progress=tell,
        should_stop=should_stop,
    )
    assert not got.is_complete
    assert len(got.best) == 10
    assert got.best[0].candidate == result.best[0].candidate


def test_a_search_that_is_asked_to_stop_ends_before_the_next_plan(cluster):
    asked = iter(range(1_000_000))
    got = search(JOB, cluster, micro_batch_sizes=ONE, should_stop=lambda: next(asked) == 12)
    assert not got.is_complete
    assert got.num_priced + sum(got.rejected.values()) >= 12
    assert next(asked) == 13


def test_a_cluster_too_small_for_any_plan_says_how_much_is_missing(cluster):
    with pytest.raises(PlanError, match=r"no plan of small fits 4 ranks.*The nearest needs"):
        search(JOB, cluster, memory_bytes=2**29, micro_batch_sizes=ONE)
