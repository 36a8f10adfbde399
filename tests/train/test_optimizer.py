"""The schedule, the parameter groups, and the optimizer's state."""

from itertools import pairwise

import pytest
import torch

from plait.errors import ConfigError
from plait.models.decoder import Decoder, DecoderConfig
from plait.train.optimizer import (
    OptimizerSettings,
    make_optimizers,
    optimizer_leaves,
    restore_optimizers,
)

TINY = DecoderConfig(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=24,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_size=8,
    max_positions=32,
)


def test_the_rate_rises_linearly_then_falls_as_a_cosine():
    settings = OptimizerSettings(learning_rate=1.0, warmup_steps=10, final_fraction=0.1)
    rates = [settings.learning_rate_at(step, 110) for step in range(111)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55)
    assert rates[110] == pytest.approx(0.1)
    assert all(a > b for a, b in pairwise(rates[10:]))


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": 0.0},
        {"clip_norm": -1.0},
        {"warmup_steps": -1},
        {"beta2": 1.0},
        {"final_fraction": 2.0},
    ],
)
def test_settings_out_of_range_are_refused(change):
    with pytest.raises(ConfigError):
        OptimizerSettings(**change)


def _train(model, optimizers, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        tokens = torch.randint(0, 50, (2, 9), generator=generator)
        model.logits(model(tokens)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def _fresh(kind):
    model = Decoder(TINY)
    model.initialize(torch.Generator().manual_seed(0))
    return model, make_optimizers(model, OptimizerSettings(kind=kind))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_parameter_belongs_to_one_optimizer(kind):
    model, optimizers = _fresh(kind)
    owned = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(map(id, owned)) == sorted(map(id, model.parameters()))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_restored_optimizers_go_on_bit_for_bit(kind):
    (first, first_optimizers), (second, second_optimizers) = _fresh(kind), _fresh(kind)
    _train(first, first_optimizers, 3, seed=1)
    second.load_state_dict(first.state_dict())
    leaves = {k: v.clone() for k, v in optimizer_leaves(first, first_optimizers).items()}
    restore_optimizers(second, second_optimizers, leaves)
    _train(first, first_optimizers, 3, seed=2)
    _train(second, second_optimizers, 3, seed=2)
    for ours, theirs in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_adamw_updates_as_the_formula_says():
    model, optimizers = _fresh("adamw")
    weight, norm = model.lm_head.weight, model.norm.weight
    before = {name: p.detach().clone() for name, p in (("weight", weight), ("norm", norm))}
    model.logits(model(torch.arange(9)[None])).square().mean().backward()
    gradients = {"weight": weight.grad.clone(), "norm": norm.grad.clone()}
    optimizers[0].step()
    for name, parameter, decay in (("weight", weight, 0.1), ("norm", norm, 0.0)):
        # First step: after bias correction both moments are the gradient, so its size cancels.
        gradient = gradients[name]
        expected = before[name] * (1 - 2e-3 * decay) - 2e-3 * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(parameter.detach(), expected, atol=1e-7, rtol=1e-5)
