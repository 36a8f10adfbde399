"""Where a large model's pieces come from: a function that makes it with a few of its layers.

Layers of one kind cost the same, so a model of a hundred layers is captured with one of each kind.
Models are made on the meta device and hold no memory.
"""

# pyright: basic
# (Hugging Face's configurations are not typed.)

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from plait.errors import MissingExtraError, PlanError
from plait.models.decoder import Decoder
from plait.models.decoder_config import DecoderConfig
from plait.nn.experts import ExpertSettings
from plait.plan.family_rules import divided_counts

Loss = Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model that can be made with chosen layers and vocabulary.

    make(layers, vocab_size): a module on the meta device with the layers of these numbers.
    kinds: of each layer; layers of one kind cost the same. counts: what tp must divide, by name.
    num_experts: 0 without experts. expert_rows: how many experts see a token.
    """

    name: str
    make: Callable[[Sequence[int], int], nn.Module]
    loss: Loss
    kinds: tuple[str, ...]
    vocab_size: int
    hidden_size: int
    counts: dict[str, int]
    num_experts: int = 0
    expert_rows: int = 0

    @property
    def num_layers(self) -> int:
        """Layers of the whole model."""
        return len(self.kinds)

    @property
    def kind_layers(self) -> tuple[int, ...]:
        """The first layer of each kind."""
        return tuple(self.kinds.index(kind) for kind in dict.fromkeys(self.kinds))


def decoder_source(config: DecoderConfig, name: str = "") -> ModelSource:
    """The source of one of Plait's own models."""
    kinds = tuple(_kind(config, layer) for layer in range(config.num_layers))
    counts = divided_counts(config)
    experts = config.experts
    return ModelSource(
        name=name or config.family,
        make=lambda layers, vocab_size: _decoder(config, layers, vocab_size),
        loss=_decoder_loss,
        kinds=kinds,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        counts=counts,
        num_experts=experts.num_experts if experts else 0,
        expert_rows=experts.experts_per_token if experts else 0,
    )


def hugging_face_source(config: Any, name: str = "") -> ModelSource:
    """The source of a causal language model of transformers, by its configuration."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise MissingExtraError("pricing a Hugging Face model needs transformers.") from error

    def make(layers: Sequence[int], vocab_size: int) -> nn.Module:
        small = copy.deepcopy(config)
        small.num_hidden_layers, small.vocab_size = len(layers), vocab_size
        if getattr(config, "layer_types", None):
            small.layer_types = [config.layer_types[layer] for layer in layers]
        small.use_cache = False
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(small, dtype=torch.bfloat16)

    types = getattr(config, "layer_types", None)
    counts = {
        key: getattr(config, key)
        for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size")
        if isinstance(getattr(config, key, None), int)
    }
    num_experts = next((n for key in _EXPERTS if (n := getattr(config, key, None))), 0)
    if num_experts and _has_plain_layers(config):
        raise PlanError(
            f"{name or config.model_type} has layers with experts and without, which its "
            "configuration does not name as kinds. Use one of Plait's own families with experts "
            "(qwen3_moe, deepseek_v3), or a ModelSource that says which layer is of which kind."
        )
    return ModelSource(
        name=name or config.model_type,
        make=make,
        loss=lambda model, tokens: model(input_ids=tokens, labels=tokens, use_cache=False).loss,
        kinds=tuple(types) if types else ("layer",) * config.num_hidden_layers,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        counts=counts,
        num_experts=num_experts,
        expert_rows=config.num_experts_per_tok if num_experts else 0,
    )


def module_source(
    model: nn.Module,
    *,
    loss: Loss,
    hidden_size: int,
    vocab_size: int,
    counts: Mapping[str, int] | None = None,
    name: str = "",
) -> ModelSource:
    """The source of any model whose layers are a ModuleList; its own code is captured.

    model: on any device; its layers are copied to the meta device and nothing is computed with
    them. Layers are of one kind if they are of one class and their parameters have the same shapes.
    loss: `loss(model, tokens_BT)`, a scalar. hidden_size: of what goes from layer to layer. counts:
    what tp must divide, by name. The vocabulary is not parted: price it with `share_head=False`
    where tp is above 1. Raises PlanError if there is no ModuleList, or several of the same length.
    """
    lists = [(path, x) for path, x in model.named_modules() if isinstance(x, nn.ModuleList)]
    most = max((len(x) for _, x in lists), default=0)
    longest = [path for path, x in lists if len(x) == most]
    if len(longest) != 1:
        found = ", ".join(longest) or "none"
        raise PlanError(
            f"the layers of {name or type(model).__name__} must be its longest ModuleList, and "
            f"there is no single one: {found}."
        )
    (path,) = longest
    layers = list(dict(lists)[path])
    signatures = [_signature(layer) for layer in layers]
    order = list(dict.fromkeys(signatures))
    kinds = tuple(
        "layer" if len(order) == 1 else f"kind {order.index(each) + 1}" for each in signatures
    )

    def make(chosen: Sequence[int], vocabulary: int) -> nn.Module:
        if vocabulary != vocab_size:
            raise PlanError(
                f"{name or type(model).__name__} has a vocabulary of {vocab_size}, which cannot be "
                "parted over tp. Set share_head=False."
            )
        # Everything but the layers is copied; of these only the chosen ones.
        kept = nn.ModuleList(layers[i] for i in chosen)
        memo = {id(model.get_submodule(path)): kept}
        copied = copy.deepcopy(model, memo)
        copied.set_submodule(path, copy.deepcopy(kept))
        return copied.to("meta")

    return ModelSource(
        name=name or type(model).__name__,
        make=make,
        loss=loss,
        kinds=kinds,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        counts=dict(counts or {}),
    )


_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


def _has_plain_layers(config: Any) -> bool:
    """Whether some layers have no experts, in the words of Qwen's and DeepSeek's configurations."""
    return bool(
        getattr(config, "mlp_only_layers", None)
        or getattr(config, "decoder_sparse_step", 1) != 1
        or getattr(config, "first_k_dense_replace", 0)
    )


def _signature(layer: nn.Module) -> tuple[object, ...]:
    shapes = ((name, tuple(x.shape), x.dtype) for name, x in layer.named_parameters())
    return type(layer), *shapes


def _kind(config: DecoderConfig, layer: int) -> str:
    words = [
        "window" if config.has_window(layer) else "",
        "experts" if config.has_experts(layer) else "",
        "plain" if layer in config.plain_layers else "",
    ]
    return " ".join(word for word in words if word) or "layer"


def _decoder(config: DecoderConfig, layers: Sequence[int], vocab_size: int) -> nn.Module:
    def kept(numbers: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(i for i, layer in enumerate(layers) if layer in numbers)

    experts: ExpertSettings | None = config.experts
    if experts is not None:
        experts = replace(experts, dense_layers=kept(experts.dense_layers))
    small = replace(
        config,
        num_layers=len(layers),
        vocab_size=vocab_size,
        full_layers=kept(config.full_layers),
        plain_layers=kept(config.plain_layers),
        experts=experts,
    )
    with torch.device("meta"):
        return Decoder(small).to(torch.bfloat16)


def _decoder_loss(model: Decoder, tokens_BT: Tensor) -> Tensor:
    return model.loss(model(tokens_BT), tokens_BT) / tokens_BT.numel()
