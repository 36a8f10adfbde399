"""One stage of PyTorch's own pipelining, priced without the other."""

import pytest
import torch
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from plait.dryrun.eager import EagerProgram, trace_eager
from plait.dryrun.memory import ledger_of
from plait.errors import PlanError
from plait.graph.plan_mesh import plan_mesh
from plait.plan.parallel_plan import ParallelPlan

WIDTH, ROWS = 64, 8
WEIGHT, MESSAGE = 4 * WIDTH * WIDTH, 4 * ROWS * WIDTH


def peak_bytes(schedule_class, *, stage, num_micro_batches, tell=True):
    """Of a later step: one linear layer a stage, plain SGD."""
    shapes = {}
    if tell:
        message = torch.empty(ROWS, WIDTH, device="meta", requires_grad=True)
        shapes = {"input_args": message, "output_args": message}

    def build():
        model = nn.Linear(WIDTH, WIDTH, bias=False)
        x = torch.zeros(num_micro_batches * ROWS, WIDTH)
        piece = PipelineStage(model, stage, 2, torch.device("cpu"), **shapes)
        schedule = schedule_class(piece, num_micro_batches, loss_fn=lambda y, _: y.sum())
        optimizer = torch.optim.SGD(model.parameters())

        def step():
            schedule.step(*([] if stage else [x]), target=x, return_outputs=False)
            optimizer.step()
            optimizer.zero_grad()

        return EagerProgram(step, model, optimizer)

    with plan_mesh(ParallelPlan(pp=2), rank=stage):
        run = trace_eager(build)
    return ledger_of(run.trace, first=run.begins[1], fragments=False).peak_bytes


def test_a_gpipe_stage_holds_every_input_result_and_gradient_that_it_receives():
    # Results are messages, which live until all are known to have arrived; two gradients of the
    # weight do while the second is added to the first.
    for n in (3, 4, 7):
        found = peak_bytes(ScheduleGPipe, stage=0, num_micro_batches=n)
        assert found == 3 * WEIGHT + 3 * n * MESSAGE


def test_a_further_micro_batch_of_1f1b_costs_its_input_and_the_room_to_receive():
    # And not its result, of which as many live as are on their way.
    peaks = [peak_bytes(Schedule1F1B, stage=0, num_micro_batches=n) for n in (4, 5, 8)]
    assert peaks[1] - peaks[0] == 2 * MESSAGE
    assert peaks[2] - peaks[1] == 3 * 2 * MESSAGE


def test_a_stage_that_was_not_told_the_shapes_is_refused():
    with pytest.raises(PlanError, match="input_args and output_args"):
        peak_bytes(ScheduleGPipe, stage=1, num_micro_batches=2, tell=False)
