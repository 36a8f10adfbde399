"""Which nodes draw random numbers."""

# pyright: basic
# (The schema of an operator has no public name.)

import torch
from torch.fx import Node


def is_random(node: Node) -> bool:
    """Whether the node draws random numbers; attention without dropout does not.

    PyTorch marks its fused attention of GPUs as random whatever its `dropout_p`, and draws only
    where that is not 0.
    """
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    for i, argument in enumerate(target._schema.arguments):
        if argument.name == "dropout_p":
            given = node.args[i] if i < len(node.args) else node.kwargs.get("dropout_p")
            return bool((argument.default_value if given is None else given) != 0)
    return True
