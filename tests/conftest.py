"""Fixtures that more than one test file uses."""

import os
from pathlib import Path

# Read by OpenMP when torch loads it: the threads of one process do not spin on the cores of its neighbours.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import psutil
import pytest
from small_experiment import SmallExperiment, small_experiment, without_pages

MOST_PROCESSES = 4
SHARED = Path(__file__).resolve().parents[2] / "shared"


def _shared(relative: str) -> Path:
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"needs {relative} in a folder `shared` beside the checkout")
    return path


@pytest.fixture(scope="session")
def gpt2_mini() -> Path:
    """Folder of a small GPT-2 with its tokenizer."""
    return _shared("models/gpt2-mini")


@pytest.fixture(scope="session")
def corpora() -> Path:
    """Folder of .jsonl.gz corpora."""
    return _shared("corpora")


@pytest.fixture
def small(tmp_path, monkeypatch, capsys) -> SmallExperiment:
    """experiment.py with a small random model and corpus, and a cache of its own."""
    monkeypatch.setenv("LEGATO_CACHE", str(tmp_path / "cache"))
    small = small_experiment(tmp_path, capsys)
    capsys.readouterr()
    return small


@pytest.fixture
def no_pages(monkeypatch) -> None:
    """Runs write no figures and no report.html, which take most of their time."""
    without_pages(monkeypatch)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=4, help="kills at random moments in test_kill.py")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """The files of a folder are shared among processes; files that were named run in this one, which shows more."""
    named = [Path(argument.partition("::")[0]) for argument in config.args]
    return min(psutil.cpu_count() or 1, MOST_PROCESSES) if any(path.is_dir() for path in named) else 0
