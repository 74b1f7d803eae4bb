"""Steps with bad numbers are left out, counted and logged; too many of them end the member and nobody else."""

import dataclasses
import math

import pytest
import torch
from test_train import ARMS, CONFIG, InMemory, planted_batches

import legato.training.bank
import legato.training.trainer
from legato.common.errors import LegatoError
from legato.data.activations import Normaliser
from legato.training.bank import train_bank
from legato.training.trainer import EXPLODED, IN_A_ROW, SETTLING_STEPS, DivergenceGuard

STEPS = 40
SHORT = dataclasses.replace(CONFIG, steps=STEPS, log_every=10)


@pytest.fixture(scope="module")
def normaliser() -> Normaliser:
    return Normaliser.fit(InMemory())


def train(monkeypatch, normaliser, spoil):
    """The first two arms; spoil(arm's name, step, result) changes what a pass gives."""
    exact = legato.training.trainer.forward_backward

    def forward_backward(parameters, low, batch, arm, terms, **options):
        return spoil(arm.name, options["step"], exact(parameters, low, batch, arm, terms, **options))

    monkeypatch.setattr(legato.training.trainer, "forward_backward", forward_backward)
    log: list[dict] = []
    return train_bank(ARMS[:2], planted_batches(STEPS), normaliser, SHORT, log=log.append), log


@pytest.mark.parametrize(
    "bad", [{"loss_terms": {"reconstruction": math.nan}}, {"grad_norm": math.inf}, {"grad_norm": 1e6}]
)
def test_a_bad_step_is_left_out_and_logged(monkeypatch, normaliser, bad):
    def spoil(name, step, result):
        return dataclasses.replace(result, **bad) if (name, step) == ("baseline", 25) else result

    result, log = train(monkeypatch, normaliser, spoil)
    baseline, topk = result.finished
    assert (baseline.steps_done, baseline.guard.skipped) == (STEPS - 1, 1)
    assert (topk.steps_done, topk.guard.skipped) == (STEPS, 0)
    assert baseline.tokens_seen == topk.tokens_seen - 8 * 15
    [record] = [record for record in log if "skipped_because" in record]
    assert (record["arm"], record["step"], record["skipped"]) == ("baseline", 26, 1)
    assert [record["skipped"] for record in log if record["arm"] == "baseline"][-1] == 1
    assert [record["step"] for record in log if record["arm"] == "baseline"] == [1, 11, 21, 26, 31, 40]
    assert math.isfinite(baseline.final_loss)


def test_bad_steps_in_a_row_end_a_member_in_its_last_good_state(monkeypatch, normaliser):
    states = {}

    def spoil(name, step, result):
        if name != "baseline" or step < 15:
            return result
        return dataclasses.replace(result, grad_norm=math.nan)

    exact = legato.training.trainer.SAETrainer.step

    def step(trainer, batch):
        states[trainer.arm.name, trainer.steps_done] = trainer.parameters.W_enc_FD.clone()
        return exact(trainer, batch)

    monkeypatch.setattr(legato.training.bank.SAETrainer, "step", step)
    result, _ = train(monkeypatch, normaliser, spoil)
    assert [trainer.arm.name for trainer in result.finished] == ["topk"]
    [(trainer, reason)] = result.failed
    assert reason.startswith("baseline: training diverged: loss ")
    assert "gradient norm nan at step 19" in reason
    assert f"{IN_A_ROW} bad steps in a row" in reason
    assert "lower --lr" in reason
    assert trainer.steps_done == 15
    assert torch.equal(trainer.parameters.W_enc_FD, states["baseline", 15])


def test_a_share_of_bad_steps_is_too_many_even_when_none_follow_each_other():
    guard = DivergenceGuard("arm", steps=1000)
    for step in range(0, 100, 2):
        guard.accept(1.0)
        guard.skip("loss nan", step)
    guard.accept(1.0)
    with pytest.raises(LegatoError, match="arm: training diverged: loss nan at step 101, 1 bad steps in a row and 51"):
        guard.skip("loss nan", 101)


def test_a_norm_explodes_against_what_is_usual_once_that_is_known():
    guard = DivergenceGuard("arm", steps=1000)
    for _ in range(SETTLING_STEPS):
        assert guard.fault(1.0, 1e9) is None
        guard.accept(0.5)
    assert guard.fault(1.0, 0.49 * EXPLODED) is None
    assert guard.fault(1.0, 0.51 * EXPLODED) == "gradient norm 51 where 0.5 is usual"
    assert guard.fault(math.inf, 0.5) == "loss inf, gradient norm 0.5"


def test_a_run_shorter_than_the_patience_does_not_pass_untrained():
    guard = DivergenceGuard("arm", steps=2)
    guard.skip("loss nan", 0)
    with pytest.raises(LegatoError, match="diverged"):
        guard.skip("loss nan", 1)
