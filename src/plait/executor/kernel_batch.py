"""The C++ kernels of many islands, built together.

Inductor builds each kernel by a run of the C++ compiler of its own, most of which is spent on the
same headers. Here the sources are collected while Inductor writes them, built as one module for
each core, and put into the places that Inductor left for them.
"""

# pyright: basic
# (TorchInductor is not typed.)

import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from plait.graph.torch_release import operands_of_kernel

# Inductor takes a second to import, and most programs do without it: it is imported where needed.

_ENTRY = "plait_kernels"
_NAME = re.compile(r"\bkernel\b")
_INCLUDE = re.compile(r"^\s*#include.*$", re.MULTILINE)


@dataclass(eq=False)
class Kernel:
    """A kernel that is not built yet, in the place of its function."""

    argtypes: Sequence[str]
    source: str
    function: Callable[..., None] | None = None

    def __call__(self, *operands: object) -> None:
        """Run it, if something took hold of the place before the function came there."""
        assert self.function is not None
        self.function(*operands)


@dataclass
class KernelBatch:
    """Kernels that wait to be built, and the modules in which their functions belong."""

    kernels: list[Kernel] = field(default_factory=list)
    scopes: list[dict[str, Any]] = field(default_factory=list)

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Within, Inductor leaves its C++ kernels here instead of building them."""
        from torch._inductor import async_compile

        compiler: Any = async_compile.AsyncCompile
        cpp_pybinding, wait_for = compiler.cpp_pybinding, compiler.wait

        def collect(_: object, argtypes: list[str], source: str) -> Kernel:
            self.kernels.append(Kernel(argtypes, source))
            return self.kernels[-1]

        def wait_and_note(owner: object, scope: dict[str, Any]) -> None:
            wait_for(owner, scope)
            self.scopes.append(scope)

        compiler.cpp_pybinding, compiler.wait = collect, wait_and_note
        try:
            yield
        finally:
            compiler.cpp_pybinding, compiler.wait = cpp_pybinding, wait_for

    def build(self, num_modules: int) -> None:
        """Build all kernels, and put their functions in their places.

        Raises what the C++ compiler raises; then no function is in its place.
        """
        if not self.kernels:
            return
        distinct: dict[tuple[str, ...], list[Kernel]] = {}
        for kernel in self.kernels:
            distinct.setdefault((*kernel.argtypes, kernel.source), []).append(kernel)
        first = [alike[0] for alike in distinct.values()]
        parts = [part for part in _even_parts(first, num_modules) if part]
        with ThreadPoolExecutor(max(1, len(parts))) as pool:
            for part, functions in zip(parts, pool.map(_build, parts), strict=True):
                for kernel, function in zip(part, functions, strict=True):
                    kernel.function = function
        for alike in distinct.values():
            for kernel in alike:
                kernel.function = alike[0].function
        for scope in self.scopes:
            for name, value in scope.items():
                if isinstance(value, Kernel):
                    scope[name] = value.function


@cache
def warm_up() -> Future[None]:
    """Learn what the processor has and prepare Inductor's header, in a thread of its own.

    Both are runs of the C++ compiler, of seconds if nothing is cached; a program is read meanwhile.
    A compiler that does not work is met again, and told of, when the kernels are built.
    """

    def build_nothing() -> None:
        _build([Kernel([], _NOTHING)])

    return ThreadPoolExecutor(1).submit(build_nothing)


_NOTHING = """
#include <torch/csrc/inductor/cpp_prefix.h>
extern "C" void kernel() {}
"""


@cache
def _modules() -> Any:
    """Inductor's cache of built modules, for modules with many kernels."""
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    return type("_Modules", (CppPythonBindingsCodeCache,), {"cache": {}, "entry_function": _ENTRY})


def _even_parts(kernels: Sequence[Kernel], count: int) -> list[list[Kernel]]:
    """Parts of about the same length of source, for compilers that run side by side."""
    parts: list[list[Kernel]] = [[] for _ in range(count)]
    sizes = [0] * count
    for kernel in sorted(kernels, key=lambda kernel: -len(kernel.source)):
        smallest = sizes.index(min(sizes))
        parts[smallest].append(kernel)
        sizes[smallest] += len(kernel.source)
    return parts


def _build(kernels: Sequence[Kernel]) -> list[Callable[..., None]]:
    """Build one module; the functions of its kernels in order."""
    includes = dict.fromkeys(line for k in kernels for line in _INCLUDE.findall(k.source))
    bodies = [
        _NAME.sub(f"kernel_{i}", _INCLUDE.sub("", kernel.source))
        for i, kernel in enumerate(kernels)
    ]
    source = "\n".join([*includes, *bodies, _bindings([kernel.argtypes for kernel in kernels])])
    module = _modules().load_async(source)()
    return [getattr(module, f"kernel_{i}") for i in range(len(kernels))]


def forget_modules() -> None:
    """Have Inductor load its modules anew: those that it has hold kernels that were never built."""
    from torch._inductor.codecache import PyCodeCache

    PyCodeCache.cache_clear()


def num_modules() -> int:
    """How many C++ compilers may run side by side."""
    from torch._inductor import config

    return max(1, config.compile_threads or 1)


def _bindings(argtypes: Sequence[Sequence[str]]) -> str:
    template = _modules().suffix_template
    operands, flag = operands_of_kernel(template)
    functions = [
        _FUNCTION.format(i=i, operands=operands, call=_call(i, types))
        for i, types in enumerate(argtypes)
    ]
    methods = [
        f'    {{"kernel_{i}", (PyCFunction)(void*)kernel_{i}_py, {flag}, ""}},'
        for i in range(len(argtypes))
    ]
    suffix = template.format(
        arg_len=0, call_entry_func="Py_RETURN_NONE;", entry_func=_ENTRY, extra_parse_arg=""
    )
    # Inductor's bindings of one function, with ours before its table of methods.
    before, table, after = suffix.partition("static PyMethodDef py_methods[] = {")
    assert table, "Inductor writes its bindings in another way"
    return "\n".join([before, *functions, table, *methods, after])


def _call(i: int, argtypes: Sequence[str]) -> str:
    operands = ", ".join(
        f"parse_arg<{argtype.replace('const ', '')}>(args, {n})"
        for n, argtype in enumerate(argtypes)
    )
    return f"kernel_{i}({operands}); Py_RETURN_NONE;"


_FUNCTION = """
static PyObject* kernel_{i}_py(PyObject* self, {operands}) {{
    try {{
        {call}
    }} catch(std::exception const& e) {{
        PyErr_SetString(PyExc_RuntimeError, e.what());
        return nullptr;
    }} catch(...) {{
        PyErr_SetString(PyExc_RuntimeError, "unhandled error");
        return nullptr;
    }}
}}
"""
