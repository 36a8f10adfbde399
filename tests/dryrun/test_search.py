import pytest

from plait.cost.accelerators import find_cluster
from plait.dryrun.job_report import search_json, search_report
from plait.dryrun.legal_plans import Candidate, candidates, describe
from plait.dryrun.model_source import decoder_source
from plait.dryrun.pretrain_job import PretrainJob
from plait.dryrun.price_job import Pricer, with_plan
from plait.dryrun.search import search
from plait.errors import PlanError
from plait.models.decoder_config import DecoderConfig

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
    return candidates(JOB, decoder_source(CONFIG), WORLD, ranks_per_node=8, micro_batch_sizes=ONE)


def test_the_best_plans_come_first_and_fit(result):
    steps = [each.price.step_s for each in result.best]
    assert result.is_complete
    assert len(steps) == 10
    assert steps == sorted(steps)
    assert all(each.price.peak_bytes <= LIMIT for each in result.best)


def test_every_legal_plan_is_priced_or_rejected_with_a_reason(result, cluster):
    legal = [each for each in legal_plans() if isinstance(each, Candidate)]
    assert result.num_candidates == len(legal) == len(set(legal))
    of_memory = sum(
        count
        for reason, count in result.rejected.items()
        if "exceed" in reason or "pipeline" in reason
    )
    assert of_memory > 0
    assert result.num_priced >= len(legal) - sum(result.rejected.values())
    assert set(result.examples) == set(result.rejected)


def test_no_plan_that_fits_is_better_than_the_best(result, cluster):
    pricer = Pricer(JOB, cluster, decoder_source(CONFIG))
    for each in legal_plans():
        if isinstance(each, Candidate) and each.micro_batch_size == 1 and each.plan.pp == 1:
            price = pricer.price(with_plan(JOB, each.plan, 1))
            assert price.peak_bytes > LIMIT or price.step_s >= result.best[0].price.step_s


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


def test_a_search_that_is_asked_to_stop_ends_before_the_next_plan(cluster):
    asked = iter(range(1_000_000))
    got = search(JOB, cluster, micro_batch_sizes=ONE, should_stop=lambda: next(asked) == 12)
    assert not got.is_complete
    assert got.num_priced + sum(got.rejected.values()) >= 12
    assert next(asked) == 13


def test_a_cluster_too_small_for_any_plan_says_how_much_is_missing(cluster):
    with pytest.raises(PlanError, match=r"no plan of small fits 4 ranks.*The nearest needs"):
        search(JOB, cluster, memory_bytes=2**29, micro_batch_sizes=ONE)
