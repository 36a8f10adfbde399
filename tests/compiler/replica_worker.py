"""One rank of several gloo processes: steps in replicas beside the same steps unsplit.

Run as: python -m tests.compiler.replica_worker RANK WORLD STORE_FILE TASK; raises if anything is
not as it should be. TASK: cases separated by commas (see CASES), a disagreement, "compiled", or
"spread by PyTorch".
"""

import hashlib
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn import functional

import plait
from plait.errors import PlanError
from plait.executor.agree import check_agreement
from plait.executor.ranks import groups_of, local_part, shard_parameters
from plait.graph.parallelize import parallelize
from plait.graph.plan_mesh import plan_mesh
from plait.graph.storage import to_json
from tests.compiler.replica_models import Case, schedules
from tests.graph.spread_models import loss

CASES = {
    "llama": {"name": "llama", "replicas": 2},
    "our_qwen3": {"name": "our_qwen3", "sp": True, "replicas": 3},
    "gpt2_dropout": {"name": "gpt2_dropout", "sp": True, "replicas": 2},
    "phi3": {"name": "phi3", "batch": 2, "replicas": 2, "dtype": torch.bfloat16},
    "olmo2": {"name": "olmo2", "replicas": 4, "sp": True},
    "mistral": {"name": "mistral", "replicas": 2, "sp": True, "num_tokens": 130},
}


TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 3e-2}


def spread(case, mesh):
    return parallelize(case.model(), case.plan(), mesh)


def check(case):
    split, whole = schedules(case)
    texts = [None] * dist.get_world_size()
    dist.all_gather_object(texts, hashlib.sha256(to_json(split).encode()).hexdigest())
    assert len(set(texts)) == 1, "the ranks have different schedules"
    with plan_mesh(plait.ParallelPlan(tp=case.tp)) as mesh:
        model = spread(case, mesh)
    found = []
    for schedule in (split, whole):
        model.zero_grad()
        torch.manual_seed(2)
        value = plait.run(schedule, model, case.tokens(), mesh=mesh)
        gradients = {name: p.grad.to_local() for name, p in model.named_parameters()}
        found.append({"loss": value, **gradients})
    # From 3 ranks on, gloo sums ranks in an order that depends on the place in the message: a
    # message in parts has other bits. With 2 there is but one order.
    is_ordered = case.tp == 2
    num_different = 0
    for name, expected in found[1].items():
        difference = (found[0][name] - expected).abs()
        num_different += int(difference.count_nonzero())
        is_regrouped = case.sp and case.batch == 1 and expected.dim() == 1
        if is_ordered and not is_regrouped:
            assert torch.equal(found[0][name], expected), (str(case), name)
        else:
            assert difference.max() <= TOLERANCE[case.dtype] * expected.abs().max(), name
    sys.stderr.write(f"{case}: {num_different} values differ\n")


def disagree_on_the_plan(rank):
    case = Case("our_llama", tp=2, replicas=2 + rank)
    split, _ = schedules(case)
    with plan_mesh(plait.ParallelPlan(tp=2)) as mesh:
        model = spread(case, mesh)
    with pytest.raises(PlanError, match=r"replicas: rank 0: split in 2 .* rank 1: split in 3"):
        plait.run(split, model, case.tokens(), mesh=mesh)


def disagree_on_the_weights(rank):
    case = Case("our_llama", tp=2)
    split, _ = schedules(case)
    with plan_mesh(plait.ParallelPlan(tp=2)) as mesh:
        model = spread(case, mesh)
    weight = dict(model.named_parameters())["layers.1.input_layernorm.weight"]
    with torch.no_grad():
        weight.to_local()[0] += rank
    with pytest.raises(PlanError, match=r"parameter layers.1.input_layernorm.weight: rank 0"):
        plait.run(split, model, case.tokens(), mesh=mesh)
    if rank == 0:  # the other never comes
        with pytest.raises(PlanError, match=r"ranks \[1\] of the axis 'tp' did not begin"):
            check_agreement(
                split, dict(model.named_parameters()), groups_of(split, model, mesh), time_limit_s=1
            )


