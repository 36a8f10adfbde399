"""`plait.price_step` of what users bring: their own modules, transformers' models, experts."""

import pytest
import torch
import transformers
from torch import nn

import plait
from plait.cost.clusters import h100
from plait.errors import GraphError, PlanError

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 128,
    "use_cache": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def on_meta(name, **changes):
    config = getattr(transformers, name).config_class(**{**SMALL, **changes})
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
        return model, torch.zeros(2, 32, dtype=torch.long)


def labelled(model, tokens):
    return model(input_ids=tokens, labels=tokens).loss


def stepped(model, inputs, plan=None, cluster=None, **settings):
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    return plait.price_step(
        model,
        inputs,
        plan or plait.ParallelPlan(),
        cluster or h100(1),
        **{"loss": labelled, "optimizer": optimizer, "fragments": False, **settings},
    )


def kind_bytes(price, kind):
    return sum(each.num_bytes for each in price.trace.storages if each.kind == kind)


def test_an_unmodified_transformers_model_is_priced_whole_and_in_parts():
    model, tokens = on_meta("LlamaForCausalLM")
    num_bytes = sum(p.numel() * 4 for p in model.parameters())
    whole = stepped(model, [tokens])
    parted = stepped(model, [tokens], plait.ParallelPlan(fsdp=4), h100(4))
    assert kind_bytes(whole, "parameters") >= num_bytes
    assert kind_bytes(parted, "optimizer state") < kind_bytes(whole, "optimizer state") / 3
    assert parted.communication_s > whole.communication_s == 0
    assert whole.low_s < whole.step_s < whole.high_s


def test_experts_of_transformers_are_priced_by_the_tokens_that_they_see():
    # Each token goes to two experts of four or to one: balanced, whoever they are.
    two, tokens = on_meta("MixtralForCausalLM", num_local_experts=4, num_experts_per_tok=2)
    one, _ = on_meta("MixtralForCausalLM", num_local_experts=4, num_experts_per_tok=1)
    of_two, of_one = (stepped(each, [tokens]).flops for each in (two, one))
    products = 6 * 3 * 64 * 128 * tokens.numel() * 2  # three matrices, two layers
    assert of_two - of_one == pytest.approx(products, rel=0.01)


class Selection(nn.Module):
    def __init__(self, choose):
        super().__init__()
        self.layer, self.choose = nn.Linear(8, 8), choose

    def forward(self, x):
        return self.choose(self.layer(x))


@pytest.mark.parametrize(
    "choose",
    [
        lambda y: y[y.sum(-1) > 0],
        lambda y: y.index_select(0, torch.nonzero(y[:, 0] > 0)[:, 0]),
    ],
    ids=["mask", "nonzero"],
)
def test_sizes_that_depend_on_data_ask_for_a_bound(choose):
    with pytest.raises(GraphError, match=r"depends on the data.* Give it a bound"):
        plait.price_step(
            Selection(choose),
            [torch.zeros(4, 8)],
            plait.ParallelPlan(),
            plait.clusters.cpu(),
            loss=lambda model, x: model(x).sum(),
        )


def test_inputs_that_are_no_list_are_explained():
    with pytest.raises(PlanError, match=r"inputs is a tensor. Give a list .* \[tensor\]"):
        plait.price_step(
            nn.Linear(8, 8),
            torch.zeros(4, 8),
            plait.ParallelPlan(),
            plait.clusters.cpu(),
            loss=lambda model, x: model(x).sum(),
        )
