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
# Modules whose public functions all have one; of legato.sae the classes too, but for the protocol.
PUBLIC = ("legato.evaluation.metrics", "legato.evaluation.one_pass", "legato.sae", "legato.training.losses")


@pytest.mark.parametrize("name", MODULES)
def test_examples_print_what_they_say(name: str) -> None:
    found = doctest.testmod(import_module(name))
    assert found.attempted
    assert not found.failed


@pytest.mark.parametrize("name", PUBLIC)
def test_public_functions_have_an_example(name: str) -> None:
    module = import_module(name)
    public = ["evaluate"] if name.endswith("one_pass") else module.__all__
    found = {each: getattr(module, each) for each in public}
    wanted = {each for each, thing in found.items() if not isinstance(thing, type)}
    if name == "legato.sae":
        wanted = {each for each, thing in found.items() if not getattr(thing, "_is_protocol", False)}
    assert wanted
    assert not [each for each in wanted if ">>> " not in (found[each].__doc__ or "")]
