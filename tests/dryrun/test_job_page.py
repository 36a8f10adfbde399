import re
from html.parser import HTMLParser

import pytest

from plait.cost.accelerators import find_cluster
from plait.dryrun.job_page import bytes_over_time, job_page
from plait.dryrun.pretrain_job import PretrainJob
from plait.dryrun.price_job import price_job
from plait.plan.parallel_plan import ParallelPlan, Pipeline
from tests.dryrun.browser import laid_out
from tests.dryrun.small_job import CONFIG

PLAN = ParallelPlan(tp=2, sp=True, pp=4, fsdp=2, pipeline=Pipeline.INTERLEAVED, stages_per_rank=2)
JOB = PretrainJob(name="small", model=CONFIG, plan=PLAN, sequence_length=1024, batch_size=16)


@pytest.fixture(scope="module")
def price():
    return price_job(JOB, find_cluster("h100", 16))


@pytest.fixture(scope="module")
def page(price):
    return job_page(price, dollars_per_rank_hour=2.0)


def test_memory_over_time_peaks_at_the_ledger_and_ends_at_what_is_always_there(price):
    points = bytes_over_time(price)
    kinds = price.fullest.ledger.bytes_by_kind
    assert max(size for _, size in points) == pytest.approx(price.peak_bytes, rel=1e-6)
    rest = price.peak_bytes - kinds["saved activations"]
    assert points[0][1] == rest
    assert points[-1][1] == pytest.approx(rest, rel=1e-6)
    assert [time_s for time_s, _ in points] == sorted(time_s for time_s, _ in points)


def test_a_split_backward_frees_what_it_saved_too():
    plan = ParallelPlan(pp=4, fsdp=4, pipeline=Pipeline.ZBV, stages_per_rank=2)
    price = price_job(
        PretrainJob(name="zbv", model=CONFIG, plan=plan, sequence_length=1024, batch_size=32),
        find_cluster("h100", 16),
    )
    assert bytes_over_time(price)[-1][1] < price.peak_bytes


def test_a_page_has_every_part_and_needs_nothing_from_elsewhere(page):
    for part in ("figures", "parts", "streams", "pipeline", "memory", "ledger", "largest"):
        assert re.search(f"id=['\"]{part}['\"]", page), part
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    for word in ("bound by", "embed_tokens.weight", "a layer, backward", "billion tokens"):
        assert word in page


class _Boxes(HTMLParser):
    def __init__(self):
        super().__init__()
        self.inside = ""
        self.counts = {}

    def handle_starttag(self, tag, attrs):
        named = dict(attrs).get("id")
        if named:
            self.inside = named
        if tag == "rect":
            self.counts[self.inside] = self.counts.get(self.inside, 0) + 1


@pytest.mark.slow
def test_chromium_shows_a_box_for_each_task_and_stays_within_the_page(page, price, tmp_path):
    shown, width = laid_out(page, tmp_path)
    found = _Boxes()
    found.feed(shown)
    tasks = sum(len(tasks) for tasks in price.run.table.tasks)
    assert found.counts["pipeline"] == tasks
    assert found.counts["parts"] == len(price.parts.shares())
    assert found.counts["streams"] > 20
    assert width <= 1100
