"""Programs whose difficulty is in layers that repeat: what a compiler may want to capture once."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .program import Call, Case, calls, collect, go_backward, one_call, program, snapshot

WIDTH = 6


def leaf(*shape: int, **options):
    """Draw a tensor that wants a gradient."""
    return torch.randn(*shape, requires_grad=True, **options)


class Block(nn.Module):
    """A residual layer; what it does beside is said by its arguments."""

    def __init__(self, width=WIDTH, *, dropout=0.0, scale=1.0):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)
        self.scale = scale

    def forward(self, x, bias=None):
        hidden = nn.functional.gelu(self.up(self.norm(x)))
        x = x + self.dropout(self.down(hidden)) * self.scale
        return x if bias is None else x + bias


class Wrapped(nn.Module):
    """A block and a function of its own around it."""

    def __init__(self, function):
        super().__init__()
        self.block = Block()
        self.function = function

    def forward(self, *args, **kwargs):
        return self.function(self.block, *args, **kwargs)


class Tower(nn.Module):
    """Blocks in a list, run by a function."""

    def __init__(self, blocks, run=None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.run = run

    def forward(self, x):
        if self.run is not None:
            return self.run(self.blocks, x)
        for block in self.blocks:
            x = block(x)
        return x


def two_calls(model: nn.Module, *, watch=()) -> Case:
    """Call with two inputs."""
    return calls(model, Call(leaf(3, WIDTH)), Call(leaf(3, WIDTH)), watch=watch)


def wrapped(function, count=4) -> Tower:
    """Make a tower of blocks with the same function around each."""
    return Tower(Wrapped(function) for _ in range(count))


@program(graphs=1)
def blocks_that_are_alike():
    return two_calls(Tower(Block() for _ in range(5)))


@program(graphs=1)
def blocks_in_a_sequential():
    return two_calls(nn.Sequential(*(Block() for _ in range(5))))


@program(graphs=1)
def blocks_with_dropout():
    return two_calls(Tower(Block(dropout=0.3) for _ in range(4)))


@program(graphs=1)
def blocks_with_a_number_of_their_own():
    return two_calls(Tower(Block(scale=1.0 / (i + 1)) for i in range(4)))


@program(graphs=1)
def blocks_of_two_kinds_in_turn():
    kinds = [Block, lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())]
    return two_calls(Tower(kinds[i % 2]() for i in range(6)))


@program(graphs=1)
def blocks_that_get_wider():
    layers = (
        layer for i in range(3) for layer in (Block(WIDTH * 2**i), Block(WIDTH * 2**i), Doubling())
    )
    return two_calls(Tower(layers))


class Doubling(nn.Module):
    """Twice as wide."""

    def forward(self, x):
        return torch.cat([x, x.sin()], -1)


@program(graphs=1)
def blocks_that_share_a_tensor():
    def run(blocks, x):
        bias = x.mean(0, keepdim=True).tanh()
        for block in blocks:
            x = block(x, bias)
        return x * bias

    return two_calls(Tower((Block() for _ in range(4)), run))


@program(graphs=1)
def blocks_that_read_the_first_input_twice():
    def twice(block, x, first):
        return block(x) + first * first.sigmoid() + first

    def run(blocks, x):
        first = x * 1.5
        for block in blocks:
            x = block(x, first)
        return x

    return two_calls(Tower((Wrapped(twice) for _ in range(4)), run))


@program(graphs=1)
def blocks_with_keyword_arguments_and_none():
    def run(blocks, x):
        for i, block in enumerate(blocks):
            x = block(x=x, bias=x.mean() if i % 2 else None)
        return x

    return two_calls(Tower((Block() for _ in range(4)), run))


@program(graphs=1)
def blocks_that_return_several_things():
    def several(block, x):
        y = block(x)
        return y, {"norm": y.norm(), "none": None, "count": 3}

    def run(blocks, x):
        total = 0
        for block in blocks:
            x, more = block(x)
            total = total + more["norm"] * more["count"]
        return x, total

    return two_calls(Tower((Wrapped(several) for _ in range(4)), run))


@program(graphs=1)
def blocks_that_return_their_input():
    def run(blocks, x):
        kept = []
        for block in blocks:
            x, before = block(x)
            kept.append(before)
        return x + sum(kept)

    return two_calls(Tower((Wrapped(lambda block, x: (block(x), x)) for _ in range(4)), run))


@program(graphs=1)
def blocks_that_return_a_view():
    def transposed(block, x):
        return block(x).t().t()[:, torch.arange(WIDTH - 1, -1, -1)].view(-1).view_as(x)

    return two_calls(wrapped(transposed))


@program(graphs=1)
def blocks_that_change_their_input():
    def in_place(block, x):
        y = block(x)
        y.mul_(0.5)
        y[0] += 1
        return y

    return two_calls(wrapped(in_place))


@program(graphs=1)
def blocks_that_change_what_they_share():
    def accumulate(block, x, total):
        y = block(x)
        total.add_(y.detach())
        return y

    def run(blocks, x):
        total = torch.zeros_like(x)
        for block in blocks:
            x = block(x, total)
        return x, total

    return two_calls(Tower((Wrapped(accumulate) for _ in range(4)), run))


@program(graphs=1)
def blocks_with_running_statistics():
    def layer():
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU())

    return two_calls(nn.Sequential(*(layer() for _ in range(4))))


@program(graphs=1)
def blocks_that_write_to_a_list():
    def run(blocks, x):
        outputs = [x]
        for block in blocks:
            outputs.append(block(outputs[-1]))
        return torch.stack(outputs[1:]).mean(0), outputs[-2]

    return two_calls(Tower((Block() for _ in range(4)), run))


@program(graphs=2)
def blocks_that_append_to_their_cache():
    cache = []

    def remember(block, x):
        y = block(x)
        cache.append(y.detach())
        return y + sum(cache)

    return two_calls(wrapped(remember, 3), watch=[cache])


def _handed_a_list(use):
    """Blocks that each get one list from the program, which returns how long it became."""

    def run(blocks, x):
        shared = [x * i for i in range(1, 7)]
        for block in blocks:
            x = block(x, shared)
        return x * len(shared) + sum(shared)

    class Sharing(Block):
        def forward(self, x, shared):
            return use(super().forward(x), shared)

    return two_calls(Tower((Sharing() for _ in range(4)), run))


@program(graphs=None)
def blocks_that_append_to_a_list_they_are_given():
    def append(x, shared):
        shared.append(x)
        return x + sum(shared)

    return _handed_a_list(append)


@program(graphs=None)
def blocks_that_take_from_a_list_they_are_given():
    return _handed_a_list(lambda x, shared: x + shared.pop())


@program(graphs=None)
def blocks_that_keep_a_slice_in_a_cache():
    class Cache:
        def __init__(self):
            self.kept = {}

    class Keeping(Block):
        def forward(self, x, cache):
            y = super().forward(x)
            cache.kept[len(cache.kept)] = y[:, -2:]
            return y * 1.5

    def run(blocks, x):
        cache = Cache()
        for block in blocks:
            x = block(x, cache)
        return x, *cache.kept.values()

    return two_calls(Tower((Keeping() for _ in range(3)), run))


@program(graphs=None, breaks=("print(",))
def blocks_that_print():
    def talk(block, x):
        print("layer", tuple(x.shape))  # noqa: T201
        return block(x)

    return two_calls(wrapped(talk, 2))


@program(graphs=None)
def blocks_that_branch_on_data():
    def branch(block, x):
        return block(x) if x.sum() > 0 else block(-x)

    return two_calls(wrapped(branch, 2))


@program(graphs=1)
def blocks_with_a_hook_on_one():
    model = Tower(Block() for _ in range(4))
    model.blocks[2].register_forward_hook(lambda module, args, output: output * 2)
    model.blocks[1].down.register_forward_hook(lambda module, args, output: output.tanh())
    return two_calls(model)


@program(graphs=1)
def blocks_of_which_some_are_frozen():
    model = Tower(Block() for _ in range(5))
    for block in model.blocks[1:3]:
        block.requires_grad_(False)
    model.blocks[4].norm.weight.requires_grad_(False)
    return two_calls(model)


@program(graphs=1)
def blocks_frozen_at_the_front():
    model = Tower(Block() for _ in range(4))
    model.blocks[:2].requires_grad_(False)
    return calls(model, Call(torch.randn(3, WIDTH)), Call(torch.randn(3, WIDTH)))


@program(graphs=1)
def blocks_without_gradients_at_the_front():
    def run(blocks, x):
        with torch.no_grad():
            for block in blocks[:2]:
                x = block(x)
        for block in blocks[2:]:
            x = block(x)
        return x

    return two_calls(Tower((Block() for _ in range(4)), run))


@program(graphs=1)
def blocks_that_share_all_weights():
    block = Block()
    return two_calls(Tower([block] * 4))


@program(graphs=1)
def blocks_that_share_one_weight():
    model = Tower(Block() for _ in range(4))
    for block in model.blocks[1:]:
        block.up.weight = model.blocks[0].up.weight
    return two_calls(model)


@program(graphs=1)
def blocks_run_twice_over():
    def run(blocks, x):
        for _ in range(2):
            for block in blocks:
                x = block(x)
        return x

    return two_calls(Tower((Block() for _ in range(3)), run))


@program(graphs=1)
def blocks_under_checkpoint():
    def run(blocks, x):
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x

    return two_calls(Tower((Block(dropout=0.2) for _ in range(4)), run))


@program(graphs=1)
def blocks_under_autocast():
    def run(blocks, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for block in blocks:
                x = block(x)
        return x.float()

    return two_calls(Tower((Block() for _ in range(4)), run))


@program(graphs=1)
def blocks_of_mixed_dtypes():
    model = Tower(Block() for _ in range(4))
    for block in model.blocks[2:]:
        block.double()

    def run(blocks, x):
        for block in blocks:
            x = block(x.to(block.norm.weight.dtype))
        return x

    model.run = run
    return two_calls(model)


@program(graphs=2)
def blocks_in_training_and_evaluation():
    model = Tower(Block(dropout=0.5) for _ in range(4))
    x = leaf(3, WIDTH)
    return calls(model, Call(x), Call(x, before=model.eval), Call(x, before=model.train))


@program(graphs=2)
def blocks_of_which_one_is_in_evaluation():
    model = Tower(Block(dropout=0.5) for _ in range(4))
    x = leaf(3, WIDTH)
    return calls(model, Call(x), Call(x, before=model.blocks[1].eval))


@program(graphs=2)
def blocks_with_several_lengths():
    model = Tower(Block() for _ in range(4))
    return calls(model, *(Call(leaf(n, WIDTH)) for n in (3, 5, 8, 4)))


@program(graphs=2)
def blocks_skipped_by_a_number():
    model = Tower(Block() for _ in range(4))

    def f(x, depth):
        for i, block in enumerate(model.blocks):
            if i >= depth:
                break
            x = block(x)
        return x

    return calls(f, Call(leaf(3, WIDTH), 4), Call(leaf(3, WIDTH), 2), watch=[model])


@program(graphs=1)
def blocks_with_random_depth():
    # A layer is dropped by a random tensor, not by Python [Huang et al. 2016, arXiv:1603.09382].
    def drop(block, x):
        return x + torch.bernoulli(torch.full((), 0.5)) * (block(x) - x)

    return two_calls(wrapped(drop))


@program(graphs=1)
def blocks_with_attention():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(8, 24)
            self.out = nn.Linear(8, 8)

        def forward(self, x, mask):
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.1)
            return x + self.out(y.transpose(1, 2).flatten(2))

    def run(blocks, x):
        mask = torch.zeros(x.shape[1], x.shape[1]).masked_fill(
            torch.ones(x.shape[1], x.shape[1]).triu(1) > 0, float("-inf")
        )
        for block in blocks:
            x = block(x, mask)
        return x

    model = Tower((Attention() for _ in range(4)), run)
    return calls(model, Call(leaf(2, 5, 8)), Call(leaf(2, 5, 8)))


@program(graphs=1)
def blocks_with_skips_between_them():
    def merge(block, x, earlier):
        return block(x) + 0.5 * earlier

    def run(blocks, x):
        kept = []
        for block in blocks[:3]:
            x = block(x, x)
            kept.append(x)
        for block in blocks[3:]:
            x = block(x, kept.pop())
        return x

    return two_calls(Tower((Wrapped(merge) for _ in range(6)), run))


@program(graphs=1)
def blocks_of_an_encoder_and_a_decoder():
    def cross(block, x, memory):
        return block(x) + (x @ memory.T).softmax(-1) @ memory

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = Tower(Block() for _ in range(3))
            self.decoder = nn.ModuleList(Wrapped(cross) for _ in range(3))

        def forward(self, source, target):
            memory = self.encoder(source)
            for block in self.decoder:
                target = block(target, memory)
            return target

    def arguments():
        return leaf(4, WIDTH), leaf(3, WIDTH)

    return calls(Pair(), Call(*arguments()), Call(*arguments()))


@program(graphs=1)
def blocks_of_which_one_does_not_reach_the_loss():
    def run(blocks, x):
        side = blocks[3](x)
        for block in blocks[:3]:
            x = block(x)
        return x, side.detach()

    return two_calls(Tower((Block() for _ in range(4)), run))


@program(graphs=2)
def blocks_changed_between_calls():
    model = Tower(Block() for _ in range(3))

    def change():
        torch.manual_seed(7)
        model.blocks.append(Block())
        model.blocks[0].scale = 3.0

    return calls(model, Call(leaf(3, WIDTH)), Call(leaf(3, WIDTH), before=change))


@program(graphs=1)
def blocks_whose_outputs_are_all_in_the_loss():
    model = Tower((Block() for _ in range(4)), lambda blocks, x: [x := b(x) for b in blocks])

    def script(run):
        x = leaf(3, WIDTH)
        outputs = run(x)
        gradients = torch.autograd.grad(outputs[3].sum(), [x], retain_graph=True)
        go_backward(outputs[::2])
        return [snapshot([*outputs, *gradients, x.grad]), one_call(run, Call(x), [model])]

    return Case(model, script)


PROGRAMS = collect(globals())
