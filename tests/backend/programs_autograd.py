"""Programs whose difficulty is autograd."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .program import Call, Case, calls, collect, go_backward, one_call, program, snapshot


def leaf(*shape: int, **options):
    """Draw a tensor that wants a gradient."""
    return torch.randn(*shape, requires_grad=True, **options)


class Clipped(torch.autograd.Function):
    """Identity whose gradient is clipped."""

    @staticmethod
    def forward(ctx, x, limit):
        ctx.save_for_backward(x)
        ctx.limit = limit
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient.clamp(-ctx.limit, ctx.limit) * x.abs(), None


@program(graphs=1)
def custom_autograd_function():
    def f(x):
        return Clipped.apply(x.sin(), 0.5) * 3

    return calls(f, Call(leaf(4)), Call(leaf(4)))


@program(graphs=1)
def output_used_twice_after_the_call():
    def f(x):
        return x.sin()

    x = leaf(4)

    def script(run):
        y = run(x)
        (y * 2 + y.cos()).sum().backward()
        return snapshot([y, x.grad])

    return Case(f, script)


@program(graphs=1)
def only_one_of_two_outputs_used():
    def f(x, y):
        return x * y, (x + y).exp()

    x, y = leaf(4), leaf(4)

    def script(run):
        run(x, y)[0].sum().backward()
        return snapshot([x.grad, y.grad])

    return Case(f, script)


@program(graphs=2)
def some_inputs_want_no_gradient():
    def f(x, y, z):
        return x * y + z

    return calls(
        f,
        Call(leaf(4), torch.randn(4), leaf(4)),
        Call(torch.randn(4), leaf(4), torch.randn(4)),
    )


@program(graphs=1)
def gradient_of_one_input_only():
    def f(x, y):
        return (x * y).sin()

    x, y = leaf(4), leaf(4)

    def script(run):
        (gradient,) = torch.autograd.grad(run(x, y).sum(), [y])
        return snapshot([gradient, x.grad, y.grad])

    return Case(f, script)


@program(graphs=1)
def graph_retained():
    def f(x):
        return x.sin() * x

    x = leaf(4)

    def script(run):
        y = run(x)
        go_backward(y, retain_graph=True)
        first = snapshot(x.grad)
        go_backward(y)
        return [first, snapshot(x.grad)]

    return Case(f, script)


@program(graphs=1)
def checkpoint_inside():
    layers = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Dropout(0.2), nn.Linear(8, 8))

    def f(x):
        return checkpoint(layers, x, use_reentrant=False).sin()

    return calls(f, Call(leaf(2, 8)), Call(leaf(2, 8)), watch=[layers])


@program(graphs=1)
def checkpoint_of_each_layer():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

        def forward(self, x):
            for layer in self.layers:
                x = x + checkpoint(lambda y, layer=layer: layer(y).relu(), x, use_reentrant=False)
            return x

    return calls(Model(), Call(leaf(2, 8)), Call(leaf(2, 8)))


@program(graphs=1)
def functional_call():
    model = nn.Linear(4, 4)

    def f(parameters, x):
        return torch.func.functional_call(model, parameters, (x,))

    def parameters():
        return {"weight": leaf(4, 4), "bias": leaf(4)}

    return calls(f, Call(parameters(), leaf(2, 4)), Call(parameters(), leaf(2, 4)))


@program(graphs=1)
def vmap_of_a_dot_product():
    def f(xs, ys):
        return torch.func.vmap(lambda x, y: (x * y).sum())(xs, ys)

    return calls(f, Call(leaf(3, 4), leaf(3, 4)), Call(leaf(3, 4), leaf(3, 4)))


@program(graphs=1)
def gradient_taken_inside():
    def f(x):
        return torch.func.grad(lambda y: y.sin().sum())(x) * 2

    return calls(f, Call(torch.randn(4)), Call(torch.randn(4)))


@program(graphs=1)
def per_sample_gradients():
    def loss(weight, x):
        return (x @ weight).tanh().sum()

    def f(weight, xs):
        return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weight, xs)

    return calls(f, Call(torch.randn(4), torch.randn(3, 2, 4)))


@program(graphs=1)
def detach_inside():
    def f(x):
        quantized = (x * 4).round() / 4
        return x + (quantized - x).detach()

    return calls(f, Call(leaf(4)), Call(leaf(4)))


@program(graphs=1)
def no_grad_inside():
    model = nn.Linear(4, 4)

    def f(x):
        with torch.no_grad():
            target = model(x)
        return model(x) * target

    return calls(f, Call(leaf(2, 4)), Call(leaf(2, 4)), watch=[model])


@program(graphs=1)
def no_grad_decorator():
    @torch.no_grad()
    def f(x):
        return x.sin()

    return calls(f, Call(leaf(4)), Call(leaf(4)))


@program(graphs=None, breaks=("loss.backward()",))
def backward_inside():
    model = nn.Linear(4, 1)

    def step(x):
        model.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss.detach()

    return calls(step, Call(torch.randn(3, 4)), Call(torch.randn(3, 4)), watch=[model])


@program(graphs=None)
def whole_training_step_inside():
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=False)

    def step(x):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return calls(step, *(Call(torch.randn(3, 4)) for _ in range(3)), watch=[model])


@program(graphs=1)
def one_tensor_used_many_times():
    def f(x):
        y = x.tanh()
        return (y @ y.T).sum(0) + y.mean(1) + y[:, 0] * y[:, 1] + x.sum(1)

    return calls(f, Call(leaf(5, 5)), Call(leaf(5, 5)))


@program(graphs=1)
def output_that_is_an_intermediate_and_its_view():
    def f(x):
        y = x.sin()
        return y, y.view(2, 2)

    return calls(f, Call(leaf(4)), Call(leaf(4)))


@program(graphs=1)
def intermediate_that_is_an_output_and_used_again():
    def f(x):
        y = x.sin()
        return y, y.view(2, 2), y[1:].exp()

    return calls(f, Call(leaf(4)), Call(leaf(4)))


@program(graphs=1)
def saved_tensors_packed():
    def f(x):
        return (x.sin() * x.exp()).tanh()

    x = leaf(4)

    def script(run):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.double(), lambda t: t.float()):
            y = run(x)
        go_backward(y)
        return snapshot([y, x.grad])

    return Case(f, script)


@program(graphs=1)
def gradient_that_is_not_contiguous():
    def f(x):
        return x.sin()

    x = leaf(4, 3)

    def script(run):
        run(x).t().expand(2, 3, 4).sum().backward()
        return snapshot(x.grad)

    return Case(f, script)


@program(graphs=1)
def bfloat16_training():
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.SiLU(), nn.Linear(16, 4))
    model.bfloat16()
    return calls(
        model, Call(leaf(3, 8, dtype=torch.bfloat16)), Call(leaf(3, 8, dtype=torch.bfloat16))
    )


@program(graphs=1)
def attention_and_its_gradients():
    def f(q, k, v):
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    def qkv():
        return [leaf(2, 3, 5, 8) for _ in range(3)]

    return calls(f, Call(*qkv()), Call(*qkv()))


@program(graphs=1)
def embedding_with_padding():
    model = nn.Sequential(nn.Embedding(7, 4, padding_idx=0), nn.Linear(4, 2))
    return calls(model, *(Call(torch.randint(7, (3, 5))) for _ in range(2)))


@program(graphs=1)
def convolution():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    return calls(model, Call(leaf(2, 2, 8, 8)), Call(leaf(2, 2, 8, 8)))


@program(graphs=1)
def recurrent_cell():
    cell = nn.GRUCell(4, 4)

    def f(xs, state):
        for x in xs.unbind(1):
            state = cell(x, state)
        return state

    return calls(f, Call(leaf(2, 5, 4), leaf(2, 4)), watch=[cell])


@program(graphs=1)
def output_without_a_gradient():
    def f(x):
        return x.sin(), x.argmax(), (x > 0), x.detach() * 2

    return calls(f, Call(leaf(4)), Call(leaf(4)))


@program(graphs=1)
def loss_with_a_weighted_sum():
    def f(logits, labels):
        losses = nn.functional.cross_entropy(logits, labels, reduction="none", ignore_index=-100)
        weights = (labels != -100).float()
        return (losses * weights).sum() / weights.sum()

    labels = torch.tensor([1, -100, 0, 3])
    return calls(f, Call(leaf(4, 5), labels), Call(leaf(4, 5), labels.flip(0)))


@program(graphs=1)
def two_calls_in_one_backward():
    def f(x):
        return x.tanh() * 2

    x = leaf(4)

    def script(run):
        outputs = [run(x), run(x * 2), run(run(x))]
        go_backward(outputs)
        return [snapshot(outputs), snapshot(x.grad), one_call(run, Call(leaf(4)))]

    return Case(f, script)


PROGRAMS = collect(globals())
