"""One rank of two: steps of a schedule with fsdp or dp, beside eager references.

Run as `python -m tests.executor.data_parallel_worker RANK STORE_FILE AXIS`; raises if anything
differs.
"""

import sys

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import plait
from plait.cost.timeline import Stream
from plait.errors import PlanError
from plait.executor.profile import profile_step
from plait.executor.ranks import shard_parameters

NUM_STEPS, ROWS = 3, 6


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(7, 9), nn.Linear(9, 7)  # neither is a multiple of two ranks

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def squares(model, x):
    return model(x).square().mean()


def tower():
    torch.manual_seed(0)
    return Tower()


def sgd(model):
    return torch.optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9)


def whole_of(shards, like):
    """Every rank's shard, joined."""
    for name, p in like.named_parameters():
        parts = [torch.empty_like(shards[name]) for _ in range(2)]
        distributed.all_gather(parts, shards[name].detach())
        yield name, torch.cat(parts)[: p.shape[0]]


def run_ours(axis, mesh, batches, num_micro_batches, rank):
    model = tower()
    plan = plait.ParallelPlan(**{axis: 2}, num_micro_batches=num_micro_batches)
    one = plait.ParallelPlan(num_micro_batches=num_micro_batches)
    graph = plait.capture(model, batches[0][rank], one, loss=squares)
    if axis == "fsdp":
        shard_parameters(model, mesh)
    optimizer = sgd(model)
    schedule = plait.compile(graph, plan, optimizer=optimizer)
    *batches, profiled = batches
    for batch in batches:
        plait.run(schedule, model, batch[rank], optimizer=optimizer, mesh=mesh)
    found = profile_step(schedule, model, profiled[rank], optimizer=optimizer, mesh=mesh)
    assert found.timeline.busy_s(Stream.COMMUNICATION) > 0
    return schedule, dict(model.named_parameters())


def run_alone(batches, num_micro_batches):
    """The same in one process: gradients of each rank's batch, then their mean."""
    model = tower()
    optimizer = sgd(model)
    for batch in batches:
        gradients = []
        for part in batch:
            for x in part.chunk(num_micro_batches):
                (squares(model, x) * (1 / num_micro_batches)).backward()
            gradients.append([p.grad for p in model.parameters()])
            model.zero_grad()
        for p, *parts in zip(model.parameters(), *gradients, strict=True):
            p.grad = (parts[0] + parts[1]) / 2
        optimizer.step()
        optimizer.zero_grad()
    return model


def run_fsdp2(mesh, batches, rank):
    model = tower()
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = sgd(model)
    for batch in batches:
        squares(model, batch[rank]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.full_tensor() for name, p in model.named_parameters()}


def main(rank, store_file, axis):
    store = distributed.FileStore(store_file, 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=(axis,))
    torch.manual_seed(1)
    batches = [torch.randn(2, ROWS, 7) for _ in range(NUM_STEPS)]
    for num_micro_batches in (1, 2):
        schedule, mine = run_ours(axis, mesh, batches, num_micro_batches, rank)
        alone = run_alone(batches, num_micro_batches)
        found = dict(whole_of(mine, alone)) if axis == "fsdp" else mine
        for name, p in alone.named_parameters():
            assert torch.equal(found[name], p), (name, num_micro_batches)
        if num_micro_batches == 1:
            for name, p in run_fsdp2(mesh, batches, rank).items():
                torch.testing.assert_close(found[name].detach(), p.detach(), rtol=1e-5, atol=1e-7)
        names = ["unshard"] if axis == "fsdp" else []
        expected = {*names, "forward", "backward", "reduce_gradients", "optimizer"}
        assert set(schedule.programs) == expected
    graph = plait.capture(tower(), batches[0][rank], loss=squares)
    three = plait.compile(graph, plait.ParallelPlan(**{axis: 3}))
    with pytest.raises(PlanError, match=rf"3 ranks on the axis '{axis}'.*has {{'{axis}': 2}}"):
        plait.run(three, tower(), batches[0][rank], mesh=mesh)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
