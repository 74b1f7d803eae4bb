"""What is saved of a bank is all that its next steps depend on; what is damaged is passed over by name."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from dense_parts import Flicker, SoftThreshold
from test_train import ARMS, CONFIG, InMemory, planted_batches

from legato.common.checksummed import DamagedError, read_sealed, write_checksummed
from legato.common.command import Interrupts
from legato.common.errors import UsageError
from legato.data.activations import Normaliser
from legato.experiment.checkpoint import Checkpoint, cut
from legato.sae.architectures import BatchTopK
from legato.training.bank import BankState, train_on
from legato.training.config import SAEConfig
from legato.training.losses import WindowVariance

STEPS = 30
SHORT = dataclasses.replace(CONFIG, steps=STEPS, dead_after_tokens=600)
BAD = SAEConfig("explodes", BatchTopK(4), 64, (WindowVariance(window=4, coefficient=float("nan")),))
DENSE = SAEConfig("dense", SoftThreshold(k=4), 64, (Flicker(),), groups=((0.25, 0.3), (1.0, 0.7)))
BANK = [*ARMS, DENSE, dataclasses.replace(ARMS[4], name="shuffled", shuffle_positions=True), BAD]


@pytest.fixture(scope="module")
def normaliser() -> Normaliser:
    return Normaliser.fit(InMemory())


def checkpoint_in(folder) -> Checkpoint:
    return Checkpoint(folder / "checkpoint", minutes=5, interrupts=Interrupts())


def train(bank, normaliser, after_step=lambda state: None):
    log: list[dict] = []
    batches = planted_batches(STEPS)[bank.step :]
    return train_on(bank, batches, normaliser, SHORT, log=log.append, after_step=after_step), log


class CutOffError(Exception):
    pass


def test_every_kind_of_sae_goes_on_to_the_same_last_bit(normaliser, tmp_path):
    whole, whole_log = train(BankState.new(BANK, SHORT, 32), normaliser)
    for cut_at in (1, 17):
        checkpoint = checkpoint_in(tmp_path / str(cut_at))

        def stop(state, checkpoint=checkpoint, cut_at=cut_at):
            if state.step == cut_at:
                checkpoint.save_bank(state, 0)
                raise CutOffError

        with pytest.raises(CutOffError):
            train(BankState.new(BANK, SHORT, 32), normaliser, stop)
        saved = checkpoint.read_bank(BANK, SHORT)
        assert saved.step == cut_at
        result, log = train(saved, normaliser)
        timeless = [{key: value for key, value in record.items() if key != "tokens_per_second"} for record in log]
        expected = [record for record in whole_log if record["step"] > cut_at]
        assert [{**record, "tokens_per_second": 0} for record in expected] == [
            {**record, "tokens_per_second": 0} for record in timeless
        ]
        assert [(trainer.arm.name, reason) for trainer, reason in result.failed] == [
            (trainer.arm.name, reason) for trainer, reason in whole.failed
        ]
        assert whole.failed[0][0].arm is BAD
        for one, other in zip(result.finished, whole.finished, strict=True):
            assert one.arm == other.arm
            assert {**one.numbers(), "seconds": 0} == {**other.numbers(), "seconds": 0}
            for (name, tensor), (_, expected_tensor) in zip(
                one.tensors().items(), other.tensors().items(), strict=True
            ):
                assert torch.equal(tensor, expected_tensor), (one.arm.name, name)


def saved_steps(checkpoint: Checkpoint) -> list[str]:
    return sorted(path.name for path in checkpoint.folder.glob("step_*"))


def save_steps(checkpoint: Checkpoint, normaliser, *steps: int) -> None:
    def save(state):
        if state.step in steps:
            checkpoint.save_bank(state, 10 * state.step)

    train(BankState.new(ARMS[:2], SHORT, 32), normaliser, save)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["state.json", "topk/whole.safetensors"])
@pytest.mark.parametrize("damage", [flip_a_bit, lambda path: path.write_bytes(path.read_bytes()[:-1])])
def test_a_damaged_step_is_named_and_the_one_before_it_taken(normaliser, tmp_path, capsys, name, damage):
    checkpoint = checkpoint_in(tmp_path)
    save_steps(checkpoint, normaliser, 3, 6, 9)
    assert saved_steps(checkpoint) == ["step_00000006", "step_00000009"]
    damage(checkpoint.folder / "step_00000009" / name)
    saved = checkpoint.read_bank(ARMS, SHORT)
    assert (saved.step, saved.log_bytes) == (6, 60)
    said = capsys.readouterr().err
    assert f"step_00000009/{name} is" in said
    assert "damaged" in said
    assert saved_steps(checkpoint) == ["step_00000006"]


def test_a_step_that_was_being_written_is_no_step(normaliser, tmp_path, capsys):
    checkpoint = checkpoint_in(tmp_path)
    save_steps(checkpoint, normaliser, 3)
    (checkpoint.folder / "step_00000004" / "baseline").mkdir(parents=True)
    (checkpoint.folder / "step_00000004" / "baseline" / "whole.safetensors").write_bytes(b"half")
    assert checkpoint.read_bank(ARMS, SHORT).step == 3
    assert capsys.readouterr().err == ""
    assert checkpoint.read_bank([ARMS[3]], SHORT) is None  # of arms that are trained by now


def test_a_step_that_cannot_be_written_leaves_the_one_before_it(normaliser, tmp_path, monkeypatch):
    checkpoint = checkpoint_in(tmp_path)
    save_steps(checkpoint, normaliser, 3)

    def full(path, content):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("legato.common.checksummed.write_atomically", full)
        with pytest.raises(OSError, match="No space left"):
            save_steps(checkpoint, normaliser, 5)
    assert saved_steps(checkpoint) == ["step_00000003"]
    assert checkpoint.read_bank(ARMS, SHORT).step == 3


def test_progress_is_read_back_or_named(tmp_path, capsys):
    run = checkpoint_in(tmp_path)
    assert not run.goes_on("activations")
    run.begin("activations")
    run.progress.trained["baseline"] = {"training": {"final_loss": 0.1 + 0.2, "training_steps": 7}, "files": {}}
    run.finish_evaluation({"baseline": "fires nowhere", "baseline_ema": "neither"})
    again = checkpoint_in(tmp_path)
    assert again.goes_on("activations")
    assert again.progress.evaluated
    assert again.progress.trained == {}
    assert again.progress.failed == {
        "baseline": {"steps": 7, "reason": "fires nowhere"},
        "baseline_ema": {"steps": None, "reason": "neither"},
    }
    with pytest.raises(UsageError, match="the text or the model has changed"):
        again.goes_on("others")
    flip_a_bit(run.folder / "progress.json")
    assert not again.goes_on("activations")
    assert "progress.json is damaged: the run begins anew" in capsys.readouterr().err


def test_a_part_of_the_evaluation_is_computed_once(tmp_path, capsys):
    checkpoint = checkpoint_in(tmp_path)
    rows = np.arange(6.0).reshape(2, 3).T
    part = {
        "a": {"rows": rows, "undefined": math.nan, "third": 1 / 3, "n": np.int64(3)},
        "none": None,
        "list": [(1, 2)],
    }
    first = checkpoint.part("judged", lambda: part)
    second = checkpoint.part("judged", lambda: pytest.fail("computed twice"))
    for found in (first, second):
        np.testing.assert_array_equal(found["a"].pop("rows"), rows)
        assert math.isnan(found["a"].pop("undefined"))
        assert found == {"a": {"third": 1 / 3, "n": 3}, "none": None, "list": [[1, 2]]}
    flip_a_bit(checkpoint.folder / "evaluation" / "judged.safetensors")
    assert checkpoint.part("judged", lambda: {"again": 1}) == {"again": 1}
    assert "judged.safetensors is missing or damaged" in capsys.readouterr().err


def test_every_byte_of_a_sealed_file_counts(tmp_path):
    path = tmp_path / "a.json"
    write_checksummed(path, {"x": 1.5}, {"t": {"w": torch.ones(2)}}, kind="a-1")
    assert read_sealed(path, kind="a-1")[0] == {"x": 1.5}
    with pytest.raises(DamagedError, match=r"a\.json was written by another version of legato \(a-1, not a-2\)"):
        read_sealed(path, kind="a-2")
    for file in (path, tmp_path / "t.safetensors"):
        whole = file.read_bytes()
        for place in range(len(whole)):
            content = bytearray(whole)
            content[place] ^= 4
            file.write_bytes(content)
            with pytest.raises(DamagedError, match=file.name):
                read_sealed(path, kind="a-1")
            file.write_bytes(whole[:place])
            with pytest.raises(DamagedError, match=file.name):
                read_sealed(path, kind="a-1")
        file.write_bytes(whole)


def test_a_log_is_cut_to_what_it_was(tmp_path, capsys):
    log = tmp_path / "log.jsonl"
    log.write_text(json.dumps({"step": 1}) + "\n" + json.dumps({"step": 2}) + "\n")
    cut(log, 12)
    assert log.read_text() == '{"step": 1}\n'
    cut(log, 20)
    assert log.read_text() == '{"step": 1}\n'
    assert "lacks 8 bytes" in capsys.readouterr().err
