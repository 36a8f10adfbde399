"""Why TorchDynamo ends a graph, and why it compiles again, in the words of a user.

Its own texts are written for those who know it inside. What is not in the tables below keeps the
first sentence of its explanation and its first hint.
"""

import re
import site
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STEP = "step_unsupported"  # the graph ends at this line; why was said elsewhere, or nowhere


@dataclass(frozen=True)
class Break:
    """A place where the graph ends: "file:line" of the user's code, why, and how to avoid it."""

    where: str
    reason: str
    advice: str


def make_break(reason: str, frames: Sequence[Any]) -> Break:
    """Say in plain words why TorchDynamo ended a graph. frames: the user's stack, innermost last.

    The place is the innermost line that is neither of a library nor of Python itself.
    """
    if not frames:
        return Break("unknown", *explain_break(reason))
    frame = own_frame(frames)
    plain, advice = explain_break(reason)
    if frame is not frames[-1]:
        plain = f"{plain}, in {short_path(frames[-1].filename)}:{frames[-1].lineno}"
    code = code_of(frame)
    text = f"{plain} (`{code}`)" if code else plain
    return Break(f"{frame.filename}:{frame.lineno}", text, advice)


def own_frame(frames: Sequence[Any]) -> Any:
    """The innermost of these frames that is neither of a library nor of Python or Plait itself."""
    own = [frame for frame in frames if not is_library(frame.filename)]
    return (own or frames)[-1]


def code_of(frame: Any) -> str:
    """The line of Python of a frame, without its comment."""
    return _without_comment(frame.line or "")


def explain_break(reason: str) -> tuple[str, str]:
    """Why a graph ends and how to avoid it, from TorchDynamo's own text."""
    for pattern, plain, advice in _BREAKS:
        found = re.search(pattern, reason)
        if found:
            return plain.format(**found.groupdict()), advice.format(**found.groupdict())
    return _first_sentence(reason), _hint(reason)


def explain_guard(reason: str) -> str:
    """Say what differed from the call that was compiled, from the text of a guard that failed."""
    first = (reason.strip() or "no reason was given").splitlines()[0]
    text, _, comment = first.partition("  # ")
    text = re.sub(r"^\d+/\d+(_\d+)?: ", "", text).strip()
    for pattern, plain in _GUARDS:
        found = re.search(pattern, text)
        if found:
            text = plain.format(**{k: plain_name(v or "") for k, v in found.groupdict().items()})
            break
    code, _, place = comment.rpartition("# ")
    found = re.search(r"([^/\s]+:\d+) in ", place)
    return f"{text} ({found[1]}: `{_without_comment(code)}`)" if found else text


def is_library(path: str) -> bool:
    """Whether a file belongs to Python, to an installed package, or to capture itself."""
    return path.startswith((*_LIBRARIES, f"{_CAPTURE}/", "<"))


def short_path(path: str) -> str:
    """A path as a user would type it: relative to here, or within the installed packages."""
    for folder in (*_LIBRARIES, str(Path.cwd())):
        if path.startswith(f"{folder}/"):
            return path.removeprefix(f"{folder}/")
    return path


_LIBRARIES = tuple(
    dict.fromkeys(
        [
            *site.getsitepackages(),
            sysconfig.get_path("purelib"),
            sysconfig.get_path("platlib"),
            sysconfig.get_path("stdlib"),
        ]
    )
)

_CAPTURE = str(Path(__file__).parent)  # Plait's own lines stand around the user's

_OUTSIDE = "do it outside of the compiled function"

