"""One rank of four, tp=2 and fsdp=2: steps in replicas beside one process with all the batches.

Run as `python -m tests.executor.spread_shards_worker RANK STORE_FILE`; raises if anything differs.
"""

import sys

import torch
from torch import distributed

import plait
from plait.executor.ranks import shard_parameters
from plait.graph.parallelize import parallelize
from plait.graph.plan_mesh import plan_mesh
from plait.models.decoder import Decoder, DecoderConfig

PLAN = plait.ParallelPlan(fsdp=2, tp=2, replicas=2)
CONFIG = DecoderConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=8,
    max_positions=64,
)
NUM_STEPS = 2


def decoder():
    torch.manual_seed(0)
    return Decoder(CONFIG)


def loss(model, tokens_BT):
    return model.loss(model(tokens_BT), tokens_BT) / tokens_BT.numel()


def sgd(model):
    return torch.optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9)


def run_ours(mesh, batches):
    mine = batches[:, mesh["fsdp"].get_local_rank()]
    graph = plait.capture(decoder(), mine[0], PLAN, loss=loss)
    model = parallelize(decoder(), PLAN, mesh)
    shard_parameters(model, mesh)
    optimizer = sgd(model)
    schedule = plait.compile(graph, PLAN, optimizer=optimizer)
    assert {"unshard", "forward", "backward", "reduce_gradients", "optimizer"} == set(
        schedule.programs
    )
    assert any("split in 2" in note.text for note in schedule.notes)
    for tokens in mine:
        plait.run(schedule, model, tokens, optimizer=optimizer, mesh=mesh)
    return model


def run_alone(batches):
    model = decoder()
    optimizer = sgd(model)
    for batch in batches:
        (sum(loss(model, tokens) for tokens in batch) / len(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def main(rank, store_file):
    store = distributed.FileStore(store_file, 4)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=4)
    generator = torch.Generator().manual_seed(1)
    batches = torch.randint(0, 64, (NUM_STEPS, 2, 1, 64), generator=generator)
    with plan_mesh(PLAN) as mesh:
        found = dict(run_ours(mesh, batches).named_parameters())
        alone = parallelize(run_alone(batches), PLAN, mesh)
        for name, p in alone.named_parameters():
            shards = [torch.empty_like(found[name]) for _ in range(2)]
            group = mesh.get_group("fsdp")
            distributed.all_gather(shards, found[name].detach(), group=group)
            expected = p.detach().to_local()
            whole = torch.cat(shards)[: expected.shape[0]]
            # float32, two steps: sums over ranks and batches are grouped otherwise.
            torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-6, msg=name)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
