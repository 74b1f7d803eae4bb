"""The parts that several ranks share: sending, failing together, the harvest."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from killing import path_for_children
from ranks import ends, run_ranks, start_ranks
from tiny_models import VOCABULARY, save_tiny_model

from legato.common import distributed
from legato.common.errors import LegatoError
from legato.data import store_manifest
from legato.data.harvest import harvest
from legato.data.language_model import LanguageModel
from legato.data.store import ActivationStore
from legato.data.tokens import TokenSet


@pytest.fixture(autouse=True)
def children_find_the_tests(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", path_for_children())


def exchange() -> None:
    with distributed.process_group():
        rank, size = distributed.rank(), distributed.world_size()
        assert distributed.gather("x" * rank) == ["x" * other for other in range(size)]
        third = torch.tensor([1 / 3 + rank, 2.0**60], dtype=torch.float64)
        distributed.all_reduce(third)
        assert third.tolist() == [sum(1 / 3 + other for other in range(size)), size * 2.0**60]
        assert distributed.broadcast_from_rank0(lambda: os.getpid()) == distributed.gather(os.getpid())[0]
        assert sorted(n for part in distributed.gather(distributed.shard(range(7))) for n in part) == list(range(7))
        both = distributed.gather_dicts({"a": {rank: 1}, "n": 5})
        assert both == {"a": dict.fromkeys(range(size), 1), "n": 5}


def test_ranks_exchange_what_they_have(tmp_path):
    run_ranks(3, exchange, folder=tmp_path)
    exchange()  # one process is ordinary


def fail(how: str) -> int:
    try:
        with distributed.process_group():
            if how == "writer":
                distributed.broadcast_from_rank0(lambda: 1 / 0)
            if distributed.rank() == 1:
                if how == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                if how == "hang":
                    time.sleep(60)
                raise ValueError("of my own")
            distributed.barrier()
    except (LegatoError, ZeroDivisionError, ValueError) as error:
        print(type(error).__name__, error)
        return 1
    return 0


@pytest.mark.parametrize(
    ("how", "codes", "said"),
    [
        ("kill", [1, -9, 1], "RankLostError rank 0 stops because another one failed or was killed: the same command"),
        ("raise", [1, 1, 1], "RankLostError rank 0 stops because another one failed or was killed: the same command"),
        ("writer", [1, 1, 1], "ZeroDivisionError"),
        ("hang", [1, None, 1], "RankLostError rank 0 stops because another one has not answered for 2 s: the same"),
    ],
)
def test_when_one_rank_goes_all_go(how, codes, said, tmp_path, monkeypatch):
    monkeypatch.setenv("LEGATO_PATIENCE_SECONDS", "2")
    processes = start_ranks(3, fail, how, folder=tmp_path)
    others = [processes[0], processes[2]]
    assert ends(others) == [codes[0], codes[2]]
    assert ends([processes[1]], patience=1.0 if how == "hang" else 20.0) == [codes[1]]
    lines = (tmp_path / "rank_0.txt").read_text().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(said)


def token_set(rows: int = 23) -> TokenSet:
    generator = torch.Generator().manual_seed(0)
    tokens_BL = torch.randint(3, VOCABULARY, (rows, 16), generator=generator).int()
    tokens_BL[:, 0] = 1
    doc_BL = (torch.arange(rows)[:, None] // 2).expand(rows, 16).int().contiguous()
    return TokenSet(tokens_BL, tokens_BL != 1, doc_BL, bos=True)


def harvest_to(model: Path, path: Path, killed: bool = False) -> None:
    vars(store_manifest)["SHARD_BYTES"] = 3 * 16 * (48 * 4 + 9)
    with distributed.process_group():

        def progress(done: int) -> None:
            if killed and distributed.rank() == 1 and done > 12:
                os.kill(os.getpid(), signal.SIGKILL)

        with torch.no_grad():
            loaded = LanguageModel.load(str(model), dtype="float32")
            store = harvest(loaded, token_set(), layer=1, path=path, batch_rows=2, progress=progress)
        assert store.n_rows == 23


def content(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.iterdir() if path.name != ".lock"}


@pytest.mark.parametrize("n_ranks", [2, 4])
def test_ranks_harvest_the_bytes_of_one_process(n_ranks, tmp_path, monkeypatch):
    monkeypatch.setattr(store_manifest, "SHARD_BYTES", store_manifest.SHARD_BYTES)
    model = save_tiny_model(tmp_path / "model", "gpt2", pad_token_id=None)
    run_ranks(1, harvest_to, model, tmp_path / "one", folder=tmp_path)
    run_ranks(n_ranks, harvest_to, model, tmp_path / "many", folder=tmp_path)
    assert len(content(tmp_path / "one")) == 8 + 1
    assert content(tmp_path / "many") == content(tmp_path / "one")
    # Killed in the middle: what each rank had finished is kept, and others finish the rest.
    killed = tmp_path / "killed"
    assert -9 in ends(start_ranks(n_ranks, harvest_to, model, killed, True, folder=tmp_path))
    noted = {name for manifest in killed.glob("manifest*.json") for name in json.loads(manifest.read_text())["shards"]}
    kept = {name: (killed / name).stat().st_mtime_ns for name in noted}
    assert 0 < len(kept) < 8
    run_ranks(3, harvest_to, model, killed, folder=tmp_path)
    assert content(killed) == content(tmp_path / "one")
    assert all((killed / name).stat().st_mtime_ns == before for name, before in kept.items())
    ActivationStore.open(killed, verify=True)
