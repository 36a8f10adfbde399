"""Numbers and bytes against transformers: logits of random small models, round trips of weights."""

from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file

from benchmarks.result import Row, run_benchmark
from plait.checkpoint.huggingface import load_model, write_model
from plait.models.registry import family_of_model
from tests.models.tiny_families import CONFIGS, SMALL, make_reference

NUM_SEEDS = 10


def measure(quick: bool) -> list[Row]:
    """Compare every kind of model in the tests over several seeds; one pair of rows a family."""
    results: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for name in CONFIGS:
        for seed in range(2 if quick else NUM_SEEDS):
            title, difference, differing = _compare(name, seed)
            results[title].append((difference, differing))
    return [row for title, pairs in results.items() for row in _rows(title, pairs)]


def _rows(title: str, pairs: list[tuple[float, float]]) -> list[Row]:
    return [
        Row(
            claim=f"{title}: largest difference of a float32 logit",
            unit="",
            target=1e-4,
            better="lower",
            samples=[max(difference for difference, _ in pairs)],
        ),
        Row(
            claim=f"{title}: bytes that differ after import and export",
            unit="bytes",
            target=0.0,
            better="lower",
            samples=[sum(differing for _, differing in pairs)],
        ),
    ]


@torch.no_grad()
def _compare(name: str, seed: int) -> tuple[str, float, float]:
    theirs = make_reference(name, seed=seed)
    tokens = torch.randint(0, SMALL["vocab_size"], (2, SMALL["max_position_embeddings"]))
    with TemporaryDirectory() as folder:
        before, after = Path(folder) / "before", Path(folder) / "after"
        theirs.save_pretrained(before)
        ours = load_model(before)
        after.mkdir()
        write_model(ours, after)
        first, second = (load_file(path / "model.safetensors") for path in (before, after))
    difference = (ours.logits(ours(tokens)) - theirs(tokens).logits).abs().max().item()
    if first.keys() != second.keys():
        raise RuntimeError(f"other tensors: {first.keys() ^ second.keys()}")
    differing = sum(
        (first[k].view(torch.uint8) != second[k].view(torch.uint8)).sum().item() for k in first
    )
    return family_of_model(ours).title, difference, float(differing)


if __name__ == "__main__":
    run_benchmark("parity", measure)
