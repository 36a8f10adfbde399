"""The import contract of pyproject.toml, and that the project keeps its shape."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import plait

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "src" / "plait").rglob("*.py"))
PYTHON_FILES = [
    path
    for folder in ("src", "tests", "benchmarks", "examples")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


def test_imports_flow_one_way():
    command = [
        sys.executable,
        "-c",
        "from importlinter.cli import lint_imports_command as run; run()",
    ]
    result = subprocess.run(
        [*command, "--no-logo"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_layer_contract_is_strict_and_covers_everything():
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    (layers,) = contract["contracts"]
    assert layers["exhaustive"] is True
    assert "ignore_imports" not in layers


def test_no_python_file_is_longer_than_600_lines():
    too_long = {
        str(path): count
        for path in PYTHON_FILES
        if (count := len(path.read_text().splitlines())) > 600
    }
    assert too_long == {}


def test_the_median_source_file_has_at_most_180_lines():
    counts = sorted(len(path.read_text().splitlines()) for path in SOURCES)
    assert counts[len(counts) // 2] <= 180


def test_no_file_name_says_nothing():
    words = {"utils", "util", "helpers", "helper", "common", "misc", "base", "manager", "handler"}
    assert [str(path) for path in PYTHON_FILES if words & set(path.stem.split("_"))] == []


def test_folders_are_at_most_two_levels_deep():
    assert {len(path.relative_to(ROOT / "src" / "plait").parts) for path in SOURCES} <= {1, 2}


def test_package_init_files_hold_a_docstring_only():
    for path in (ROOT / "src" / "plait").rglob("*/__init__.py"):
        if path.parent.name != "plait":
            (statement,) = ast.parse(path.read_text()).body
            assert isinstance(statement, ast.Expr), path


def test_only_config_reads_the_environment():
    readers = [
        str(path.relative_to(ROOT))
        for path in SOURCES
        if any(word in path.read_text() for word in ("os.environ", "import environ", "getenv"))
    ]
    assert set(readers) <= {"src/plait/config.py"}


def test_internal_imports_stand_at_the_top_of_their_file():
    for path in SOURCES:
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef):
                lazy = [
                    node
                    for node in ast.walk(function)
                    if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("plait")
                ]
                assert lazy == [], f"{path}:{function.lineno}"


def test_functions_are_short():
    lengths = sorted(
        (node.end_lineno or node.lineno) - node.lineno + 1
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    )
    assert lengths[len(lengths) // 2] <= 12
    assert lengths[int(len(lengths) * 0.95)] <= 60


def test_public_names_are_these():
    names = {name for name in vars(plait) if not name.startswith("_")}
    packages = {path.name for path in (ROOT / "src" / "plait").iterdir() if path.is_dir()}
    modules = {path.stem for path in (ROOT / "src" / "plait").glob("*.py")}
    assert callable(plait.compile)  # named as the operation, not as the module that holds it
    assert names - packages - modules - {"compile"} == {
        "Decoder",
        "DecoderConfig",
        "ParallelPlan",
        "PlaitError",
        "TokenLayout",
        "capture",
        "clusters",
        "jit",
        "load_model",
        "price",
        "price_step",
        "run",
    }
