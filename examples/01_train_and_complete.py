"""Train a very small model on a folder of text from Python, then complete a prompt with it."""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from plait.checkpoint.huggingface import load_tokenizer
from plait.recipes.catalog import find_recipe
from plait.serve.generate import generate
from plait.serve.sampling import Sampling
from plait.train.job import Job
from plait.train.loop import Watch, train
from plait.train.run_folder import RunFolder


def small_job(data: str) -> Job:
    """Shrink the demo recipe until it trains in seconds."""
    job = find_recipe("stdlib_demo")
    model = replace(
        job.model,
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4,
        head_size=16,
    )
    evaluation = replace(job.evaluation, stride=64)
    return replace(
        job, data=data, model=model, evaluation=evaluation, sequence_length=64, num_steps=40
    )


def main() -> None:
    """Use the folder given on the command line, or this project's own documents."""
    default = Path(__file__).parents[1] / "docs"
    data = sys.argv[1] if len(sys.argv) > 1 else str(default)
    with tempfile.TemporaryDirectory() as folder:
        job, run = small_job(data), RunFolder(Path(folder) / "run")
        run.write_job(job)
        model = train(job, run, Watch()).model
        tokenizer = load_tokenizer(run.tokenizer)
        first, *_, last = (r["loss"] for r in run.read_metrics() if "loss" in r)
        print(f"loss {first:.2f} -> {last:.2f} nats/token")
        new = generate(model, tokenizer.encode("The ").ids, Sampling(max_new_tokens=20))
        print("The " + tokenizer.decode(list(new)))


if __name__ == "__main__":
    main()
