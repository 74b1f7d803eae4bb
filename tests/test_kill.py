"""kill -9 at any moment loses nothing: the same command goes on, and ends in the same weights and numbers to the last
bit.

`--kills N` gives the random part N kills instead of a handful.
"""

import time
from collections import Counter
from itertools import count

import numpy as np
import pytest
from killing import MEMBERS, Attempt, Killable, differences, flags_of, path_for_children, results
from small_experiment import write_corpus
from tiny_models import save_tiny_model

from legato.results.integrity import check_all

LONGEST_DELAY = 0.5  # seconds


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("experiment")
    save_tiny_model(folder / "model", "gpt2", pad_token_id=None)
    corpus = write_corpus(folder / "corpus")
    gguf = folder / "model.gguf"
    gguf.write_bytes(b"what `model` stands for")
    return [*flags_of(gguf, corpus, tokens=3000), MEMBERS]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory) -> dict:
    """The results of a run that nobody killed."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path_for_children())  # for the server that the runs fork from
        attempt = Killable(folder / "run", folder / "cache", flags).start()
        assert attempt.end() == 0, attempt.output.read_text()
    return results(attempt.folder)


@pytest.fixture
def killable(whole, flags, tmp_path) -> Killable:
    home = tmp_path / "first"
    home.mkdir()
    return Killable(home / "run", home / "cache", flags)


def there(pattern: str, count: int = 1, cache: bool = False):
    """The moment when so many files match."""

    def moment(attempt: Attempt) -> bool:
        return len(list((attempt.cache if cache else attempt.folder).glob(pattern))) >= count

    return moment


def half_a_checkpoint(attempt: Attempt) -> bool:
    return attempt.stage() == "checkpoint"


def logged(records: int):
    def moment(attempt: Attempt) -> bool:
        log = attempt.folder / "log.jsonl"
        return log.exists() and log.read_bytes().count(b"\n") >= records

    return moment


def after(seconds: float):
    end = time.monotonic() + seconds
    return lambda attempt: time.monotonic() >= end


MOMENTS = {
    "conversion": there("models/.*/new/*", 2, cache=True),
    "harvest": there("activations/*/shard_*", 3, cache=True),
    "beginning": there("config.yaml"),
    "training": logged(20),
    "checkpoint": half_a_checkpoint,
    "saving": there("saes/*", 2),
    "judging": there("checkpoint/evaluation/*.json", 2),
    "results": there("metrics.json"),
    "figures": there("figures/*.png"),
    "sealing": there("final_info.json"),
}


def test_killed_at_every_stage_of_one_run(killable, whole):
    reached = []
    for name, moment in MOMENTS.items():
        attempt = killable.start()
        if attempt.until(moment):
            reached.append(name)
            attempt.kill()
    assert {"conversion", "harvest", "training", "checkpoint", "judging"} <= set(reached)
    assert_whole(killable.start(), whole)


def test_killed_at_random_moments(killable, whole, pytestconfig):
    """Shortly after a stage drawn at random. A run that came to its end makes room for another, with a new cache."""
    rng, stages, runs = np.random.default_rng(0), Counter(), count(1)
    while stages.total() < pytestconfig.getoption("--kills"):
        stage, delay = rng.choice(list(MOMENTS)), rng.uniform(0, LONGEST_DELAY)
        attempt = killable.start()
        if attempt.until(MOMENTS[stage]) and attempt.until(after(delay)):
            attempt.kill()
            stages[attempt.stage()] += 1
            if attempt.stage() != "report":
                continue
            attempt = killable.start()
        assert_whole(attempt, whole)
        killable = killable.anew(str(next(runs)))
    assert_whole(killable.start(), whole)
    print(f"killed {dict(stages)}")


def assert_whole(attempt: Attempt, whole: dict) -> None:
    assert attempt.end() == 0, attempt.output.read_text()
    assert differences(results(attempt.folder), whole) == []
    assert check_all(attempt.folder)
    assert not (attempt.folder / "checkpoint").exists()
