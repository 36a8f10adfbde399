import pytest
import torch
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import plait
import plait.ops.attention
import plait.ops.gated  # registers the operator
import plait.ops.linear_cross_entropy
from plait.cost.clusters import h200
from plait.cost.operations import FREE, Kind, cost_of, operation_s
from plait.errors import GraphError
from plait.graph.graph import Role, Value, describe
from plait.graph.schedule import name_of

DEVICE = h200(1).device


def new(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def priced(operator, *args, result=None, **kwargs):
    namespace, name, overload = operator.split(".")
    call = getattr(getattr(getattr(torch.ops, namespace), name), overload)
    return cost_of(operator, args, kwargs, call(*args, **kwargs) if result is None else result)


@pytest.mark.parametrize(
    ("operator", "args"),
    [
        ("aten.mm.default", (new(6, 8), new(8, 10))),
        ("aten.addmm.default", (new(10), new(6, 8), new(8, 10))),
        ("aten.bmm.default", (new(3, 6, 8), new(3, 8, 10))),
        ("aten.baddbmm.default", (new(3, 6, 10), new(3, 6, 8), new(3, 8, 10))),
        (
            "aten.convolution.default",
            (new(2, 3, 9, 9), new(5, 3, 3, 3), None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1),
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_arithmetic_is_what_pytorch_counts(operator, args):
    namespace, name, overload = operator.split(".")
    call = getattr(getattr(getattr(torch.ops, namespace), name), overload)
    with FlopCounterMode(display=False) as counter:
        call(*args)
    cost = priced(operator, *args)
    assert cost.kind is Kind.MATRIX
    assert cost.flops == counter.get_total_flops() > 0


def test_a_product_counts_its_operands_and_its_result():
    cost = priced("aten.mm.default", new(6, 8), new(8, 10))
    assert cost.bytes == 2 * (6 * 8 + 8 * 10 + 6 * 10)
    assert cost.sizes == (6, 8, 10)


def test_values_are_as_good_as_tensors():
    tensors = (new(6, 8), new(8, 10), new(6, 10))
    a, b, c = (describe(Role.INPUT, "x", x) for x in tensors)
    assert isinstance(a, Value)
    assert cost_of("aten.mm.default", (a, b), {}, c) == priced("aten.mm.default", *tensors[:2])


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_attention_counts_pairs_of_query_and_key(is_causal):
    batch, heads, tokens, size = 2, 3, 5, 16
    q, k = torch.zeros(batch, heads, tokens, size), torch.zeros(batch, 1, tokens, size)
    operator = "aten._scaled_dot_product_flash_attention_for_cpu.default"
    results = (torch.empty_like(q), torch.empty(batch, tokens, heads))
    forward = cost_of(operator, (q, k, k, 0.0, is_causal), {}, results)
    pairs = sum(i + 1 if is_causal else tokens for i in range(tokens))
    assert forward.kind is Kind.ATTENTION
    assert forward.flops == batch * heads * pairs * size * 2 * 2
    backward = cost_of(
        operator.replace("cpu.", "cpu_backward."),
        (q, q, k, k, results[0], results[1], 0.0, is_causal),
        {},
        (q, k, k),
    )
    assert backward.flops == 2.5 * forward.flops


def test_attention_on_a_cpu_counts_the_blocks_of_its_kernel():
    operator = "aten._scaled_dot_product_flash_attention_for_cpu.default"

    def blocks(queries, keys, *, is_causal, dtype=torch.bfloat16):
        q = torch.zeros(2, 4, queries, 16, dtype=dtype)
        k = torch.zeros(2, 4, keys, 16, dtype=dtype)
        return cost_of(operator, (q, k, k, 0.0, is_causal), {}, (q,)).pieces / 8

    assert blocks(128, 128, is_causal=True) == 4  # of 32 queries
    assert blocks(512, 512, is_causal=True) == 8  # of 64
    assert blocks(1024, 1024, is_causal=False) == 4 * 2  # of 256, and of 512 keys
    assert blocks(1024, 1024, is_causal=True) == 1 + 1 + 2 + 2
    assert blocks(33, 1, is_causal=False) == 2
    q = new(2, 4, 32, 16)
    packet = torch.ops.aten._scaled_dot_product_flash_attention
    assert cost_of(f"{packet}.default", (q, q, q), {}, (q,)).pieces == 0  # of a GPU


@pytest.mark.parametrize("flavour", ["flash", "efficient", "cudnn"])
def test_flavours_of_attention_agree_with_pytorch(flavour):
    packet = getattr(torch.ops.aten, f"_scaled_dot_product_{flavour}_attention")
    q, k = new(2, 4, 32, 16), new(2, 4, 64, 16)
    extra = () if flavour == "flash" else (None, False)
    counted = flop_registry[packet](q.shape, k.shape, k.shape, out_val=q.shape)
    cost = cost_of(f"{packet}.default", (q, k, k, *extra), {}, (q,))
    assert cost.flops == counted


def test_plaits_own_operators_are_priced():
    q = torch.zeros(1, 2, 8, 4)
    attention = priced("plait.blocked_causal_attention.default", q, q, q, 1.0, result=q)
    assert attention.flops == 2 * (8 * 9 // 2) * 4 * 4
    windowed = priced("plait.blocked_causal_attention.default", q, q, q, 1.0, 3, result=q)
    assert windowed.flops == 2 * (1 + 2 + 6 * 3) * 4 * 4
    x = new(4, 16, dtype=torch.float32)
    orthogonal = priced("plait.orthogonalize.default", x, torch.float32, result=x)
    assert (orthogonal.kind, orthogonal.flops) == (Kind.MATRIX, 34 * 4**3 + 4 * 4**2 * 16)
    gate = priced("plait.gated.default", x, x, "silu", result=x)
    assert (gate.kind, gate.bytes) == (Kind.MEMORY, 3 * 4 * 4 * 16)
    hidden, weight = new(6, 8, dtype=torch.float32), new(10, 8, dtype=torch.float32)
    targets = torch.zeros(6, dtype=torch.long, device="meta")
    costs = [
        priced(f"plait.{name}.default", hidden, weight, targets, torch.bfloat16, gradients)
        for name in ("linear_cross_entropy", "linear_cross_entropy_rows")
        for gradients in (False, True)
    ]
    product = 2 * 6 * 8 * 10
    assert [each.flops for each in costs] == [product, 3 * product, product, 2 * product]
    assert costs[0].dtype is torch.bfloat16


def test_pointwise_operators_cost_their_bytes():
    cost = priced("aten.add.Tensor", new(4, 8), new(8).expand(4, 8))
    assert (cost.kind, cost.bytes) == (Kind.MEMORY, 2 * (32 + 8 + 32))
    joined = priced("aten.cat.default", [new(4, 8), new(2, 8)])
    assert joined.bytes == 2 * (48 + 48)


def test_an_optimizers_kernel_that_returns_nothing_costs_what_it_reads_and_writes():
    def step(*shape):
        lists = [[new(*shape, dtype=torch.float32)] for _ in range(4)]
        rates = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0, "eps": 1e-8}
        flags = {"amsgrad": False, "maximize": False}
        count = [new(1, dtype=torch.float32)]
        operator = "aten._fused_adamw_.default"
        return cost_of(operator, (*lists, [], count), {**rates, **flags}, ())

    small, large = step(8, 16), step(80, 16)
    assert small.kind is Kind.MEMORY
    assert small.bytes >= 7 * 4 * 8 * 16  # four are read, three written
    assert large.bytes > 9 * small.bytes
    added = [[new(4, 8)], [new(4, 8)]]
    assert cost_of("aten._foreach_add_.List", added, {}, ()).bytes == 3 * 2 * 4 * 8


def test_a_gather_reads_what_it_yields_and_not_the_whole_table():
    table, tokens = new(1000, 8), torch.zeros(3, dtype=torch.long, device="meta")
    assert priced("aten.embedding.default", table, tokens).bytes == 2 * (24 + 24) + 8 * 3


@pytest.mark.parametrize(
    ("operator", "args"),
    [
        ("aten.view.default", (new(4, 8), [8, 4])),
        ("aten.t.default", (new(4, 8),)),
        ("aten._unsafe_view.default", (new(4, 8), [32])),
        ("aten.empty.memory_format", ([4, 8],)),
    ],
)
def test_views_and_empty_memory_are_free(operator, args):
    assert priced(operator, *args) == FREE
    assert operation_s(FREE, DEVICE) == 0


def test_getitem_and_sizes_are_free_and_messages_are_not_priced_here():
    assert cost_of("getitem", ((new(2),), 0), {}, new(2)) == FREE
    assert cost_of("python:operator.mul", (2, 3), {}, 6) == FREE
    x = new(4)
    assert cost_of("_c10d_functional.wait_tensor.default", (x,), {}, x) == FREE
    for operator in ("_c10d_functional.all_reduce.default", "call:block.forward"):
        with pytest.raises(GraphError, match="no single computation"):
            cost_of(operator, (x,), {}, x)


def test_time_is_the_longer_of_arithmetic_and_bytes_but_never_below_a_launch():
    large = priced("aten.mm.default", new(8192, 8192), new(8192, 8192))
    share = DEVICE.matrix_efficiency_at(8192, 8192, 8192, dtype=torch.bfloat16)
    assert operation_s(large, DEVICE) == pytest.approx(2 * 8192**3 / (989e12 * share))
    added = priced("aten.add.Tensor", new(8192, 8192), new(8192, 8192))
    assert operation_s(added, DEVICE) == pytest.approx(3 * 2 * 8192**2 / 4.8e12)
    tiny = priced("aten.add.Tensor", new(2), new(2))
    assert operation_s(tiny, DEVICE) == DEVICE.launch_s


def test_fewer_rows_take_less_time_but_not_in_proportion():
    whole, half = (
        operation_s(priced("aten.mm.default", new(rows, 8192), new(8192, 3584)), DEVICE)
        for rows in (4096, 2048)
    )
    assert 0.5 < half / whole < 0.54


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 32)
        self.qkv = nn.Linear(32, 96)
        self.out = nn.Linear(32, 50)

    def forward(self, tokens):
        q, k, v = self.qkv(self.table(tokens)).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        x = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(x.transpose(1, 2).flatten(2)).logsumexp(-1).sum()


def test_every_node_of_a_captured_step_has_a_price():
    torch.manual_seed(0)
    model, tokens = Attends(), torch.randint(50, (2, 16))
    graph = plait.capture(model, tokens)
    with FlopCounterMode(display=False) as counter:
        model(tokens).backward()
    counted = counter.get_flop_counts()["Global"]
    costs = []
    for template in graph.templates.values():
        assert template.joint is not None
        for node in template.joint.graph.nodes:
            if node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda x: x.meta["val"])
                operator = name_of(node.target)
                assert operator is not None
                costs.append(cost_of(operator, args, kwargs, node.meta["val"]))
    flops = sum(cost.flops for cost in costs if cost.kind is Kind.MATRIX)
    assert flops == counted[torch.ops.aten.mm] + counted[torch.ops.aten.addmm]
    assert sum(cost.kind is Kind.ATTENTION for cost in costs) == 2
    assert all(operation_s(cost, DEVICE) > 0 for cost in costs if cost.kind is not Kind.FREE)


@pytest.mark.parametrize(
    ("left", "right", "result", "flops"),
    [
        ((12, 8), (3, 8, 5), (12, 5), 2 * 12 * 8 * 5),
        ((6, 12), (12, 5), (3, 6, 5), 2 * 6 * 12 * 5),
        ((3, 4, 8), (3, 8, 5), (3, 4, 5), 3 * 2 * 4 * 8 * 5),
        ((3, 6, 8), (8, 12), (6, 12), 2 * 6 * 8 * 12),
    ],
    ids=["rows", "inner", "all", "columns"],
)
def test_grouped_products_count_each_row_once(left, right, result, flops):
    offsets = None if len(left) == len(right) == 3 else new(3, dtype=torch.int32)
    found = priced(
        "aten._grouped_mm.default", new(*left), new(*right), offsets, result=new(*result)
    )
    assert (found.kind, found.flops) == (Kind.MATRIX, flops)


def test_grouped_products_of_transformers_are_known():
    import transformers.integrations.moe  # noqa: F401  registers the operators

    x, weight, offsets = new(12, 8), new(3, 8, 5), new(3, dtype=torch.int32)
    forward = priced("transformers.grouped_mm_fallback.default", x, weight, offsets)
    backward = priced(
        "transformers.grouped_mm_fallback_backward.default", x, weight, offsets, new(12, 5)
    )
    assert forward.flops == 2 * 12 * 8 * 5
    assert backward.flops == 2 * forward.flops
