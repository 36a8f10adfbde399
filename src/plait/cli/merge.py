"""`plait merge`: a model and a PEFT adapter as one model folder."""

from pathlib import Path
from typing import Annotated

import typer

from plait.checkpoint.huggingface import load_model
from plait.checkpoint.peft import load_adapter
from plait.checkpoint.training_state import export_model
from plait.cli.output import show_table
from plait.errors import ConfigError
from plait.nn.lora import lora_layers, merge_lora
from plait.train.run_folder import adapter_folder
from plait.train.score import trained_model


def merge_command(
    model: Annotated[
        Path, typer.Argument(help="Run folder, or a model folder in the layout of Hugging Face.")
    ],
    adapter: Annotated[Path, typer.Argument(help="Adapter folder of PEFT, or a fine-tuning run.")],
    out: Annotated[Path, typer.Option(help="Folder for the merged model; must not exist.")],
) -> None:
    """Merge a LoRA adapter into the weights of its model; they keep their dtype.

    Example: plait merge runs/stdlib_demo-1 runs/sft-1/adapter --out merged
    """
    if out.exists():
        raise ConfigError(f"{out} exists already. Choose another --out.")
    folder = trained_model(model)
    decoder = load_model(folder)
    settings = load_adapter(decoder, adapter_folder(adapter))
    num_layers = sum(1 for _ in lora_layers(decoder))
    merge_lora(decoder)
    export_model(out, decoder, folder)
    show_table(
        [
            ("adapter", f"{num_layers} layers, rank {settings.rank}, alpha {settings.alpha:g}"),
            ("model", str(out)),
        ]
    )
