"""`plait explain` as a user meets it: a real process, a script, its report."""

import json
from pathlib import Path

from tests.forked_process import run_plait

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "03_report_graph_breaks.py"

SCRIPT = """
import sys
import torch

torch.manual_seed(0)


@torch.compile(backend="plait")
def scaled(x, factor):
    y = x * factor
    print("arguments", sys.argv[1:])
    return y.relu()


scaled(torch.ones(3), 2.0)
scaled(torch.ones(5), 2.0)
"""


def explain(*arguments, cwd):
    return run_plait("explain", *arguments, cwd=cwd)


def test_the_example_has_exactly_two_breaks_with_line_reason_and_advice(tmp_path):
    result = explain(EXAMPLE, "--json", "r.json", "--html", "pages", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (report,) = json.loads((tmp_path / "r.json").read_text())
    lines = EXAMPLE.read_text().splitlines()
    places = [int(each["where"].rpartition(":")[2]) for each in report["breaks"]]
    assert [lines[place - 1].split("#")[0].strip() for place in places] == [
        "value = loss.item()",
        'print(f"loss {value:.3f} is still high")',
    ]
    assert "compute_loss: 4 graphs" in result.stdout
    assert "2 graph breaks" in result.stdout
    assert result.stdout.count("why: ") == result.stdout.count("to avoid it: ") >= 2
    assert "TORCHDYNAMO" not in result.stderr
    pages = sorted((tmp_path / "pages").glob("*.html"))
    assert len(pages) == len(report["graphs"])
    assert all("<title>Plait graph</title>" in page.read_text() for page in pages)
    written = [(tmp_path / "r.json").read_text(), *(page.read_text() for page in pages)]
    assert "compute_loss after line" in written[0]
    assert "compute_loss after line" in result.stderr  # the pages' list
    assert not any("torch_dynamo_resume" in text for text in [*written, result.stderr])


def test_the_one_line_form_is_explained_and_the_script_gets_its_arguments(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    result = explain("script.py", "--", "--steps", "3", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("arguments ['--steps', '3']") == 2
    assert "1 graph break" in result.stdout
    assert "script.py:11, 2 times" in result.stdout
    assert "why: text is printed" in result.stdout
    assert "dim 0 of x has size 5, and had 3" in result.stdout


def test_a_script_that_fails_shows_its_own_error_and_what_was_compiled(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT + "\nraise RuntimeError('out of flour')\n")
    result = explain("script.py", cwd=tmp_path)
    assert result.returncode == 1
    assert "RuntimeError: out of flour" in result.stderr
    assert "runpy" not in result.stderr
    assert "1 graph break" in result.stdout


def test_the_exit_code_of_the_script_is_kept(tmp_path):
    (tmp_path / "script.py").write_text("import sys\nsys.exit(7)\n")
    assert explain("script.py", cwd=tmp_path).returncode == 7


def test_a_script_that_compiles_nothing_and_one_that_is_not_there_are_refused(tmp_path):
    (tmp_path / "script.py").write_text("print('nothing')\n")
    nothing = explain("script.py", cwd=tmp_path)
    assert nothing.returncode == 1
    assert "script.py compiled nothing. Wrap a function or model" in nothing.stderr
    missing = explain("nowhere.py", cwd=tmp_path)
    assert missing.returncode == 1
    assert missing.stderr.strip() == (
        "ConfigError: nowhere.py is not a file. Name a Python script."
    )
