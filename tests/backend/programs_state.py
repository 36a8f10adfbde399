"""Programs whose difficulty is state: modules, buffers, counters, hooks, modes."""

import copy

import torch
from torch import nn
from torch.nn.utils import parametrizations

from .program import SEED, Call, Case, calls, collect, one_call, program, snapshot_state


def leaf(*shape: int, **options):
    """Draw a tensor that wants a gradient."""
    return torch.randn(*shape, requires_grad=True, **options)


class Counting(nn.Module):
    """A linear layer that counts its calls, in Python and in a buffer."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.num_calls = 0
        self.register_buffer("total", torch.zeros(4))
        self.seen = []

    def forward(self, x):
        self.num_calls += 1
        y = self.linear(x)
        self.total += y.detach().sum(0)
        return y


class Stack(nn.Module):
    """Layers that repeat, in each of the containers."""

    def __init__(self, width=8, num_layers=3):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(num_layers))
        self.heads = nn.ModuleDict({"a": nn.Linear(width, 2), "b": nn.Linear(width, 3)})
        self.factor = 1.0

    def forward(self, x, head="a"):
        outputs = [x := layer(x).relu() for layer in self.layers]
        return self.heads[head](sum(outputs)) * self.factor


@program(graphs=4)
def module_with_a_counter_and_a_buffer():
    # Dynamo takes integers of modules as constants: one graph for each value.
    return calls(Counting(), *(Call(leaf(3, 4)) for _ in range(4)))


@program(graphs=1)
def batch_norm_in_training():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU())
    return calls(model, *(Call(leaf(6, 4)) for _ in range(3)))


@program(graphs=2)
def training_and_evaluation_in_turn():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
    x = leaf(6, 4)
    return calls(model, Call(x), Call(x, before=model.eval), Call(x, before=model.train), Call(x))


@program(graphs=1)
def dropout_with_a_seed():
    model = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.3), nn.Linear(16, 4), nn.AlphaDropout())
    return calls(model, *(Call(leaf(6, 16)) for _ in range(3)))


@program(graphs=1)
def tied_weights():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(11, 6)
            self.head = nn.Linear(6, 11, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, tokens):
            return self.head(self.embedding(tokens).tanh())

    return calls(Tied(), *(Call(torch.randint(11, (3, 5))) for _ in range(2)))


@program(graphs=2)
def attribute_that_changes():
    model = Stack()

    def change():
        model.factor = 0.25

    return calls(model, Call(leaf(2, 8)), Call(leaf(2, 8), before=change))


@program(graphs=2)
def module_list_and_module_dict():
    return calls(Stack(), Call(leaf(2, 8)), Call(leaf(2, 8), "b"), Call(leaf(2, 8), head="a"))


@program(graphs=1)
def sequential_of_repeated_layers():
    def block():
        return nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)

    return calls(nn.Sequential(*(block() for _ in range(4))), Call(leaf(2, 5, 16)))


@program(graphs=1)
def one_layer_used_three_times():
    layer = nn.Linear(8, 8)
    model = nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), layer)
    return calls(model, Call(leaf(2, 8)), Call(leaf(2, 8)))


@program(graphs=1)
def forward_hooks():
    model, log = Stack(), []
    model.layers[0].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    model.layers[1].register_forward_hook(lambda module, args, output: output + 1)

    def note(module, args, output):
        log.append(tuple(output.shape))

    model.layers[2].register_forward_hook(note)
    return calls(model, Call(leaf(2, 8)), watch=[log])


@program(graphs=2)
def hook_that_keeps_an_activation():
    model, kept = Stack(), {}

    def keep(module, args, output):
        kept["last"] = output

    model.layers[2].register_forward_hook(keep)
    return calls(model, Call(leaf(2, 8)), Call(leaf(2, 8)), watch=[kept])


@program(graphs=None)
def backward_hook_of_a_module():
    model, log = Stack(), []

    def halve(module, input_gradients, output_gradients):
        log.append(output_gradients[0].sum().item())
        return tuple(g * 0.5 for g in input_gradients)

    model.layers[1].register_full_backward_hook(halve)
    return calls(model, Call(leaf(2, 8)), Call(leaf(2, 8)), watch=[log])


@program(graphs=1)
def hook_of_a_tensor():
    def f(x):
        y = x.sin()
        y.register_hook(lambda gradient: gradient.clamp(-0.1, 0.1))
        return y.cos()

    return calls(f, Call(leaf(4)), Call(leaf(4)))


@program(graphs=1)
def hook_of_a_parameter():
    model, log = nn.Linear(4, 4), []
    model.weight.register_hook(lambda gradient: gradient * 2)
    model.bias.register_post_accumulate_grad_hook(lambda p: log.append(p.grad.sum().item()))
    return calls(model, Call(leaf(2, 4)), Call(leaf(2, 4)), watch=[log])


@program(graphs=1)
def frozen_parameter():
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    model[0].weight.requires_grad_(False)
    return calls(model, Call(leaf(2, 4)), Call(leaf(2, 4)))


@program(graphs=2)
def parameter_frozen_between_calls():
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))

    def freeze():
        model[0].requires_grad_(False)

    return calls(model, Call(leaf(2, 4)), Call(leaf(2, 4), before=freeze))


@program(graphs=2)
def gradient_mode_switched():
    model = nn.Linear(4, 4)

    def script(run):
        records = []
        for is_on in (True, False, True):
            with torch.set_grad_enabled(is_on):
                records.append(one_call(run, Call(leaf(2, 4)), [model]))
        return records

    return Case(model, script)


@program(graphs=2)
def inference_mode():
    model = nn.Linear(4, 4)

    def script(run):
        with torch.inference_mode():
            first = run(torch.ones(2, 4)).tolist()
        return [first, one_call(run, Call(leaf(2, 4)), [model])]

    return Case(model, script)


@program(graphs=1)
def optimizer_steps_between_calls():
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, foreach=False)

    def script(run):
        losses = []
        for _ in range(4):
            loss = run(torch.ones(2, 4)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return [losses, snapshot_state(model)]

    return Case(model, script)


@program(graphs=1)
def gradients_accumulate_over_two_calls():
    model = nn.Linear(4, 4)

    def script(run):
        for _ in range(2):
            run(leaf(3, 4)).square().sum().backward()
        return snapshot_state(model)

    return Case(model, script)


@program(graphs=1)
def weights_loaded_between_calls():
    model, donor = nn.Linear(4, 4), nn.Linear(4, 4)
    x = leaf(2, 4)
    load = Call(x, before=lambda: model.load_state_dict(donor.state_dict()))
    return calls(model, Call(x), load)


@program(graphs=1)
def state_dict_of_the_compiled_module():
    model = Stack()

    def script(run):
        before = {key: value.clone() for key, value in run.state_dict().items()}
        first = one_call(run, Call(leaf(2, 8)), [model])
        with torch.no_grad():
            for parameter in run.parameters():
                parameter.zero_()
        run.load_state_dict(before)
        again = one_call(run, Call(leaf(2, 8)), [model])
        return [first, again, [value.sum().item() for value in before.values()]]

    return Case(model, script)


@program(graphs=None)
def deepcopy_of_the_compiled_module():
    model = Stack()

    def script(run):
        first = one_call(run, Call(leaf(2, 8)), [model])
        twin = copy.deepcopy(run)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.mul_(2)
        return [first, one_call(twin, Call(leaf(2, 8))), one_call(run, Call(leaf(2, 8)), [model])]

    return Case(model, script)


@program(graphs=2)
def layer_replaced_between_calls():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

    def replace():
        torch.manual_seed(SEED + 1)
        model[0] = nn.Linear(4, 2)

    return calls(model, Call(leaf(2, 4)), Call(leaf(2, 4), before=replace))


@program(graphs=1)
def parametrized_weight():
    model = parametrizations.weight_norm(nn.Linear(4, 4))
    return calls(model, Call(leaf(2, 4)), Call(leaf(2, 4)))


@program(graphs=2)
def cache_filled_on_first_use():
    class Cached(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.cache = None

        def forward(self, x):
            if self.cache is None:
                self.cache = torch.arange(4.0)
            return self.linear(x) + self.cache

    return calls(Cached(), Call(leaf(2, 4)), Call(leaf(2, 4)), Call(leaf(2, 4)))


@program(graphs=1)
def moving_average_of_a_parameter():
    class Averaged(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("average", torch.zeros(4, 4))

        def forward(self, x):
            with torch.no_grad():
                self.average.mul_(0.9).add_(self.linear.weight, alpha=0.1)
            return self.linear(x) + x @ self.average

    return calls(Averaged(), Call(leaf(2, 4)), Call(leaf(2, 4)))


@program(graphs=1)
def method_that_is_not_forward():
    model = Stack()

    def loss(x):
        return model(x).square().mean()

    return calls(loss, Call(leaf(2, 8)), Call(leaf(2, 8)), watch=[model])


PROGRAMS = collect(globals())
