"""Numbers and bytes against transformers: logits of random small models, round trips of weights."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from benchmarks.result import Row, run_benchmark
from plait.checkpoint.huggingface import load_model, write_model

SHAPE = {
    "vocab_size": 997,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
FAMILIES = {
    "Llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "Qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=32)),
}


def measure(quick: bool) -> list[Row]:
    """Compare each family over several seeds."""
    rows: list[Row] = []
    for name, make in FAMILIES.items():
        results = [_compare(make, seed) for seed in range(2 if quick else 10)]
        rows += [
            Row(
                claim=f"{name}: largest difference of a float32 logit",
                unit="",
                target=1e-4,
                better="lower",
                samples=[difference for difference, _ in results],
            ),
            Row(
                claim=f"{name}: bytes that differ after import and export",
                unit="bytes",
                target=0.0,
                better="lower",
                samples=[differing for _, differing in results],
            ),
        ]
    return rows


@torch.no_grad()
def _compare(make, seed: int) -> tuple[float, float]:
    torch.manual_seed(seed)
    theirs = make().eval()
    tokens = torch.randint(0, SHAPE["vocab_size"], (2, 200))
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
    return difference, float(differing)


if __name__ == "__main__":
    run_benchmark("parity", measure)