def disagree_on_one_axis_of_two(rank):
    """The ranks of one axis differ in a norm's weight, or one rank alone from its neighbours."""
    case = Case("our_llama", tp=2)
    name = "layers.1.input_layernorm.weight"
    for axis, differs in (("dp", "dp"), ("fsdp", "tp"), ("dp", "only rank 3")):
        plan = plait.ParallelPlan(tp=2, replicas=2, **{axis: 2})
        graph = plait.capture(case.model(), case.tokens(), plan, loss=loss)
        schedule = plait.compile(graph, plan)
        with plan_mesh(plan) as mesh:
            model = parallelize(case.model(), plan, mesh)
        if axis == "fsdp":
            shard_parameters(model, mesh)
        is_alone = differs == "only rank 3"
        added = float(rank == 3) if is_alone else mesh[differs].get_local_rank()
        with torch.no_grad():
            local_part(dict(model.named_parameters())[name])[0] += added
        said = rf"axis '{'.*' if is_alone else differs}' disagree:\n  parameter {name}: rank"
        if is_alone and rank == 0:  # which has the weight of both its neighbours
            said = f"^other ranks of this schedule stop: the ranks of the {said}"
        with pytest.raises(PlanError, match=said):
            plait.run(schedule, model, case.tokens(), mesh=mesh)
        dist.barrier()


def step(model, run, tokens):
    model.zero_grad()
    result = run(tokens)
    result.float().square().mean().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [result.detach(), *(x.to_local() for x in gradients)]


def compile_in_one_line(rank):
    """torch.compile and plait.jit of a spread model in replicas, beside the same model eagerly."""
    case = Case("our_llama", tp=2, sp=True)
    with plan_mesh(plait.ParallelPlan(tp=2)) as mesh:
        model = spread(case, mesh)
    expected = step(model, model, case.tokens())
    jitted = plait.jit(model, replicas=2)
    for run in (torch.compile(model, backend="plait", options={"replicas": 2}), jitted):
        found = step(model, run, case.tokens())
        for x, y in zip(found, expected, strict=True):
            assert (x - y).abs().max() <= 2e-5 * y.abs().max()
        torch._dynamo.reset()
    assert "split in 2 along the token" in str(jitted.report())
    with pytest.raises(Exception, match=r"replicas: rank 0: split in 2 .* rank 1: split in 3"):
        plait.jit(model, replicas=2 + rank)(case.tokens())


class Gated(nn.Module):
    """Two projections and a third, with the residual around them."""

    def __init__(self, width):
        super().__init__()
        self.gate, self.up = nn.Linear(width, 4 * width), nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.down(functional.silu(self.gate(x)) * self.up(x))


def compile_what_pytorch_spread(rank):
    """A model that the user spread with PyTorch's own `parallelize_module`, in replicas."""
    torch.manual_seed(0)
    model, x = nn.Sequential(Gated(64), Gated(64)), torch.randn(1, 128, 64)
    split = {"gate": ColwiseParallel(), "up": ColwiseParallel(), "down": RowwiseParallel()}
    rules = {f"{i}.{name}": rule for i in range(2) for name, rule in split.items()}
    with plan_mesh(plait.ParallelPlan(tp=2)) as mesh:
        model = parallelize_module(model, mesh["tp"], rules)
    expected = step(model, model, x)
    jitted = plait.jit(model, replicas=2)
    found = step(model, jitted, x)
    for each, other in zip(found, expected, strict=True):
        assert (each - other).abs().max() <= 2e-5 * other.abs().max()
    report = str(jitted.report())
    assert "split in 2 along the token" in report, report
    assert "all_reduce" in report, report


def main(rank, world, store_file, task):
    torch.set_num_threads(1)
    store = dist.FileStore(store_file, world)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=120)
    )
    try:
        if task == "plan":
            disagree_on_the_plan(rank)
        elif task == "weights":
            disagree_on_the_weights(rank)
        elif task == "one axis of two":
            disagree_on_one_axis_of_two(rank)
        elif task == "compiled":
            compile_in_one_line(rank)
        elif task == "spread by PyTorch":
            compile_what_pytorch_spread(rank)
        else:
            for name in task.split(","):
                check(Case(**{**CASES[name], "tp": world}))
        dist.barrier()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