# Texts of TorchDynamo 2.13, of which older versions have parts. The first that fits is taken.
_BREAKS = [
    (
        r"Tensor\.item\(\)|_local_scalar_dense|tolist\(\)",
        "a tensor's value is read into Python",
        "keep the value a tensor, or read it after the compiled function has returned",
    ),
    (
        r"do not support aliasing",
        "a layer returns what it was given, or one tensor twice",
        "let it return new tensors only",
    ),
    (
        r"generic_jump|[Dd]ata-dependent (branching|jump|control flow)",
        "Python decides by the value of a tensor",
        "use torch.where or torch.cond, or decide outside of the compiled function",
    ),
    (
        r"repr\(\) on tensor|format.* tensor",
        "a tensor is turned into text",
        "make the text after the compiled function has returned",
    ),
    (
        r"Dynamic shape operator|output shape depends on|data-dependent output",
        "the shape of the result depends on the values",
        "use a form with a fixed shape, such as a mask with torch.where",
    ),
    (
        r"does not support running with fake tensors|[Nn]o fake impl|register_fake"
        r"|(?s:unsupported operator: )",
        "a custom operator does not say what its result looks like",
        "register a fake implementation with torch.library.register_fake",
    ),
    (
        r"compiler\.disable|_dynamo\.disable",
        "the function called here is marked not to be compiled",
        "call it outside of the compiled function, or remove the mark",
    ),
    (
        r"graph_break\(\)",
        "the program asks for a break here",
        "remove the call of torch._dynamo.graph_break()",
    ),
    (
        r"builtin operator `print`|builtin print",
        "text is printed",
        "print after the compiled function has returned",
    ),
    (
        r"logging\.Logger|module: logging\b",
        "a message is logged",
        "log after the compiled function has returned, or add the method to "
        "torch._dynamo.config.ignore_logging_functions, which leaves the message out",
    ),
    (r"_warnings\.warn`|qualname: warn\b", "a warning is given", _OUTSIDE),
    (
        r"builtin operator `(open|input)`|torch\.serialization",
        "a file is read or written",
        _OUTSIDE,
    ),
    (
        r"(module: time, qualname: |graph breaks on `time\.)(?P<name>\w+)",
        "the clock is read with time.{name}",
        "read the clock outside of the compiled function",
    ),
    (
        r"qualname: (Random|RandomState|Generator)\.\w+|module: random,",
        "random numbers of Python are drawn",
        "draw with torch.rand, or outside of the compiled function",
    ),
    (
        r"qualname: (manual_seed|seed|get_rng_state|set_rng_state)",
        "the random generator is seeded, or its state read or set",
        _OUTSIDE,
    ),
    (
        r"Tensor\.backward\(\)|autograd\.grad",
        "gradients are computed here",
        "return the loss, and call backward() outside of the compiled function",
    ),
    (r"requires_grad_\(\)", "requires_grad is changed here", _OUTSIDE),
    (r"deepcopy.* tensor", "a tensor is copied with copy.deepcopy", "use tensor.clone()"),
    (
        r"builtin operator `(?P<name>[^`]+)`",
        "`{name}` is called, which is not made of tensor operations",
        _OUTSIDE,
    ),
    (
        r"the function `(?P<name>[\w.]+)`( in file `[^`]+`)? should not be traced",
        "`{name}` is called, which TorchDynamo is told not to read",
        _OUTSIDE,
    ),
    (
        r"module: (?P<module>[\w.]+), qualname: (?P<name>[\w.]+)",
        "`{module}.{name}` is called, which cannot be read as tensor operations",
        f"{_OUTSIDE}, or wrap it with torch.library.custom_op",
    ),
    (
        r"method `(?P<name>[^`]+)` of class `(?P<module>[^`]+)`",
        "the method {name} of {module} is called, which cannot be read as tensor operations",
        _OUTSIDE,
    ),
    (
        r"context manager|enter a `(?P<name>\w+)`",
        "a context manager is entered that cannot be captured",
        "enter it outside of the compiled function",
    ),
    (
        f"^{STEP}$",
        "something in this line cannot be captured",
        "split the line to see which part of it, and do that outside of the compiled function",
    ),
    (
        r"with fake tensors: [^\n]*got \w+\((?P<quote>[\"'])(?P<said>.*?)\.?(?P=quote)\)",
        "{said}",
        "check the shapes and dtypes of what meets in this line",
    ),
    (
        r"raised exception (?P<said>[^\n]+)",
        "the program raises {said}",
        "run it as it is, with the same inputs, to see the error whole",
    ),
]

