"""Which rule each module gets, and what is refused."""

import pytest
import transformers
from torch import nn

from plait.errors import PlanError
from plait.plan.find_rules import find_rules
from plait.plan.parallel_plan import ParallelPlan
from plait.plan.rules import Rule, Style
from tests.graph.spread_models import MODELS, SHAPE, hugging_face, own

TP = ParallelPlan(tp=2)
SP = ParallelPlan(tp=2, sp=True)


@pytest.mark.parametrize("name", MODELS)
def test_every_module_with_parameters_has_a_rule(name):
    model = MODELS[name]()
    found = find_rules(model, SP)
    owners = {n for n, m in model.named_modules() if list(m.parameters(recurse=False))}
    assert owners <= found.keys()
    num_rows = sum(rule.style is Style.ROW for rule in found.values())
    assert num_rows == {"mixtral": 2, "our_mixtral": 2, "our_deepseek_v3": 3}.get(name, 4)


def test_products_of_llama_follow_its_own_plan():
    model = hugging_face("Llama")
    found = find_rules(model, TP)
    for pattern, style in model.config.base_model_tp_plan.items():
        ours = found[f"model.{pattern.replace('*', '1')}"].style
        assert ours is {"colwise": Style.COLUMN, "rowwise": Style.ROW}[style]


def test_a_base_model_has_the_same_rules_without_the_prefix():
    config = transformers.LlamaConfig(**SHAPE)
    found = find_rules(transformers.LlamaModel(config), TP)
    assert found["layers.0.mlp.down_proj"] == Rule(Style.ROW)


def test_fused_layers_name_their_sections():
    found = find_rules(MODELS["phi3"](), TP)
    assert found["model.layers.0.self_attn.qkv_proj"].sections == (64, 32, 32)
    assert found["model.layers.0.mlp.gate_up_proj"].sections == (96, 96)
    found = find_rules(MODELS["gpt2"](), TP)
    assert found["transformer.h.0.attn.c_attn"].sections == (64, 64, 64)


def test_an_unlisted_family_follows_its_own_plan_for_products_only():
    model = hugging_face("Qwen2")
    found = find_rules(model, TP)
    assert found["model.layers.0.self_attn.q_proj"].style is Style.COLUMN
    assert found["model.layers.0.input_layernorm"].style is Style.WHOLE
    with pytest.raises(
        PlanError, match=r"no rule: model.embed_tokens, model.layers.0.input_layern"
    ):
        find_rules(model, SP)


def test_a_module_beside_shared_products_is_not_taken_for_whole():
    model = hugging_face("Qwen2")
    model.model.layers[1].self_attn.extra_norm = nn.LayerNorm(8)
    with pytest.raises(
        PlanError, match=r"no rule: model.layers.1.self_attn.extra_norm. Give rules"
    ):
        find_rules(model, TP)


def test_a_style_that_plait_lacks_is_refused_by_name():
    model = hugging_face("Qwen2")
    model.config.base_model_tp_plan = {"layers.*.mlp.down_proj": "rowwise_split_input"}
    with pytest.raises(PlanError, match="in the style 'rowwise_split_input', which Plait does not"):
        find_rules(model, TP)


@pytest.mark.parametrize(
    ("make", "tp", "message"),
    [
        (own, 8, "tp=8 does not divide num_kv_heads=4. Choose tp from 1, 2, 4."),
        (own, 3, "tp=3 does not divide num_heads=8, num_kv_heads=4. Choose tp from 1, 2, 4."),
        (
            lambda: hugging_face("Llama", intermediate_size=90),
            4,
            "tp=4 does not divide intermediate_size=90. Choose tp from 1, 2.",
        ),
    ],
    ids=["kv heads", "heads", "width"],
)
def test_a_tp_that_divides_not_is_refused_with_the_legal_ones(make, tp, message):
    with pytest.raises(PlanError) as raised:
        find_rules(make(), ParallelPlan(tp=tp))
    assert message in str(raised.value)


def test_an_unknown_model_is_told_what_rules_to_give():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.raises(
        PlanError, match=r"no rules for Sequential.*parameters: 0, 1; styles: whole"
    ):
        find_rules(model, TP)
    with pytest.raises(PlanError, match="parameters but no rule: 1"):
        find_rules(model, TP, rules={"0": "column"})
    found = find_rules(model, TP, rules={"0": "column", "1": Style.ROW})
    assert found == {"0": Rule(Style.COLUMN), "1": Rule(Style.ROW)}


def test_mistakes_in_the_users_rules_are_named():
    with pytest.raises(PlanError, match=r"names no style: 'colum'. Did you mean 'column'"):
        find_rules(own(), TP, rules={"layers.*.mlp.up_proj": "colum"})
    with pytest.raises(
        PlanError, match=r"'layers.up_proj' matches no module. Did you mean 'layers"
    ):
        find_rules(own(), TP, rules={"layers.up_proj": "column"})
    with pytest.raises(PlanError, match="the head of a Decoder must be 'whole'"):
        find_rules(own(), TP, rules={"lm_head": "column_gathered"})


def test_the_loss_of_a_router_is_refused_under_sp():
    model = hugging_face("Mixtral", num_local_experts=4, output_router_logits=True)
    assert find_rules(model, TP)
    with pytest.raises(PlanError, match="a rank routes its own tokens only"):
        find_rules(model, SP)
