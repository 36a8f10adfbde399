"""Every architecture that `transformers` knows, made small: does it train with eager's bits?

Each is built from its own default configuration with small sizes, in a process of its own, and does
two training steps (dropout as configured) in eager PyTorch and under `plait.jit`, each with a model
made anew from the same seed. Compared bit for bit: outputs, loss, every gradient, every buffer, the
random state. What cannot be made small by this script alone (or does not train in eager PyTorch
so) is left out and listed with its reason.
"""

import json
import os
import resource
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.result import ROOT, Row, run_benchmark

SIZES: dict[int | float, tuple[str, ...]] = {
    64: (
        *("hidden_size", "d_model", "n_embd", "dim", "word_embed_proj_dim"),
        *("max_position_embeddings", "n_positions", "n_ctx"),
    ),
    4: (
        *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_attention_heads"),
        *("n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads"),
        *("num_local_experts", "num_experts", "n_routed_experts"),
    ),
    3: ("encoder_layers", "decoder_layers", "num_decoder_layers"),
    2: ("num_key_value_heads", "num_experts_per_tok", "eos_token_id"),
    96: (
        *("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff"),
        *("d_inner", "n_inner", "ffn_hidden_size"),
    ),
    16: ("d_kv", "head_dim"),
    32: ("moe_intermediate_size", "embedding_size", "image_size"),
    8: ("patch_size", "rotary_dim", "sliding_window"),
    120: ("vocab_size",),
    5: ("num_labels",),
    # Where it is compiled, Mamba's own code would scan in another order than in eager PyTorch.
    0: ("pad_token_id", "use_associative_scan"),
    1: ("bos_token_id", "decoder_start_token_id"),
}
OPTIONAL = ("head_dim", "sliding_window", "num_local_experts", "num_experts", "n_routed_experts")
MOST_PARAMETERS = 60_000_000
MEMORY_BYTES = 24 << 30
TIME_LIMIT_S = 1200
STEPS = 2
TASKS = {
    "causal": ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "AutoModelForCausalLM"),
    "masked": ("MODEL_FOR_MASKED_LM_MAPPING_NAMES", "AutoModelForMaskedLM"),
    "seq2seq": ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "AutoModelForSeq2SeqLM"),
    "image": ("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES", "AutoModelForImageClassification"),
}
QUICK = ("causal llama", "masked modernbert")


def measure(quick: bool) -> list[Row]:
    """Compare all; list what differs and what was left out."""
    families = list(QUICK) if quick else _all_families()
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        found = dict(zip(families, pool.map(_compared, families), strict=True))
    known = {name: result for name, result in found.items() if "differing" in result}
    differing = {name: each["differing"] for name, each in known.items() if each["differing"]}
    broken = {name: each["error"] for name, each in found.items() if "error" in each}
    for name, values in differing.items():
        print(f"{name} differs: {values[:4]}", file=sys.stderr)
    for name, error in broken.items():
        print(f"{name} fails: {error}", file=sys.stderr)
    for name, each in found.items():
        if "left_out" in each:
            print(f"{name} left out: {each['left_out']}", file=sys.stderr)
    equal = len(known) - len(differing)
    return [
        _row("architectures that train with eager's bits", equal, len(known) + len(broken)),
        _row("architectures that train with other bits", len(differing), 0, "lower"),
        _row("architectures that train in eager PyTorch only", len(broken), 0, "lower"),
        _row(
            "architectures left out: this script makes none of them that trains in eager PyTorch",
            len(found) - len(known) - len(broken),
            None,
            "lower",
        ),
        _row(
            "architectures that train as one graph",
            sum(not each["breaks"] for each in known.values()),
            None,
        ),
    ]


def _row(claim: str, value: float, target: float | None, better: Any = "higher") -> Row:
    return Row(claim=claim, unit="models", target=target, better=better, samples=[value])


def _all_families() -> list[str]:
    from transformers.models.auto import modeling_auto

    names = {task: getattr(modeling_auto, mapping) for task, (mapping, _) in TASKS.items()}
    return [f"{task} {name}" for task, known in names.items() for name in known]


def _compared(family: str) -> dict[str, Any]:
    """Run a family in a process of its own."""
    with TemporaryDirectory() as folder:
        environment = os.environ | {"PLAIT_CACHE": folder, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "benchmarks.families", "--child", *family.split()]
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
                timeout=TIME_LIMIT_S,
            )
        except subprocess.TimeoutExpired:
            return {"left_out": f"more than {TIME_LIMIT_S} s"}
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return {"left_out": (done.stderr.strip().splitlines() or ["no memory"])[-1][:200]}
    return json.loads(lines[-1])


