"""experiment.py by several ranks: the same weights and numbers as by one process, and nothing lost when a rank dies."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from killing import MEMBERS, differences, flags_of, path_for_children, results
from ranks import ends, free_port, run_ranks, start_ranks
from safetensors.torch import load_file
from small_experiment import ROOT, experiment_main, write_corpus
from tiny_models import save_tiny_model

from legato.common import distributed
from legato.data import store_manifest
from legato.experiment.checkpoint import Checkpoint
from legato.report import build
from legato.sae.autoencoder import SparseAutoencoder


def experiment(flags: list[str], cache: Path, dies: tuple[int, int] | None = None, signum: int = signal.SIGKILL) -> int:
    """dies: a rank, and the step of the training after which it sends itself a signal."""
    os.environ["LEGATO_CACHE"] = str(cache)
    vars(store_manifest)["SHARD_BYTES"] = 20_000
    for writer in ("write_figures", "write_report"):
        vars(build)[writer] = lambda run, *_: run.path
    if dies is not None:
        after_step = Checkpoint.after_step

        def dying(checkpoint, bank, log_bytes):
            after_step(checkpoint, bank, log_bytes)
            if (distributed.rank(), bank.step) == dies:
                os.kill(os.getpid(), signum)

        Checkpoint.after_step = dying
    return experiment_main()(flags)


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("experiment")
    save_tiny_model(folder / "model", "gpt2", pad_token_id=None)
    return flags_of(folder / "model", write_corpus(folder / "corpus"), tokens=1200)


@pytest.fixture(scope="module", autouse=True)
def children_find_the_tests():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path_for_children())
        yield


def finished(n_ranks: int, flags: list[str], folder: Path) -> dict:
    run_ranks(n_ranks, experiment, [*flags, f"--out_dir={folder / 'run'}"], folder / "cache", folder=folder)
    return results(folder / "run")


@pytest.fixture(scope="module")
def one(flags, tmp_path_factory) -> dict:
    return finished(1, [*flags, MEMBERS], tmp_path_factory.mktemp("one"))


@pytest.mark.parametrize("n_ranks", [2, 4])
def test_members_spread_over_ranks_end_in_the_bits_of_one_process(n_ranks, flags, one, tmp_path):
    assert differences(finished(n_ranks, [*flags, MEMBERS], tmp_path), one) == []
    said = [(tmp_path / f"rank_{rank}.txt").read_text() for rank in range(n_ranks)]
    assert "results: " in said[0]
    assert said[1:] == [""] * (n_ranks - 1)


@pytest.mark.parametrize("resumed_by", [1, 4])
def test_when_a_rank_is_killed_the_rest_stop_and_any_number_go_on(resumed_by, flags, one, tmp_path):
    arguments = [*flags, MEMBERS, f"--out_dir={tmp_path / 'run'}"]
    dying = start_ranks(2, experiment, arguments, tmp_path / "cache", (1, 12), folder=tmp_path)
    assert ends(dying) == [1, -9]
    lost = (tmp_path / "rank_0.txt").read_text().splitlines()[-1]
    assert lost == (
        "error: rank 0 stops because another one failed or was killed: the same command goes on where it stopped"
    )
    assert (tmp_path / "run" / "checkpoint" / "step_00000011").is_dir()
    assert differences(finished(resumed_by, [*flags, MEMBERS], tmp_path), one) == []
    assert "after step 1" in (tmp_path / "rank_0.txt").read_text()


@pytest.mark.parametrize(
    "extra", [["--temporal=hysteresis"], ["--temporal=tsae", "--no-store"]], ids=["stored", "streamed"]
)
def test_fewer_members_than_ranks_are_trained_together_to_the_bits_of_one_process(extra, flags, tmp_path):
    arguments = [*flags, *extra, "--controls="]
    whole = finished(1, arguments, tmp_path / "one")
    together = tmp_path / "together"
    dying = start_ranks(
        3, experiment, [*arguments, f"--out_dir={together / 'run'}"], together / "cache", (2, 9), folder=together
    )
    assert ends(dying) == [1, 1, -9]
    assert differences(finished(4, arguments, together), whole) == []


def test_a_run_divided_by_latents_goes_on_with_any_number_of_ranks(flags, tmp_path):
    arguments = [*flags, "--temporal=tsae", "--controls="]
    sharded = [*arguments, "--shard_latents"]
    killed = tmp_path / "killed"
    dying = start_ranks(
        3, experiment, [*sharded, f"--out_dir={killed / 'run'}"], killed / "cache", (2, 9), folder=killed
    )
    assert ends(dying) == [1, 1, -9]
    [step] = (killed / "run" / "checkpoint").glob("step_00000008")
    held = {name: len(rows) for path in step.glob("baseline/shard-00003-*") for name, rows in load_file(path).items()}
    assert {held[f"{part}.W_enc_FD"] for part in ("parameters", "first_moment", "second_moment")} == {64 - 2 * 22}
    uninterrupted = finished(3, sharded, tmp_path / "whole")
    weights = saes(tmp_path / "whole" / "run")
    for n_ranks, options in ((3, sharded), (2, sharded), (1, arguments)):
        folder = tmp_path / f"by_{n_ranks}"
        shutil.copytree(killed, folder)
        found = finished(n_ranks, options, folder)
        assert "going on with 2 of them after step" in (folder / "rank_0.txt").read_text()
        if n_ranks == 3:
            assert differences(found, uninterrupted) == []
        for name, sae in saes(folder / "run").items():
            expected_weights = weights[name].stored().weights
            assert {"W_enc", "threshold"} <= expected_weights.keys()
            for field, expected in expected_weights.items():
                value = sae.stored().weights[field]
                assert float((value - expected).norm()) < 1e-3 * float(expected.norm()), (n_ranks, name, field)


def saes(run: Path) -> dict[str, SparseAutoencoder]:
    return {path.name: SparseAutoencoder.load(path) for path in sorted((run / "saes").iterdir())}


def test_an_sae_is_divided_only_where_there_are_processes_for_it(flags, tmp_path, capsys):
    assert experiment_main()([*flags, "--shard_latents", f"--out_dir={tmp_path / 'run'}"]) == 2
    assert capsys.readouterr().err == (
        "error: --shard_latents divides SAEs over processes: start them with torchrun --nproc_per_node=2\n"
    )
    assert not (tmp_path / "run").exists()


def test_a_signal_to_one_rank_ends_all_after_the_same_step(flags, tmp_path):
    arguments = [*flags, MEMBERS, f"--out_dir={tmp_path / 'run'}", "--checkpoint_minutes=10"]
    stopping = start_ranks(3, experiment, arguments, tmp_path / "cache", (2, 5), signal.SIGTERM, folder=tmp_path)
    assert ends(stopping) == [143, 143, 143]
    assert [step.name for step in (tmp_path / "run" / "checkpoint").glob("step_*")] == ["step_00000006"]


def test_torchrun_starts_it_and_goes_on_by_itself_after_a_kill(flags, one, tmp_path):
    """With --max-restarts the same processes come again, and find the checkpoint."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--max-restarts=1"]
    torchrun += [f"--master_port={free_port()}", "--monitor-interval=0.1"]
    command = [*torchrun, str(ROOT / "experiment.py"), *flags, MEMBERS, f"--out_dir={tmp_path / 'run'}"]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "LEGATO_CACHE": str(tmp_path / "cache")}
    with open(tmp_path / "output.txt", "w") as output:
        run = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=variables)
        try:
            while not (tmp_path / "run" / "checkpoint" / "step_00000004" / "state.json").exists():
                assert run.poll() is None, (tmp_path / "output.txt").read_text()
                time.sleep(0.01)
            ranks = psutil.Process(run.pid).children()
            ranks[-1].kill()
            assert run.wait(120) == 0, (tmp_path / "output.txt").read_text()
        finally:
            run.kill()
    assert len(ranks) == 2
    assert "going on with" in (tmp_path / "output.txt").read_text()
    assert differences(results(tmp_path / "run"), one) == []
