"""Small programs do compiled what they do without: bit for bit, in as few graphs as stated."""

import linecache

import pytest
import torch

import plait

from .program import SEED, Program, differences
from .programs import PROGRAMS
from .programs_block_differences import PROGRAMS as BLOCK_DIFFERENCES

# Dynamo itself reads .grad of a tensor that is no leaf where it resumes after a break,
# makes an instance of an autograd function, and imports deprecated modules for an optimizer.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning"),
]

AS_A_BACKEND = {
    "branch_on_data",
    "batch_norm_in_training",
    "dropout_with_a_seed",
    "custom_autograd_function",
    "checkpoint_of_each_layer",
    "blocks_that_are_alike",
    "mutation_of_an_input",
    "lengths_across_calls",
}


NOT_YET = {
    "intermediate_that_is_an_output_and_used_again": "AOTAutograd, which captures results that "
    "share memory, adds their tangents before those of other users: the last bit differs",
}


def _marks(program):
    if program.name in NOT_YET:
        return pytest.mark.xfail(strict=True, reason=NOT_YET[program.name])
    return pytest.mark.slow if program in BLOCK_DIFFERENCES else ()


@pytest.fixture(autouse=True)
def nothing_is_compiled_yet():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "program",
    [pytest.param(p, marks=_marks(p), id=p.name) for p in PROGRAMS],
)
def test_a_compiled_program_does_what_it_does_without(program):
    expected, _ = _run(program, lambda target: target)
    found, compiled = _run(program, plait.jit)
    assert differences(expected, found) == []
    report = compiled.report()
    assert program.num_graphs in (report.num_graphs, None), report
    if program.breaks is not None and report.breaks is not None:
        lines = [_line_at(graph_break.where) for graph_break in report.breaks]
        for text in program.breaks:
            assert any(text in line for line in lines), report
        assert all(each.reason and each.advice for each in report.breaks)


@pytest.mark.parametrize(
    "program", [p for p in PROGRAMS if p.name in AS_A_BACKEND], ids=lambda program: program.name
)
def test_the_backend_of_torch_compile_does_the_same(program):
    def compile_by_name(target):
        return torch.compile(target, backend="plait", options={"level": "O0"})

    expected, _ = _run(program, lambda target: target)
    found, _ = _run(program, compile_by_name)
    assert differences(expected, found) == []


def test_names_of_programs_are_different():
    names = {program.name for program in PROGRAMS}
    assert len(names) == len(PROGRAMS) >= 64
    assert names >= AS_A_BACKEND


def _run(program: Program, wrap):
    torch.manual_seed(SEED)
    case = program.build()
    run = wrap(case.target)
    return case.script(run), run


def _line_at(where: str) -> str:
    path, _, line = where.rpartition(":")
    return linecache.getline(path, int(line))
