"""Train on the source of Python's standard library: real text that every machine has."""

from plait.models.decoder import DecoderConfig
from plait.nn.rotary import Rope
from plait.train.corpus import STDLIB
from plait.train.job import EvaluationSettings, Job
from plait.train.optimizer import OptimizerSettings


def stdlib_15m() -> Job:
    """A Llama of 15 million parameters, half an hour on two cores."""
    return Job(
        name="stdlib_15m",
        data=STDLIB,
        model=DecoderConfig(
            vocab_size=16_384,
            hidden_size=320,
            intermediate_size=896,
            num_layers=4,
            num_heads=5,
            num_kv_heads=5,
            head_size=64,
            max_positions=1024,
            rope=Rope(theta=500_000.0),  # as in Llama 3
        ),
        initialization="corpus",
        optimizer=OptimizerSettings(learning_rate=1e-3, warmup_steps=50),
        evaluation=EvaluationSettings(every=200, samples=64, stride=256),
        sequence_length=512,
        batch_size=4,
        micro_batch_size=4,
        num_steps=1600,
        save_every=400,
    )


def stdlib_demo() -> Job:
    """The same text and a smaller Llama, about two minutes on two cores."""
    return Job(
        name="stdlib_demo",
        data=STDLIB,
        model=DecoderConfig(
            vocab_size=8192,
            hidden_size=256,
            intermediate_size=704,
            num_layers=3,
            num_heads=4,
            num_kv_heads=4,
            head_size=64,
            max_positions=1024,
            rope=Rope(theta=500_000.0),
        ),
        initialization="corpus",
        optimizer=OptimizerSettings(learning_rate=1.5e-3, warmup_steps=20),
        evaluation=EvaluationSettings(every=200, samples=32, stride=512),
        sequence_length=512,
        batch_size=4,
        micro_batch_size=4,
        num_steps=400,
        save_every=200,
    )
