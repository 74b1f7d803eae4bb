"""Lint, format, types and the layers of packages, as the tools themselves judge them; docstrings and sizes."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MOST_FILE_LINES, MOST_FUNCTION_LINES = 400, 80
NO_VERB = re.compile(r"(What|Which|Where|When|Whether|Whose|Who|How|Of|As|Those|That|The same)\b")


def sources() -> list[tuple[str, str]]:
    """(path, text) of the package's files."""
    paths = sorted((ROOT / "legato").rglob("*.py"))
    return [(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) for path in paths]


@pytest.mark.parametrize(
    "arguments",
    [["ruff", "check", "--no-cache"], ["ruff", "format", "--check", "--no-cache"], ["mypy", "legato"]],
    ids=["lint", "format", "types"],
)
def test_tool_finds_nothing(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_imports_go_down_only() -> None:
    """The contract `layers` of pyproject.toml."""
    call = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    arguments = [sys.executable, "-c", call, "--no-cache"]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_package_carries_every_file_beside_its_code() -> None:
    """Templates and scripts that package-data leaves out are missing from an installed package only."""
    stated = re.search(r"package-data\]\nlegato = (\[.*\])", (ROOT / "pyproject.toml").read_text())
    assert stated is not None
    carried = {path for pattern in json.loads(stated[1]) for path in (ROOT / "legato").glob(pattern)}
    files = {path for path in (ROOT / "legato").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    beside = {path for path in files if path.suffix != ".py"}
    assert beside
    assert beside <= carried


def test_docstrings_say_what_a_thing_does() -> None:
    """With a verb, or a plain noun: none opens with `What`, `Which`, `Of`, ..."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [
        f"{name}:{getattr(node, 'lineno', 1)} {text.splitlines()[0]}"
        for name, source in sources()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, kinds) and NO_VERB.match(text := ast.get_docstring(node) or "")
    ]
    assert not found, "\n".join(found)


def test_files_and_functions_are_short() -> None:
    found = []
    for name, source in sources():
        if len(source.splitlines()) > MOST_FILE_LINES:
            found.append(name)
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno + 1 > MOST_FUNCTION_LINES:
                found.append(f"{name}:{node.lineno} {node.name}")
    assert not found, "\n".join(found)
