"""Fixtures that more than one test file uses."""

from pathlib import Path

import pytest

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
