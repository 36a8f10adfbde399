"""Compare a compiled program with eager PyTorch: its results, then its steps.

An eager run has no steps by name. But each value that a compiled step makes is, where passes are
exact, one that eager makes too, whatever the order; so values are looked up by their bits.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from plait.executor.observe import Lookout, Sighting, makes_values, observing, tensors_in
from plait.executor.outcome import Outcome, outcome_of
from plait.executor.record import are_equal, bits_of, largest_difference
from plait.executor.statistics import describe_value
from plait.graph.schedule import ISLAND, OBJECT, PYTHON, Schedule, resolve

_KEPT_BYTES = 2**30


@dataclass
class EagerRun:
    """What eager operators took and made: by digest, and copies while they fit `kept_bytes`."""

    kept_bytes: int = _KEPT_BYTES
    known: set[bytes] = field(default_factory=set[bytes])
    made: list[tuple[str, Tensor]] = field(default_factory=list[tuple[str, Tensor]])

    def recorded(self) -> "_Recorder":
        """Return a context whose operators are recorded, those of its backward too."""
        return _Recorder(self)

    def note(self, operator: str, x: Tensor) -> None:
        """Add what an operator made."""
        digest = digest_of(x)
        num_bytes = x.numel() * x.element_size()
        if digest not in self.known and num_bytes <= self.kept_bytes:
            self.kept_bytes -= num_bytes
            self.made.append((operator, x.detach().cpu().clone()))
        self.known.add(digest)

    def nearest(self, x: Tensor) -> tuple[str, Tensor] | None:
        """The kept value of this form that is nearest, and the operator that made it."""
        alike = [each for each in self.made if (each[1].shape, each[1].dtype) == (x.shape, x.dtype)]
        x = x.detach().cpu()
        return min(alike, key=lambda each: _distance(each[1], x), default=None)


class _Recorder(TorchDispatchMode):
    def __init__(self, run: EagerRun) -> None:
        super().__init__()
        self.run = run

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for x in filter(_has_values, tensors_in((args, kwargs))):
            self.run.known.add(digest_of(x))
        value = func(*args, **(kwargs or {}))
        for x in filter(_has_values, tensors_in(value)):
            self.run.note(str(func), x)
        return value


@dataclass
class EagerSearch:
    """A watch: finds the first step that makes of known operands something eager never made.

    rtol: how far, relative to the largest element, a result may lie from one that eager made.
    """

    eager: EagerRun
    rtol: float = 0.0
    num_equal: int = 0
    num_close: int = 0
    found: str = ""
    further: list[str] = field(default_factory=list[str])

    def watch(self, sighting: Sighting) -> None:
        """Look the step's results up."""
        results = _judged(sighting)
        if not results:
            return
        unknown = [x for x in results if digest_of(x) not in self.eager.known]
        far = [x for x in unknown if not self._is_close(x)]
        if not far:
            self.num_close += bool(unknown)
            self.num_equal += not unknown
            return
        operands = tensors_in(list(sighting.operands.values()))
        is_first = all(digest_of(x) in self.eager.known for x in operands)
        if is_first and not self.found:
            self.found = self._describe(sighting, far[0])
        elif not self.found:
            self.further.append("" if self.further else self._describe(sighting, far[0]))

    def _is_close(self, x: Tensor) -> bool:
        if not self.rtol:
            return False
        nearest = self.eager.nearest(x)
        if nearest is None or not are_equal([nearest[1]], [x.detach().cpu()], rtol=self.rtol):
            return False
        self.eager.known.add(digest_of(x))
        return True

    def _describe(self, sighting: Sighting, x: Tensor) -> str:
        lines = str(sighting).splitlines()
        operands = sighting.operands.items()
        lines += [f"    took  {name} = {describe_value(value)}" for name, value in operands]
        lines += [f"    made  {describe_value(x)}"]
        nearest = self.eager.nearest(x)
        if nearest is None:
            return "\n".join([*lines, "    eager made nothing of this form"])
        largest = largest_difference([nearest[1]], [x.detach().cpu()])
        lines += [
            f"    eager {describe_value(nearest[1])}, the nearest, made by {nearest[0]}",
            f"    largest difference {largest:.4g}",
        ]
        return "\n".join(lines)

    def __str__(self) -> str:
        """The first differing step, or that there is none."""
        close = f", {self.num_close} within {self.rtol:g}" if self.num_close else ""
        head = f"{self.num_equal} steps made what eager makes, bit for bit{close}."
        if self.found:
            return f"{head}\nThe first step that does not:\n{self.found}"
        if self.further:
            return (
                f"{head}\n{len(self.further)} steps took what eager never had, so the difference "
                f"comes from outside of them. The first:\n{self.further[0]}"
            )
        return f"{head} No step differs."


