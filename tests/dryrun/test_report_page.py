"""The page of one rank's price."""

import re

import pytest
import torch

import plait
from plait.dryrun.price_step import price_step
from plait.dryrun.report import Titled
from plait.dryrun.report_page import page
from tests.dryrun.browser import laid_out


@pytest.fixture(scope="module")
def titled():
    with torch.device("meta"):
        model = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(4)))
        x = torch.empty((64, 256))
    price = price_step(
        model,
        [x],
        plait.ParallelPlan(dp=2),
        plait.clusters.h100(2),
        loss=lambda model, x: model(x).square().mean(),
        optimizer=torch.optim.AdamW(model.named_parameters(), fused=True),
    )
    return Titled(title="four <layers> & a loss", price=price, num_ranks=2, tokens=64)


def test_a_page_has_every_part_and_needs_nothing_from_elsewhere(titled):
    found = page(titled)
    for part in ("figures", "streams", "memory", "ledger", "largest"):
        assert re.search(f"id=['\"]{part}['\"]", found), part
    assert "http" not in found.replace("http://www.w3.org/2000/svg", "")
    assert "four &lt;layers&gt; &amp; a loss" in found
    assert "bound by" in found


@pytest.mark.slow
def test_chromium_shows_the_streams_and_memory_within_the_page(titled, tmp_path):
    shown, width = laid_out(page(titled), tmp_path)
    streams = shown[shown.index('id="streams"') : shown.index('id="memory"')]
    # Operators that take a picture's while, and the messages of dp in a row of their own.
    assert streams.count("<rect") > 10
    assert "communication" in streams
    line = re.search(r'id="memory".*?<path d="([^"]+)" fill="none"', shown, re.DOTALL)[1]
    assert line.count("H") > 20  # a step for each operator
    ledger = shown[shown.index('id="ledger"') : shown.index('id="largest"')]
    for kind in ("parameters", "gradients", "optimizer state"):
        assert kind in ledger
    assert width <= 1100