_NAME = r"(?P<name>.+?)"
_GUARDS = [
    (
        r"tensor '(?P<name>.+?)' size mismatch at index (?P<i>\d+)\. expected (?P<a>\S+), "
        r"actual (?P<b>\S+)",
        "dim {i} of {name} has size {b}, and had {a}",
    ),
    (
        r"tensor '(?P<name>.+?)' stride mismatch at index (?P<i>\d+)\. expected (?P<a>\S+), "
        r"actual (?P<b>\S+)",
        "dim {i} of {name} has stride {b}, and had {a}",
    ),
    (
        r"tensor '(?P<name>.+?)' rank mismatch\. expected (?P<a>\S+), actual (?P<b>\S+)",
        "{name} has {b} dims, and had {a}",
    ),
    (
        r"tensor '(?P<name>.+?)' dtype mismatch\. expected (?P<a>\S+), actual (?P<b>\S+)",
        "{name} is of dtype {b}, and was {a}",
    ),
    (
        r"tensor '(?P<name>.+?)' requires_grad mismatch\. expected requires_grad=(?P<a>\d)",
        "requires_grad of {name} changed",
    ),
    (r"tensor '(?P<name>.+?)' (?P<what>[\w ]+) mismatch", "the {what} of {name} changed"),
    (r"GLOBAL_STATE changed: (?P<what>\w+)", "the mode {what} changed"),
    (rf"^len\({_NAME}\) == (?P<a>\S+)$", "the length of {name} is not {a} any more"),
    (rf"^len\({_NAME}\) != (?P<a>\d+)$", "the length of {name} is {a} now"),
    (rf"^not len\({_NAME}\)$", "{name} is not empty any more"),
    (rf"^not {_NAME}$", "{name} is not false or zero any more"),
    (r"___check_type_id\((?P<name>.+?), \d+", "{name} is of another type"),
    (r"___check_obj_id\((?P<name>.+?), \d+", "{name} is another object"),
    (r"___dict_contains\('?(?P<a>[^',]+)'?, (?P<name>.+)\)", "whether {name} holds {a} changed"),
    (rf"^{_NAME} is None$", "{name} is not None any more"),
    (rf"^{_NAME} is not None$", "{name} is None now"),
    (rf"^{_NAME} == (?P<a>.+)$", "{name} is not {a} any more"),
    (rf"^{_NAME} (?P<sign>[<>]=?|!=) (?P<a>\S+)$", "{name} {sign} {a} does not hold any more"),
]


_DTYPES = {
    "Float": "float32",
    "Double": "float64",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "Long": "int64",
    "Int": "int32",
    "Short": "int16",
    "Char": "int8",
    "Byte": "uint8",
    "Bool": "bool",
}


def plain_name(name: str) -> str:
    """An expression over TorchDynamo's names as the user wrote it."""
    if name in _DTYPES:
        return _DTYPES[name]
    name = re.sub(r"[LG]\['(\w+)'\]", r"\1", name)
    name = re.sub(r"___stack\d+", "a value computed before", name)
    name = name.removesuffix("._modules")
    return re.sub(r"\._(?:modules|parameters|buffers)\['([^']+)'\]", r".\1", name)


def _without_comment(code: str) -> str:
    return code.partition("  #")[0].strip()


def _first_sentence(reason: str) -> str:
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    for line in lines:
        explanation = line.removeprefix("Explanation:").strip()
        if line.startswith("Explanation:") and explanation:
            return explanation.rstrip(".")
    return (lines or ["no reason was given"])[0].rstrip(".")


def _hint(reason: str) -> str:
    for line in reason.splitlines():
        if line.strip().startswith("Hint:"):
            return line.strip().removeprefix("Hint:").strip().rstrip(".")
    return "move this line out of the compiled function"
