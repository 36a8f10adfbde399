"""What differs between the releases of PyTorch that Plait runs on, asked here and nowhere else."""

# pyright: basic
# (TorchDynamo is not typed.)

from collections.abc import Mapping, Sequence
from typing import Any


def attribute_of(variable: Any, tx: Any, name: str) -> Any:
    """What TorchDynamo knows of an attribute of an object that it follows."""
    read = getattr(variable, "tp_getattro_impl", None) or variable.var_getattr
    return read(tx, name)


def operands_of_kernel(bindings: str) -> tuple[str, str]:
    """How Inductor's bindings of a C++ kernel take its operands: type in C++, flag for Python."""
    if "METH_FASTCALL" in bindings:
        return "PyObject* const* args, Py_ssize_t", "METH_FASTCALL"
    return "PyObject* args", "METH_VARARGS"


def name_of_source(source: Any) -> str:
    """TorchDynamo's name of the place that an object came from; some of its own have none."""
    try:
        return str(source.name() if callable(source.name) else source.name)
    except NotImplementedError:
        return type(source).__name__


def stacks_of_changes(side_effects: Any) -> Mapping[Any, Sequence[Any]]:
    """Where each object was changed: the user's stacks. Older releases do not note them."""
    return getattr(side_effects, "mutation_user_stacks", {})


def is_of_module(node: Any) -> bool:
    """Whether TorchDynamo found this input of its graph in a module: a parameter, or a buffer."""
    source: Any = getattr(node, "_dynamo_source", None)
    if source is None:
        return False
    kind: Any = source.guard_source() if callable(source.guard_source) else source.guard_source
    return kind.is_unspecialized_nn_module() or kind.is_unspecialized_builtin_nn_module()
