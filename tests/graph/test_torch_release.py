"""Releases of PyTorch differ in what Plait leans on; both forms are known, and one is at hand."""

from types import SimpleNamespace

import pytest
from torch._dynamo.source import AttrSource, LocalSource
from torch._guards import Source
from torch._inductor.codecache import CppPythonBindingsCodeCache

from plait.graph.torch_release import attribute_of, name_of_source, operands_of_kernel


@pytest.mark.parametrize("method", ["var_getattr", "tp_getattro_impl"])
def test_an_attribute_is_read_by_whichever_name_dynamo_has_for_it(method):
    variable = SimpleNamespace(**{method: lambda tx, name: (tx, name)})
    assert attribute_of(variable, "translator", "width") == ("translator", "width")


def test_kernels_take_operands_as_the_bindings_of_this_release_do():
    operands, flag = operands_of_kernel(CppPythonBindingsCodeCache.suffix_template)
    assert flag in CppPythonBindingsCodeCache.suffix_template
    assert operands in CppPythonBindingsCodeCache.suffix_template


def test_a_vector_of_operands_is_taken_where_bindings_do():
    assert operands_of_kernel("..., METH_FASTCALL, ...") == (
        "PyObject* const* args, Py_ssize_t",
        "METH_FASTCALL",
    )
    assert operands_of_kernel("..., METH_VARARGS, ...") == ("PyObject* args", "METH_VARARGS")


def test_a_source_is_named_as_dynamo_names_it_or_by_its_kind_if_it_has_no_name():
    assert name_of_source(AttrSource(LocalSource("model"), "width")) == "L['model'].width"
    assert name_of_source(Source()) == "Source"
