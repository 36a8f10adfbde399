"""Programs whose difficulty is the tensors: views, mutation, dtypes, shapes, layouts."""

import torch
from torch import nn

from .program import Call, calls, collect, program


def leaf(*shape: int, **options):
    """Draw a tensor that wants a gradient."""
    return torch.randn(*shape, requires_grad=True, **options)


@program(graphs=1)
def mutation_through_a_view():
    def f(x):
        y = x.clone()
        y[1:].mul_(2)
        y.view(-1)[0] = 5.0
        y.t_() if y.dim() == 2 else y.relu_()
        return y

    return calls(f, Call(leaf(4)), Call(leaf(4)))


@program(graphs=1)
def mutation_of_an_input():
    def f(x, y):
        x.add_(1)
        x[0] = y.detach()[0]
        return x * y

    return calls(f, Call(torch.randn(4), leaf(4)), Call(torch.randn(4), leaf(4)))


@program(graphs=1)
def mutation_of_an_input_with_a_gradient():
    def f(x, y):
        x.mul_(y)
        return x.sin()

    def arguments():
        base = leaf(4)
        bases.append(base)
        return base * 1, leaf(4)

    bases = []
    return calls(f, Call(*arguments()), Call(*arguments()), watch=bases)


@program(graphs=1)
def output_that_is_a_view_of_an_input():
    def f(x):
        return x[1:], x.view(2, 2), x, x.detach()

    return calls(f, Call(leaf(4)), Call(torch.ones(4, requires_grad=True)))


@program(graphs=1)
def inputs_that_share_memory():
    def f(x, y):
        x.add_(1)
        return x * y

    def arguments():
        base = torch.randn(6)
        return base[:4], base[2:]

    return calls(f, Call(*arguments()), Call(*arguments()))


@program(graphs=1)
def output_resized_and_strided():
    def f(x):
        return x.as_strided((2, 2), (1, 2)), x.unfold(0, 2, 1).sum(1), x.t()

    return calls(f, Call(leaf(4, 4)), Call(leaf(4, 4)))


@program(graphs=1)
def complex_numbers():
    def f(x, y):
        z = torch.complex(x, y)
        return torch.fft.fft(z), z.conj() * z.abs(), torch.view_as_real(z * 1j), z.angle()

    return calls(f, Call(leaf(4), leaf(4)), Call(leaf(4), leaf(4)))


@program(graphs=1)
def complex_inputs():
    def f(z):
        return (z @ z.mH).real, z.exp()

    return calls(
        f, Call(leaf(3, 3, dtype=torch.complex64)), Call(leaf(3, 3, dtype=torch.complex64))
    )


@program(graphs=3, breaks=("mask.logical_not()",))
def integers_and_booleans():
    def f(n, mask):
        return n // 3, n % 2 == 0, n[mask.logical_not()].shape is not None, n << 1, (~mask).sum()

    def arguments():
        return torch.randint(20, (5,)), torch.rand(5) > 0.5

    return calls(f, Call(*arguments()), Call(*arguments()))


@program(graphs=2)
def empty_tensors():
    def f(x):
        return torch.cat([x, x[:0]]).sum(0), x[:0] * 2, x.new_zeros(0, 3)

    return calls(f, Call(leaf(0, 3)), Call(leaf(4, 3)))


@program(graphs=1)
def empty_reduction():
    def f(x):
        return x.sum(), x.prod(), x.any(), x.mean(1)

    return calls(f, Call(leaf(0, 3)), Call(leaf(0, 3)))


@program(graphs=3)
def layouts_of_the_input():
    def f(x):
        return x * 2, x.sum(0), x.reshape(-1).sin()

    return calls(
        f,
        Call(leaf(4, 3)),
        Call(torch.randn(3, 4).t().requires_grad_()),
        Call(torch.randn(3).expand(4, 3).requires_grad_()),
        Call(leaf(4, 3)),
    )


@program(graphs=1)
def channels_last():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).to(memory_format=torch.channels_last)

    def image():
        return torch.randn(2, 3, 6, 6).to(memory_format=torch.channels_last).requires_grad_()

    return calls(model, Call(image()), Call(image()))


@program(graphs=1)
def where_and_masks():
    def f(x, y):
        chosen = torch.where(x > y, x, y.exp())
        return chosen.masked_fill(chosen > 1, 0.0), x.clamp(min=y), torch.maximum(x, y)

    return calls(f, Call(leaf(4), leaf(4)), Call(leaf(4), leaf(4)))


@program(graphs=None, breaks=("torch.nonzero(",))
def nonzero_of_data():
    def f(x):
        index = torch.nonzero(x > 0).squeeze(1)
        return x[index] * 2, index

    return calls(f, Call(leaf(6)), Call(leaf(6)), Call(leaf(6)))


@program(graphs=None, breaks=("x[x > 0]",))
def boolean_index():
    def f(x):
        return x[x > 0].sin().sum()

    return calls(f, Call(leaf(6)), Call(leaf(6)))


@program(graphs=None, breaks=("torch.unique(",))
def unique_values():
    def f(n):
        values, counts = torch.unique(n, return_counts=True)
        return values * counts

    return calls(f, *(Call(torch.randint(4, (6,))) for _ in range(3)))


@program(graphs=1)
def sort_and_top_k():
    def f(x):
        values, index = x.sort(dim=-1, descending=True, stable=True)
        top = x.topk(2, dim=-1)
        return values * 2, index, top.values, top.indices, x.argsort(), x.median(dim=1)

    return calls(f, Call(leaf(3, 5)), Call(leaf(3, 5)))