@dataclass(frozen=True, kw_only=True)
class EagerComparison:
    """differing: outputs and gradients that differ, with the largest absolute difference of each.

    steps: None if the compiled function had been compiled before, so that nobody saw its steps.
    """

    num_equal: int
    differing: dict[str, float]
    steps: EagerSearch | None

    def __str__(self) -> str:
        """Results first, then steps."""
        lines = [f"{self.num_equal} outputs and gradients are eager's, bit for bit"]
        lines += [f"{name} differs by {by:.4g}" for name, by in self.differing.items()]
        if self.steps is None:
            return "\n".join([*lines, "no steps were seen: it had been compiled before."])
        return "\n".join([*lines, str(self.steps)])


def compare_with_eager(
    function: Callable[..., object],
    compiled: Callable[..., object],
    *inputs: object,
    parameters: Mapping[str, Tensor] | None = None,
    rtol: float = 0.0,
) -> EagerComparison:
    """Run both, forward and backward, and compare results; then find the first differing step.

    compiled: not called before, so that its steps can be seen. parameters: what else gets a
    gradient, by name; those of a module are known. Both begin with the same random state and, of
    a module, the same buffers.
    """
    if isinstance(function, nn.Module):
        parameters = dict(function.named_parameters()) | dict(parameters or {})
    buffers = dict(function.named_buffers()) if isinstance(function, nn.Module) else {}
    before = {name: x.detach().clone() for name, x in buffers.items()}
    eager, searches = EagerRun(), []
    search = EagerSearch(eager, rtol)

    def make(schedule: Schedule) -> Lookout:
        searches.append(schedule)
        return Lookout(schedule, [search.watch])

    with torch.random.fork_rng(), eager.recorded():
        expected = outcome_of(function, inputs, parameters=parameters)
    with torch.no_grad():
        for name, x in buffers.items():
            x.copy_(before[name])
    with observing(make):
        found = outcome_of(compiled, inputs, parameters=parameters)
    differing = _differing(expected, found, rtol)
    num_equal = len(expected.named().keys() | found.named().keys()) - len(differing)
    return EagerComparison(
        num_equal=num_equal, differing=differing, steps=search if searches else None
    )


def digest_of(x: Tensor) -> bytes:
    """A digest of dtype, shape and bits."""
    digest = hashlib.blake2b(f"{x.dtype}{tuple(x.shape)}".encode(), digest_size=16)
    digest.update(bits_of(x).numpy().data)
    return digest.digest()


def _differing(expected: Outcome, found: Outcome, rtol: float) -> dict[str, float]:
    first, second = expected.named(), found.named()
    differing = {}
    for name in first | second:
        if name not in first or name not in second:
            differing[name] = float("nan")
        elif not are_equal([first[name]], [second[name]], rtol=rtol):
            differing[name] = largest_difference([first[name]], [second[name]])
    return differing


def _has_values(x: Tensor) -> bool:
    return x.device.type != "meta" and not isinstance(x, FakeTensor)


def _judged(sighting: Sighting) -> list[Tensor]:
    """The results that eager must have made too.

    Not what stands beside numbers, such as the mask of a dropout: eager's kernels keep their own.
    """
    results = [x for x in tensors_in(sighting.value) if _has_values(x)]
    numbers = [x for x in results if x.is_floating_point() or x.is_complex()]
    return (numbers or results) if _computes(sighting) else []


def _computes(sighting: Sighting) -> bool:
    """Whether eager must have made the same: not of views, nor of what reads no tensor."""
    target = sighting.place.step.target
    if not makes_values(sighting) or not tensors_in(list(sighting.operands.values())):
        return False
    if target.startswith((ISLAND, OBJECT, PYTHON)):
        return True
    return not getattr(resolve(target), "is_view", False)


def _distance(x: Tensor, y: Tensor) -> float:
    largest = largest_difference([x], [y])
    return largest if largest == largest else float("inf")