def _work(task: str, name: str) -> dict[str, Any]:
    import torch

    import plait

    torch.set_num_threads(1)
    model, arguments = _family(task, name)
    expected = [_step(model, model, arguments, seed) for seed in range(STEPS)]
    buffers = {key: x.clone() for key, x in model.named_buffers()}
    again, arguments = _family(task, name)
    compiled = plait.jit(again)
    try:
        found = [_step(compiled, again, arguments, seed) for seed in range(STEPS)]
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:300]}
    found[-1] |= {f"buffer {key}": x for key, x in again.named_buffers()}
    expected[-1] |= {f"buffer {key}": x for key, x in buffers.items()}
    differing = [
        f"step {i}, {key}"
        for i, (one, other) in enumerate(zip(expected, found, strict=True))
        for key in one.keys() | other.keys()
        if key not in one or key not in other or not _equal(one[key], other[key])
    ]
    return {"differing": sorted(differing), "breaks": len(compiled.report().breaks)}


def _family(task: str, name: str) -> tuple[Any, dict[str, Any]]:
    """A small model in training mode with its weights, and the arguments of a step."""
    import torch
    import transformers

    default = transformers.AutoConfig.for_model(name)
    config = transformers.AutoConfig.for_model(name, **_small(default, task))
    torch.manual_seed(0)
    with torch.device("meta"):
        make = getattr(transformers, TASKS[task][1]).from_config
        num_parameters = sum(p.numel() for p in make(config).parameters())
    if num_parameters > MOST_PARAMETERS:
        raise ValueError(f"{num_parameters} parameters")
    torch.manual_seed(0)
    model = make(config).train()
    torch.manual_seed(1)
    if task == "image":
        size = getattr(config, "image_size", 64)
        size = size if isinstance(size, int) else 32
        images = torch.randn(2, getattr(config, "num_channels", 3), size, size)
        return model, {"pixel_values": images, "labels": torch.tensor([0, 1])}
    tokens = torch.randint(3, 100, (2, 2, 24))
    return model, {"input_ids": tokens[0], "labels": tokens[1]}


def _small(default: Any, task: str) -> dict[str, Any]:
    """The sizes that this configuration has."""
    sizes = {name: size for size, names in SIZES.items() for name in names}
    chosen = {}
    for name, size in sizes.items():
        value = getattr(default, name, default)
        if value is default or isinstance(value, (list, tuple, dict)):
            continue
        if value is not None or name not in OPTIONAL:
            chosen[name] = size
    if hasattr(default, "kv_lora_rank"):  # latent attention: a head's size follows from others
        chosen.pop("head_dim", None)
        chosen["num_key_value_heads"] = chosen["num_attention_heads"]
    if "layer_types" in vars(default) and isinstance(default.layer_types, list):
        chosen["layer_types"] = default.layer_types[: chosen.get("num_hidden_layers", 4)]
    if task == "seq2seq":
        chosen["decoder_start_token_id"] = 1
    computed = {name for name in chosen if isinstance(getattr(type(default), name, None), property)}
    return {name: size for name, size in chosen.items() if name not in computed}


def _step(run: Callable, model: Any, arguments: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """What one step makes: a gradient that eager leaves out is a zero one."""
    import torch
    from torch import Tensor
    from torch.utils._pytree import tree_leaves

    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    output = run(**arguments)
    output["loss"].backward()
    outputs = [x for x in tree_leaves(dict(output)) if isinstance(x, Tensor)]
    made = {f"output {i}": x.detach().clone() for i, x in enumerate(outputs)}
    for key, p in model.named_parameters():
        made[f"gradient of {key}"] = torch.zeros_like(p) if p.grad is None else p.grad.clone()
    return made | {"random state": torch.get_rng_state()}


def _equal(x: Any, y: Any) -> bool:
    import torch

    return torch.equal(torch.nan_to_num(x), torch.nan_to_num(y))


if __name__ == "__main__":
    if "--child" in sys.argv:
        warnings.filterwarnings("ignore")
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        print(json.dumps(_work(*sys.argv[-2:])))
    else:
        run_benchmark("families", measure)
