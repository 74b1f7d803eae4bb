"""An experiment that is stopped by a signal, a full disk or short memory keeps its state and says how to go on; what
may not be gone on with is refused."""

import resource
import signal
from pathlib import Path

import pytest
from filelock import FileLock
from killing import differences, results
from small_experiment import SmallExperiment, without_pages
from tensorboard.summary.writer import event_file_writer

import legato.training.bank
from legato.data.store import StoreWriter
from legato.experiment.checkpoint import Checkpoint
from legato.results.integrity import check_all
from legato.results.run_dir import RunDir
from legato.training.config import SAEConfig
from legato.training.trainer import SAETrainer

FLAGS = ("--temporal=hysteresis", "--checkpoint_minutes=0")


@pytest.fixture
def run(small: SmallExperiment, monkeypatch) -> SmallExperiment:
    without_pages(monkeypatch)
    # TensorBoard reads the files of one second and process in the order of their names, in which 10 comes before 9.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(1000))
    return small


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch, act) -> None:
    """Let something happen between two steps of the training."""
    after_step = Checkpoint.after_step

    def acting(checkpoint, bank, log_bytes):
        if bank.step == step:
            act()
        after_step(checkpoint, bank, log_bytes)

    monkeypatch.setattr(Checkpoint, "after_step", acting)


def whole(run: SmallExperiment, *flags: str) -> dict:
    """The results of the same run without a fault."""
    place, run.out_dir = run.out_dir, run.out_dir.parent / "whole" / run.out_dir.name
    run.out_dir.parent.mkdir(exist_ok=True)
    assert run.run(*FLAGS, *flags) == 0
    found, run.out_dir = results(run.out_dir), place
    return found


def by_arm(found: dict) -> dict:
    """Arms trained one after the other log one after the other."""
    return {**found, "log": sorted(found["log"], key=lambda record: (record["arm"], record["step"]))}


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_after_the_step(run, monkeypatch, signum, code):
    with monkeypatch.context() as patch:
        stop_after(7, patch, lambda: signal.raise_signal(signum))
        shown = run.error("--temporal=hysteresis", code=code)
    assert shown == "error: interrupted; the same command goes on where it stopped\n"
    assert [path.name for path in (run.out_dir / "checkpoint").glob("step_*")] == ["step_00000007"]
    assert run.run("--temporal=hysteresis", "--resume") == 0
    assert "going on with 2 of them after step 7" in run.capture.readouterr().out
    assert differences(results(run.out_dir), whole(run)) == []


def test_activations_that_are_not_kept_go_on_too(run, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(7, patch, lambda: signal.raise_signal(signal.SIGTERM))
        run.error(*FLAGS, "--no-store", code=143)
    assert run.run(*FLAGS, "--no-store") == 0
    assert differences(results(run.out_dir), whole(run, "--no-store")) == []


def one_by_one(bank: list[SAEConfig], *_args, **_options) -> list[list[SAEConfig]]:
    return [[arm] for arm in bank]


def interrupt_training_of(arm: str, run: SmallExperiment, monkeypatch: pytest.MonkeyPatch) -> None:
    step = SAETrainer.step

    def stop(trainer, batch):
        if trainer.arm.name == arm and trainer.steps_done == 5:
            signal.raise_signal(signal.SIGTERM)
        return step(trainer, batch)

    with monkeypatch.context() as patch:
        patch.setattr(SAETrainer, "step", stop)
        run.error(*FLAGS, code=143)
    saved = [path.name for path in (run.out_dir / "checkpoint").glob("step_*")]
    assert sorted(saved) == ["step_00000005", "step_00000006"]


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


def test_a_bank_in_two_passes_goes_on_in_either(run, monkeypatch):
    once = whole(run)
    monkeypatch.setattr(legato.training.bank, "split_to_fit", one_by_one)
    for arm in ("baseline", "hysteresis"):
        interrupt_training_of(arm, run, monkeypatch)
    assert run.run(*FLAGS) == 0
    assert differences(by_arm(results(run.out_dir)), by_arm(once)) == []


def test_a_run_cut_off_before_it_was_sealed_is_sealed_by_the_same_command(run, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("legato.experiment.run.write_checksums", lambda root: signal.raise_signal(signal.SIGTERM))
        run.error(*FLAGS, code=143)
    assert (run.out_dir / "final_info.json").is_file()
    assert run.run(*FLAGS) == 0
    assert check_all(run.out_dir)
    assert not (run.out_dir / "checkpoint").exists()
    assert differences(results(run.out_dir), whole(run)) == []


def test_a_run_cut_off_after_it_was_sealed_is_finished(run, monkeypatch):
    def stop(checkpoint):
        if (run.out_dir / "checksums.json").is_file():
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "discard", stop)
        run.error(*FLAGS, code=143)
    assert check_all(run.out_dir)
    assert "holds a finished run" in run.error(*FLAGS)
    assert not (run.out_dir / "checkpoint").exists()


def test_a_trained_sae_that_was_damaged_is_trained_again(run, monkeypatch):
    def cut_off(*_args, **_options):
        raise OSError(28, "No space left on device", "metrics.json")

    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "write_metrics", cut_off)
        assert "metrics.json: No space left on device: make room" in run.error(*FLAGS, code=1)
    flip_a_bit(run.out_dir / "saes" / "hysteresis" / "sae_weights.safetensors")
    assert run.run(*FLAGS) == 0
    assert "saes/hysteresis is missing or damaged: it is trained again" in run.capture.readouterr().out
    assert differences(by_arm(results(run.out_dir)), by_arm(whole(run))) == []


