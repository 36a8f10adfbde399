"""The recipes, spelled out: a change of a resolved job must be meant."""

import json
from pathlib import Path

import pytest
import torch

from plait.config import from_json, to_json
from plait.models.decoder import Decoder
from plait.recipes.catalog import RECIPES, find_recipe

GOLDEN = Path(__file__).with_name("golden")


@pytest.mark.parametrize("name", RECIPES)
def test_the_resolved_job_is_the_golden_one(name):
    assert to_json(find_recipe(name)) == json.loads((GOLDEN / f"{name}.json").read_text())


@pytest.mark.parametrize("name", RECIPES)
def test_a_resolved_job_comes_back_as_the_same_job(name):
    job = find_recipe(name)
    assert from_json(type(job), to_json(job)) == job


def test_stdlib_15m_has_about_15_million_parameters():
    with torch.device("meta"):
        model = Decoder(find_recipe("stdlib_15m").model)
    assert 14e6 < sum(p.numel() for p in model.parameters()) < 16e6
