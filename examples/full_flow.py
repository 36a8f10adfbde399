"""From the standard library to a model that answers: pretrain, fine-tune, evaluate, sample."""

import ast
import json
import random
import sys
from pathlib import Path

from plait.checkpoint.huggingface import end_tokens, load_tokenizer
from plait.config import override
from plait.recipes.catalog import find_recipe
from plait.serve.generate import generate
from plait.serve.sampling import Sampling
from plait.train.corpus import CorpusSettings, find_corpus
from plait.train.loop import train
from plait.train.run_folder import RunFolder
from plait.train.tune import tune
from plait.train.watch import Watch


def instructions() -> list[dict]:
    """Ask for each public function of the library what its documentation string begins with."""
    documents = find_corpus("stdlib", CorpusSettings(), split=False).heldout
    rows = []
    for document in (d for d in documents if "test" not in d.name):
        for node in ast.walk(ast.parse(document.read_bytes())):
            text = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
            if text and not node.name.startswith("_"):
                question = f"What does {node.name} in {document.name} do?\n"
                rows.append({"prompt": question, "completion": text.split("\n")[0]})
    return rows


def main(num_steps: int) -> None:
    """Do all of it in the folder full_flow."""
    folder, watch = Path("full_flow"), Watch(on_stage=lambda text: print("-", text, flush=True))
    job = override(find_recipe("stdlib_demo"), [f"num_steps={num_steps}"])
    base, tuned = RunFolder(folder / "base"), RunFolder(folder / "tuned")
    base.write_job(job)
    train(job, base, watch)
    print(f"held-out text: {base.read_metrics()[-1]['heldout_bits_per_byte']:.3f} bits per byte")
    rows = instructions()
    random.Random(0).shuffle(rows)
    for name, part in (("train", rows[100:]), ("heldout", rows[:100])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    settings = f"model={base.path} data={folder}/train.jsonl num_steps={num_steps // 4} "
    settings += f"evaluation_data={folder}/heldout.jsonl sequence_length=512 method=full"
    tuning = override(find_recipe("sft"), settings.split())
    tuned.write_job(tuning)
    model = tune(tuning, tuned, watch).model
    losses = [r["heldout_loss"] for r in tuned.read_metrics() if "heldout_loss" in r]
    print(f"held-out answers: {losses[0]:.3f} -> {min(losses):.3f} nats per token")
    tokenizer, ends = load_tokenizer(tuned.model), end_tokens(tuned.model)
    prompt = "What does close in socket.py do?\n"
    new = generate(model, tokenizer.encode(prompt).ids, Sampling(temperature=0), stop_tokens=ends)
    print(f"{prompt}{tokenizer.decode(list(new))}\nmodel: {tuned.model}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 400)
