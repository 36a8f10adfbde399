"""From the standard library to a model that answers: pretrain, fine-tune, evaluate, sample."""

import ast
import json
import random
import sys
from pathlib import Path

from plait.cli.sample import complete
from plait.config import override
from plait.recipes.catalog import find_recipe
from plait.serve.sampling import Sampling
from plait.train.corpus import CorpusSettings, find_corpus
from plait.train.loop import train
from plait.train.run_folder import RunFolder
from plait.train.tune import tune
from plait.train.watch import Watch

SMALL = ["model.vocab_size=4096", "model.hidden_size=192", "model.intermediate_size=512"]
SMALL += ["model.num_heads=3", "model.num_kv_heads=3", "evaluation.every=50", "dtype=float32"]
FULL = ["method=full", "sequence_length=512", "batch_size=4", "micro_batch_size=4", "dtype=float32"]


def instructions() -> list[dict]:
    """Ask for each public function of the library what its documentation string begins with."""
    rows = []
    documents = find_corpus("stdlib", CorpusSettings(), split=False).heldout
    for document in (each for each in documents if "test" not in each.name):
        for node in ast.walk(ast.parse(document.read_bytes())):
            text = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
            if text and not node.name.startswith("_"):
                question = f"What does {node.name} in {document.name} do?\n"
                rows.append({"prompt": question, "completion": text.split("\n")[0]})
    return random.Random(0).sample(rows, len(rows))


def main(num_steps: int) -> None:
    """Do all of it in the folder full_flow."""
    folder, rows = Path("full_flow"), instructions()
    watch = Watch(lambda r: "heldout_loss" in r and print("-", r), lambda text: print("-", text))
    base, tuned = RunFolder(folder / "base"), RunFolder(folder / "tuned")
    base.write_job(job := override(find_recipe("stdlib_demo"), [*SMALL, f"num_steps={num_steps}"]))
    train(job, base, watch)
    print(f"held-out text: {base.read_metrics()[-1]['heldout_bits_per_byte']:.3f} bits per byte")
    for name, part in (("train", rows[100:]), ("heldout", rows[:100])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    settings = [f"model={base.path}", f"data={folder}/train.jsonl", f"num_steps={num_steps // 3}"]
    settings.append(f"evaluation_data={folder}/heldout.jsonl")
    tuned.write_job(tuning := override(find_recipe("sft"), [*settings, *FULL]))
    model = tune(tuning, tuned, watch).model
    losses = [r["heldout_loss"] for r in tuned.read_metrics() if "heldout_loss" in r]
    print(f"held-out answers: {losses[0]:.3f} -> {min(losses):.3f} nats per token")
    for row in rows[:3]:
        print("".join(complete(model, tuned.model, row["prompt"], Sampling(temperature=0))))
        print(f"  (the library says: {row['completion']})")
    print(f"model: {tuned.model}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 150)
