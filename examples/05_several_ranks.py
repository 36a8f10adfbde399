"""Train on four processes: two share each product (tp), two the parameters (fsdp), two replicas."""

import os
import subprocess
import sys

import torch
from torch import distributed

import plait
from plait.executor.ranks import shard_parameters
from plait.graph.parallelize import parallelize
from plait.graph.plan_mesh import plan_mesh

PLAN = plait.ParallelPlan(fsdp=2, tp=2, replicas=2)
CONFIG = plait.DecoderConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_size=16,
    max_positions=128,
)


def loss(model: plait.Decoder, tokens_BT: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens."""
    return model.loss(model(tokens_BT), tokens_BT) / tokens_BT.numel()


def train() -> None:
    """Train one rank's part."""
    distributed.init_process_group("gloo")
    torch.manual_seed(0)  # the same model on every rank, of which it keeps a part
    model = plait.Decoder(CONFIG)
    with plan_mesh(PLAN) as mesh:
        torch.manual_seed(1 + mesh["fsdp"].get_local_rank())  # ranks of fsdp see other tokens
        tokens = torch.randint(0, 64, (1, 128))
        graph = plait.capture(model, tokens, PLAN, loss=loss)
        shard_parameters(parallelize(model, PLAN, mesh), mesh)
        optimizer = torch.optim.AdamW(model.named_parameters(), lr=3e-3, fused=True)
        schedule = plait.compile(graph, PLAN, optimizer=optimizer)
        for step in range(10):
            value = plait.run(schedule, model, tokens, optimizer=optimizer, mesh=mesh)
            if distributed.get_rank() == 0 and step % 3 == 0:
                print(f"step {step}: loss {value.item():.3f}")
    if distributed.get_rank() == 0:
        print(f"programs: {', '.join(schedule.programs)}")
    distributed.destroy_process_group()


if "RANK" in os.environ:
    train()
else:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    sys.exit(subprocess.run([*torchrun, __file__], check=False).returncode)
