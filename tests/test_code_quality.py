"""Lint, format, types and the layers of packages, as the tools themselves judge them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


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
