"""Fine-tune a model folder on rows of your own."""

from dataclasses import replace

from plait.train.tuning_job import TuningJob


def sft() -> TuningJob:
    """Learn what the assistant says in conversations, by LoRA unless told otherwise."""
    return TuningJob(name="sft", objective="sft")


def dpo() -> TuningJob:
    """Learn to prefer chosen answers to rejected ones."""
    job = TuningJob(name="dpo", objective="dpo", pack=False)
    return replace(job, optimizer=replace(job.optimizer, learning_rate=5e-5))
