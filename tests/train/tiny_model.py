"""A very small model folder with a tokenizer, for tests of fine-tuning."""

import json

import torch

from plait.checkpoint.training_state import export_model
from plait.models.decoder import Decoder, DecoderConfig
from plait.train.corpus import CorpusSettings, find_corpus
from plait.train.tokenizer import save_tokenizer, train_tokenizer

COLOURS = {"sky": "blue", "grass": "green", "snow": "white", "coal": "black", "blood": "red"}


def make_model_folder(folder, *, seed=0):
    """A Llama of two layers with random weights and a byte-pair encoding of a few words."""
    folder.mkdir()
    text = " ".join(
        f"what colour is {k}? it is {v}. ### user assistant" for k, v in COLOURS.items()
    )
    (folder / "words.txt").write_text(text * 20)
    corpus = find_corpus(str(folder / "words.txt"), CorpusSettings(), split=False)
    tokenizer = train_tokenizer(corpus.heldout, vocab_size=320)
    save_tokenizer(tokenizer, folder / "tokenizer", max_positions=128)
    model = Decoder(
        DecoderConfig(
            vocab_size=320,
            hidden_size=48,
            intermediate_size=96,
            num_layers=2,
            num_heads=3,
            num_kv_heads=3,
            head_size=16,
            max_positions=128,
            init_std=0.2,  # with less, a frozen output head cannot say anything loudly
        )
    )
    model.initialize(torch.Generator().manual_seed(seed))
    export_model(folder / "model", model, folder / "tokenizer")
    return folder / "model"


def chat_rows():
    """Questions and answers, some as messages, some as prompt and completion."""
    rows = []
    for thing, colour in COLOURS.items():
        question, answer = f"what colour is {thing}?", f"it is {colour}."
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows += [{"messages": turns}, {"prompt": question, "completion": answer}]
    return rows


def preference_rows():
    """The right colour is chosen, another one rejected."""
    colours = list(COLOURS.values())
    return [
        {
            "prompt": f"what colour is {thing}?",
            "chosen": f"it is {colour}.",
            "rejected": f"it is {colours[(number + 1) % len(colours)]}.",
        }
        for number, (thing, colour) in enumerate(COLOURS.items())
    ]


def write_rows(path, rows):
    """Write JSON lines and return the path as a setting."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
