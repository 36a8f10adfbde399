from dataclasses import replace

import pytest

from plait.cost.accelerators import find_cluster
from plait.dryrun.inference import price_inference
from plait.errors import PlanError
from plait.recipes.pretrain import PRETRAIN_RECIPES, find_pretrain_recipe

SMALL = replace(find_pretrain_recipe("llama2_7b").model, num_layers=8)


def test_a_token_takes_at_least_the_reading_of_all_weights():
    cluster = find_cluster("h100", 8)
    for tp in (1, 8):
        price = price_inference(SMALL, cluster, tp=tp)
        read_s = price.weight_bytes / cluster.device.memory_bandwidth_bytes_per_s
        assert price.per_token_s > 0.8 * read_s


def test_a_prompt_takes_at_least_its_products_at_the_peak():
    cluster = find_cluster("h100", 1)
    price = price_inference(SMALL, cluster, prompt_tokens=2048)
    weights = 8 * (4 * 4096**2 + 3 * 4096 * 11_008)
    least_s = 2 * 2048 * weights / 989e12
    assert least_s < price.first_token_s < 4 * least_s


def test_the_cache_grows_with_requests_and_tokens_and_shrinks_with_tp():
    cluster = find_cluster("h100", 8)
    one = price_inference(SMALL, cluster, prompt_tokens=100, answer_tokens=100)
    assert one.cache_bytes == 2 * 2 * 8 * 32 * 128 * 200
    four = price_inference(SMALL, cluster, tp=8, batch_size=4, prompt_tokens=100, answer_tokens=100)
    assert four.cache_bytes == one.cache_bytes * 4 / 8


def test_a_model_that_does_not_fit_is_refused_with_what_it_needs():
    with pytest.raises(PlanError, match=r"weights.*Choose a larger tp"):
        price_inference(find_pretrain_recipe("llama2_70b").model, find_cluster("h100", 8))
    with pytest.raises(PlanError, match="needs as many ranks"):
        price_inference(SMALL, find_cluster("h100", 2), tp=4)


@pytest.mark.parametrize("name", PRETRAIN_RECIPES)
def test_recipes_of_published_models_have_the_parameters_their_names_say(name):
    from plait.dryrun.model_source import decoder_source

    billions = {
        "llama2_7b": 6.74,
        "llama2_70b": 68.98,
        "llama3_8b": 8.03,
        "llama3_70b": 70.55,
        "llama3_405b": 405.85,
        "gpt3_175b": 175.2,
        "mixtral_8x7b": 46.7,
        "deepseek_v3": 671.0,
    }
    job = find_pretrain_recipe(name)
    source = decoder_source(job.model)
    kinds = list(source.kind_layers)
    model = source.make(kinds, source.vocab_size)
    one = {
        kind: sum(p.numel() for p in layer.parameters())
        for kind, layer in zip(dict.fromkeys(source.kinds), model.layers, strict=True)
    }
    rest = sum(p.numel() for p in model.parameters()) - sum(one.values())
    total = rest + sum(one[kind] for kind in source.kinds)
    assert total / 1e9 == pytest.approx(billions[name], rel=0.006)
