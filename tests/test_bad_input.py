"""Bad inputs of every kind, each through the command a person would give it to: one line, an exit code, no result."""

from dataclasses import replace

import bad_corpora
import bad_flags
import bad_models
import bad_runs
import bad_saes
import pytest
from bad_input import Case, World, check, sound

__all__ = ["sound"]
CASES = [*bad_flags.CASES, *bad_corpora.CASES, *bad_models.CASES, *bad_saes.CASES, *bad_runs.CASES]


@pytest.mark.parametrize("case", [pytest.param(case, id=f"{case.command} {case.name[:60]}") for case in CASES])
def test_bad_input(case: Case, sound: World, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LEGATO_CACHE", str(sound.folder / "cache"))
    monkeypatch.chdir(tmp_path)
    check(case, replace(sound, folder=tmp_path), capsys)


def test_there_are_many_and_each_is_another():
    assert len({(case.command, case.name) for case in CASES}) == len(CASES)
    assert len(CASES) >= 350
