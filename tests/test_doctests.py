"""Worked examples of docstrings, run as doctests: every module of the package that holds one."""

import doctest
from importlib import import_module
from pathlib import Path

import pytest

import legato

ROOT = Path(legato.__file__).parent
MODULES = [
    ".".join(("legato", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
    for path in sorted(ROOT.rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]
PUBLIC = ("legato.evaluation.metrics", "legato.evaluation.evaluate")  # modules whose public functions all have one


@pytest.mark.parametrize("name", MODULES)
def test_examples_print_what_they_say(name: str) -> None:
    found = doctest.testmod(import_module(name))
    assert found.attempted
    assert not found.failed


@pytest.mark.parametrize("name", PUBLIC)
def test_public_functions_have_an_example(name: str) -> None:
    module = import_module(name)
    public = getattr(module, "__all__", [name.rpartition(".")[2]])
    functions = [each for each in public if not isinstance(getattr(module, each), type)]
    assert not [each for each in functions if ">>> " not in (getattr(module, each).__doc__ or "")]