def test_a_trained_sae_is_damaged_while_another_is_in_training(run, monkeypatch):
    once = whole(run)
    monkeypatch.setattr(legato.training.bank, "split_to_fit", one_by_one)
    interrupt_training_of("hysteresis", run, monkeypatch)
    flip_a_bit(run.out_dir / "saes" / "baseline" / "sae_weights.safetensors")
    assert run.run(*FLAGS) == 0
    assert differences(by_arm(results(run.out_dir)), by_arm(once)) == []


def test_memory_that_runs_short_keeps_the_last_checkpoint(run, monkeypatch):
    def no_memory():
        raise MemoryError("Unable to allocate 3.1 GiB")

    with monkeypatch.context() as patch:
        stop_after(9, patch, no_memory)
        shown = run.error(*FLAGS, code=1)
    assert "out of memory (Unable to allocate 3.1 GiB): lower --d_sae or --batch_rows" in shown
    assert "the same command goes on where it stopped" in shown
    assert run.run(*FLAGS) == 0
    assert "after step 8" in run.capture.readouterr().out
    assert differences(results(run.out_dir), whole(run)) == []


@pytest.mark.parametrize("kibibytes", [1, 8, 40, 60])
def test_a_disk_that_takes_no_more(run, kibibytes):
    """Files that must not grow past a size stand for a full disk: the harvest, the checkpoints, the tables fail."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (kibibytes * 1024, before[1]))
    try:
        code = run.run(*FLAGS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    shown = run.capture.readouterr().err
    assert code == 1
    assert "error: " in shown
    assert "File too large" in shown
    assert shown.count("\n") == 1
    assert run.run(*FLAGS) == 0
    assert differences(results(run.out_dir), whole(run)) == []


@pytest.mark.parametrize("failure", [SystemExit("killed"), OSError(28, "No space left on device")])
def test_a_writer_thread_that_dies_ends_the_harvest(run, monkeypatch, failure):
    def die(*_args):
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "_write", die)
        shown = run.error(code=1)
    assert ("was stopped (SystemExit): harvest again" in shown) or ("cannot write activations to" in shown)
    assert not run.out_dir.exists()
    assert run.run() == 0


def interrupted(run: SmallExperiment, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_after(3, patch, lambda: signal.raise_signal(signal.SIGTERM))
        run.error(*FLAGS, code=143)


def test_what_cannot_be_gone_on_with_is_refused(run, monkeypatch):
    assert "holds no unfinished run: leave --resume out" in run.error("--resume")
    interrupted(run, monkeypatch)
    assert "holds a run with training.k 4 instead of 5" in run.error(*FLAGS, "--k=5")
    with FileLock(run.out_dir / ".lock"):
        assert "another process works in" in run.error(*FLAGS)
    first = sorted(run.corpus.iterdir())[0]
    first.write_text("w3 w4 w5 " * 30)
    assert "the text or the model has changed since" in run.error(*FLAGS)
    assert (run.out_dir / "checkpoint" / "step_00000003" / "state.json").is_file()


def test_a_damaged_record_of_progress_begins_the_run_anew(run, monkeypatch, capsys):
    interrupted(run, monkeypatch)
    progress = run.out_dir / "checkpoint" / "progress.json"
    progress.write_text(progress.read_text().replace('"evaluated": false', '"evaluated": true'))
    assert run.run(*FLAGS) == 0
    assert "progress.json is damaged: the run begins anew" in capsys.readouterr().err
    assert differences(results(run.out_dir), whole(run)) == []
