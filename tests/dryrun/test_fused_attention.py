import pytest
import torch

from plait.cost.accelerators import find_cluster
from plait.cost.operations import Kind
from plait.dryrun.fused_attention import gpu_attention
from plait.dryrun.model_source import decoder_source
from plait.dryrun.piece import Shape
from plait.dryrun.pieces import PieceStore
from plait.models.decoder_config import DecoderConfig
from plait.nn import latent_attention
from plait.nn.attention import attend
from plait.nn.latent_attention import LatentSettings

HEADS, TOKENS = 4, 256
LATENT = LatentSettings(query_rank=None, rank=64, plain_size=32, rotary_size=16, value_size=32)
CONFIG = DecoderConfig(
    family="deepseek_v3",
    vocab_size=512,
    hidden_size=256,
    intermediate_size=512,
    num_layers=2,
    num_heads=HEADS,
    num_kv_heads=HEADS,
    head_size=16,
    max_positions=TOKENS,
    latent=LATENT,
)


def operands(dtype=torch.float64):
    torch.manual_seed(0)
    sizes = (48, 48, 32)
    return [torch.randn(2, HEADS, 24, size, dtype=dtype, requires_grad=True) for size in sizes]


def test_the_operator_that_stands_for_the_kernel_is_attention():
    with gpu_attention():
        fused = latent_attention.attend(*(x := operands()), mask_B1TS=None, scale=0.3)
    assert latent_attention.attend is attend
    plain = attend(*(y := operands()), mask_B1TS=None, scale=0.3)
    torch.testing.assert_close(fused, plain)
    fused.square().sum().backward()
    plain.square().sum().backward()
    for mine, theirs in zip(x, y, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


@pytest.mark.parametrize("is_backward", [False, True], ids=["forward", "backward"])
def test_latent_attention_is_priced_by_causal_pairs_and_keeps_no_scores(is_backward):
    store = PieceStore(decoder_source(CONFIG), find_cluster("h100", 1))
    layer = store.find(Shape(sequence_length=TOKENS)).layers["layer"]
    works = [each.at(1.0) for each in (layer.backward if is_backward else layer.forward)]
    kernels = [each.cost.flops for each in works if each.cost.kind is Kind.ATTENTION]
    pairs = TOKENS * (TOKENS + 1) // 2
    forward = 2 * HEADS * pairs * (48 + 32)  # FlashAttention-2, section 4.1
    assert kernels == [forward * 5 // 2 if is_backward else forward]
    assert max(each.num_bytes for each in layer.saved_tensors) < 2 * HEADS * TOKENS * TOKENS