@program(graphs=1)
def scatter_and_gather():
    def f(x, index):
        rows = torch.zeros(4, 3).scatter_add(0, index, x)
        rows = rows.index_put((index[0],), x[0], accumulate=True)
        return rows, x.gather(0, index % 2), x.index_select(1, index[:, 0] % 3), rows.cumsum(0)

    def arguments():
        return leaf(2, 3), torch.randint(4, (2, 3))

    return calls(f, Call(*arguments()), Call(*arguments()))


@program(graphs=1)
def einsum_of_three():
    def f(a, b, c):
        return torch.einsum("bij,bjk,kl->bil", a, b, c)

    def arguments():
        return leaf(2, 3, 4), leaf(2, 4, 5), leaf(5, 2)

    return calls(f, Call(*arguments()), Call(*arguments()))


@program(graphs=4)
def dtypes_across_calls():
    def f(x):
        return (x * 2 + 1).sum(0)

    kinds = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.float32]
    return calls(f, *(Call(torch.ones(3, 2, dtype=kind)) for kind in kinds))


@program(graphs=2)
def lengths_across_calls():
    model = nn.Sequential(nn.Embedding(7, 8), nn.LayerNorm(8), nn.Linear(8, 3))

    def f(tokens):
        return nn.functional.softmax(model(tokens), -1)

    lengths = (5, 6, 9, 12, 7, 5)
    return calls(f, *(Call(torch.randint(7, (2, n))) for n in lengths), watch=[model])


@program(graphs=2)
def attention_of_several_lengths():
    def f(q, k, v):
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def qkv(length):
        return [leaf(2, 2, length, 8) for _ in range(3)]

    return calls(f, *(Call(*qkv(n)) for n in (5, 8, 11, 6)))


@program(graphs=2)
def shapes_in_the_arithmetic():
    def f(x):
        size, width = x.shape
        return x.view(size * width) / (size + width) + torch.arange(x.numel()), [size, width]

    return calls(f, *(Call(leaf(n, 3)) for n in (4, 5, 7)))


@program(graphs=1)
def random_numbers():
    def f(x):
        noise = torch.randn_like(x) + torch.rand(4)
        order = torch.randperm(4)
        return x[order] * torch.bernoulli(torch.full((4,), 0.5)) + noise, torch.randint(9, (3,))

    return calls(f, Call(leaf(4)), Call(leaf(4)), Call(leaf(4)))


@program(graphs=1)
def random_numbers_in_both_passes():
    def f(x):
        x = nn.functional.dropout(x, 0.4)
        x = nn.functional.rrelu(x, training=True)
        return nn.functional.dropout(x, 0.4), torch.multinomial(x.detach().abs() + 0.1, 2)

    return calls(f, Call(leaf(8)), Call(leaf(8)))


@program(graphs=1)
def tensors_made_inside():
    def f(x):
        table = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        steps = torch.linspace(0, 1, 2, dtype=x.dtype, device=x.device)
        return x @ table + steps + torch.full_like(x, 2) + torch.eye(2), torch.zeros_like(x)

    return calls(f, Call(leaf(3, 2)[:2].detach()), Call(torch.ones(2, 2)))


@program(graphs=1)
def type_promotion():
    def f(x, n):
        return x * n, n / 2, x.half() + x.bfloat16(), x.double() + 1, n + 0.5, x.to(n.dtype)

    return calls(f, Call(leaf(4), torch.arange(4)), Call(leaf(4), torch.arange(4)))


@program(graphs=1)
def splitting_and_joining():
    def f(x):
        a, b = x.chunk(2, dim=-1)
        first, *rest = torch.unbind(torch.stack([a, b, a * b]))
        return torch.cat([first, *rest], -1), torch.split(x, [1, 3], dim=1)[1], x.roll(1, 0)

    return calls(f, Call(leaf(3, 4)), Call(leaf(3, 4)))


@program(graphs=1)
def linear_algebra():
    def f(x):
        gram = x @ x.T + torch.eye(3)
        lower = torch.linalg.cholesky(gram)
        return torch.linalg.solve(gram, x), lower.logdet(), torch.linalg.norm(x)

    return calls(f, Call(leaf(3, 3)), Call(leaf(3, 3)))


@program(graphs=1)
def numbers_that_are_not_finite():
    def f(x):
        return x.log(), x / 0, torch.nan_to_num(x / x), (x / 0).isinf()

    return calls(f, Call(torch.tensor([-1.0, 0.0, 1.0], requires_grad=True)))


@program(graphs=1)
def scalars_as_tensors():
    def f(x, scale):
        return x * scale, scale + 1, x.sum() ** scale

    return calls(
        f,
        Call(torch.rand(3).requires_grad_(), torch.tensor(2.0, requires_grad=True)),
        Call(torch.rand(3).requires_grad_(), torch.tensor(0.5, requires_grad=True)),
    )


PROGRAMS = collect(globals())


@program(graphs=1)
def images_of_another_size():
    def f(x):
        modes = ("nearest", "bilinear", "bicubic", "area", "nearest-exact")
        resized = [nn.functional.interpolate(x, size=(13, 11), mode=mode) for mode in modes]
        smaller = nn.functional.interpolate(x, size=(5, 5), mode="bilinear", antialias=True)
        return sum(resized), smaller, nn.functional.interpolate(x[0], size=13, mode="linear")

    return calls(f, Call(leaf(2, 3, 8, 8)), Call(leaf(2, 3, 8, 8)))
