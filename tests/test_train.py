"""The training loop on small synthetic sequences with planted features."""

import dataclasses
import math

import pytest
import torch

from legato.common.errors import LegatoError
from legato.common.hardware import fast_matmul_dtype
from legato.data.activations import ActivationBatch, Normaliser
from legato.experiment.arms import planned_arms
from legato.experiment.config import ExperimentConfig
from legato.experiment.recipes import names_of
from legato.sae.architectures import BatchTopK, Gated, Hysteresis, JumpReLU, ReLU, TopK
from legato.training.bank import bank_bytes, train_bank
from legato.training.config import SAEConfig, TrainConfig
from legato.training.losses import Contrastive, Slowness, WindowGroupLasso, WindowVariance
from legato.training.step import Parameters, TrainBatch

B, L, D, F = 8, 16, 32, 64
CONFIG = TrainConfig(steps=120, lr=1e-2, log_every=1)


def planted_batches(n: int, seed: int = 0) -> list[ActivationBatch]:
    """Sparse sums of 40 fixed directions, each held for a few tokens, far from the origin and at a large scale."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(40, D, generator=torch.Generator().manual_seed(99)), dim=-1)
    batches = []
    for _ in range(n):
        on = (torch.rand(B, L // 4, 40, generator=generator) < 0.1).repeat_interleave(4, dim=1)
        acts_BLD = 300 * (on * (0.5 + torch.rand(B, L, 40, generator=generator))) @ directions + 1000.0
        mask_BL = torch.ones(B, L, dtype=torch.bool)
        mask_BL[:, 0] = False
        doc_BL = torch.arange(B, dtype=torch.int32)[:, None].expand(B, L)
        batches.append(ActivationBatch(acts_BLD, mask_BL, doc_BL, torch.zeros(B, L, dtype=torch.int32)))
    return batches


class InMemory:
    d_in, n_rows = D, 130 * B

    def batches(self, *_args, **_options):
        return iter(planted_batches(130))


@pytest.fixture(scope="module")
def normaliser() -> Normaliser:
    return Normaliser.fit(InMemory())


NESTED = ((0.25, 0.3), (1.0, 0.7))
ARMS = [
    SAEConfig("baseline", BatchTopK(4), F),
    SAEConfig("topk", TopK(4), F, seed=1),
    SAEConfig("relu", ReLU(2.0), F),
    SAEConfig("wide", BatchTopK(4), 2 * F),
    SAEConfig("variance", BatchTopK(4), F, (WindowVariance(window=4, coefficient=0.3),)),
    SAEConfig("contrastive", BatchTopK(4), F, (Contrastive(coefficient=0.05, anchors=16),)),
    SAEConfig("hysteresis", Hysteresis(4, release=0.5), F),
    SAEConfig("jumprelu", JumpReLU(4), F),
    SAEConfig("gated", Gated(1.0, k=4), F),
    SAEConfig("group_lasso", ReLU(0.0), F, (WindowGroupLasso(window=4, coefficient=0.02),)),
    SAEConfig("jumprelu_matryoshka", JumpReLU(4), F, (Slowness(window=4, coefficient=0.05),), groups=NESTED),
]
STEERED = (JumpReLU, Gated)  # towards k, not onto it


def train(arms, normaliser, config=CONFIG, batches=None):
    log: list[dict] = []
    result = train_bank(arms, planted_batches(130) if batches is None else batches, normaliser, config, log=log.append)
    return result, log


def test_every_arm_learns_and_logs_what_it_did(normaliser):
    result, log = train(ARMS, normaliser)
    assert not result.failed
    for arm in ARMS:
        records = [record for record in log if record["arm"] == arm.name]
        assert [record["step"] for record in records] == list(range(1, CONFIG.steps + 1))
        assert records[-1]["fvu"] < 0.5 * records[0]["fvu"]
        assert records[-1]["grad_norm"] > 0
        assert sum(records[-1]["loss_terms"].values()) == pytest.approx(records[-1]["loss"])
        if not isinstance(arm.architecture, ReLU):
            assert records[-1]["l0"] == pytest.approx(4, rel=0.2 if isinstance(arm.architecture, STEERED) else 1e-3)
    names = {record["arm"]: set(record["loss_terms"]) for record in log}
    assert names["variance"] == {"reconstruction", "window_variance"}
    assert names["relu"] == {"reconstruction", "sparsity"}
    assert names["jumprelu"] == {"reconstruction", "sparsity"}
    assert names["gated"] == {"reconstruction", "sparsity", "gate"}
    assert names["group_lasso"] == {"reconstruction", "window_group_lasso"}


def test_a_member_of_a_bank_equals_the_same_sae_alone(normaliser):
    together, _ = train(ARMS, normaliser)
    for place in (1, 3, 6, 7, 8):
        alone, _ = train(ARMS[place : place + 1], normaliser)
        for (_, one), (_, other) in zip(
            together.finished[place].parameters.items(), alone.finished[0].parameters.items(), strict=True
        ):
            assert torch.equal(one, other)


def test_the_normaliser_is_folded_into_what_is_saved(normaliser, tmp_path):
    result, _ = train([ARMS[0], *ARMS[6:9]], normaliser)
    held_out = planted_batches(4, seed=7)
    calibration = [TrainBatch.of(batch, normaliser, fast_matmul_dtype()) for batch in planted_batches(8, seed=3)]
    for trainer in result.finished:
        sae = trainer.finish(normaliser, calibration)
        torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(F))
        error = power = active = 0.0
        for batch in held_out:
            x_ND = batch.acts_BLD[batch.mask_BL]
            codes_BLF = sae.encode(batch.acts_BLD, batch.mask_BL, batch.doc_BL)
            error += float((sae.decode(codes_BLF)[batch.mask_BL] - x_ND).square().sum())
            power += float((x_ND - x_ND.mean(0)).square().sum())
            active += float((codes_BLF > 0).sum()) / len(x_ND) / len(held_out)
        assert error / power < 0.35
        assert active == pytest.approx(4, rel=0.2 if isinstance(trainer.arm.architecture, STEERED) else 0.1)


def test_a_frozen_decoder_stays_as_it_was_drawn(normaliser):
    [arm] = [dataclasses.replace(ARMS[0], freeze_decoder=True)]
    result, log = train([arm, ARMS[0]], normaliser)
    frozen, free = (trainer.parameters for trainer in result.finished)
    drawn = Parameters.initial(D, F, arm.seed)
    assert torch.equal(frozen.W_dec_FD, drawn.W_dec_FD)
    assert not torch.equal(free.W_dec_FD, drawn.W_dec_FD)
    assert not torch.equal(frozen.W_enc_FD, drawn.W_enc_FD)
    last = log[-2:]
    assert last[0]["fvu"] > 1.5 * last[1]["fvu"]


def test_shuffled_positions_take_the_order_away_and_nothing_else(normaliser):
    """Where order plays no part in the loss, the same tokens in another order give the same first step; where it does,
    another one."""
    by_order = SAEConfig("variance", BatchTopK(4), F, (WindowVariance(window=4, coefficient=0.3),))
    arms = [ARMS[0], by_order]
    arms += [dataclasses.replace(arm, name=f"{arm.name}_shuffled", shuffle_positions=True) for arm in arms]
    _, log = train(arms, normaliser, TrainConfig(steps=2))
    first = {record["arm"]: record["loss_terms"] for record in log if record["step"] == 1}
    assert first["baseline_shuffled"] == pytest.approx(first["baseline"])
    assert first["variance_shuffled"]["reconstruction"] == pytest.approx(first["variance"]["reconstruction"])
    assert first["variance_shuffled"]["window_variance"] > 1.1 * first["variance"]["window_variance"]


def test_every_temporal_term_trains_with_every_sparsity_and_with_groups(normaliser):
    """All names of --temporal that combine, in one bank: each term of each member takes part in its loss, from the
    coefficient's first step on, and every step stays finite."""
    sparsities, groups, terms = map(names_of, ("architecture", "groups", "term"))
    names = [
        "+".join(part for part in (sparsity, group, term) if part)
        for sparsity in ("", *sparsities)
        for group in ("", *groups)
        for term in terms
    ]
    options = {
        **{"temporal": tuple(names), "ablation": False, "window": 4, "coefficient": 0.01, "lags": (1, 3)},
        **{"slow_fraction": 0.5, "term_warmup": 0.5, "d_sae": F, "k": 4, "l1": 2.0},
    }
    bank = [one.sae for one in planned_arms(ExperimentConfig.from_options("smoke", options), D)]
    assert len(bank) == 1 + (1 + len(sparsities)) * (1 + len(groups)) * len(terms)
    result, log = train(bank, normaliser, TrainConfig(steps=4, lr=3e-3, log_every=1))
    assert not result.failed
    for arm in bank:
        steps = [record["loss_terms"] for record in log if record["arm"] == arm.name]
        assert len(steps) == 4, arm.name
        for term in arm.terms:
            values = [terms[term.name] for terms in steps]
            assert all(math.isfinite(value) for value in values), arm.name
            assert any(values), (arm.name, term.name)
    last = {record["arm"]: record["fvu"] for record in log}
    assert all(math.isfinite(fvu) for fvu in last.values())


def test_two_terms_of_one_name_both_count(normaliser):
    """`legato+slowness` has two: their sum is logged, and is part of the loss."""
    term = Slowness(window=4, coefficient=0.5)
    both = [SAEConfig("one", BatchTopK(4), F, (term,)), SAEConfig("two", BatchTopK(4), F, (term, term))]
    _, log = train(both, normaliser, TrainConfig(steps=1))
    one, two = (record["loss_terms"] for record in log)
    assert two["slowness"] == pytest.approx(2 * one["slowness"])
    assert log[1]["loss"] - log[0]["loss"] == pytest.approx(one["slowness"])


def test_relu_codes_that_nothing_makes_sparse_are_refused():
    with pytest.raises(ValueError, match="nothing makes ReLU codes sparse"):
        SAEConfig("dense", ReLU(0.0), F, (WindowVariance(window=4, coefficient=0.3),))


def test_an_auxiliary_loss_revives_dead_latents(normaliser):
    config = dataclasses.replace(CONFIG, dead_after_tokens=300, aux_k=8)
    _, with_aux = train([ARMS[0]], normaliser, config)
    _, without = train([ARMS[0]], normaliser, dataclasses.replace(config, aux_coefficient=0.0))
    assert any("auxiliary" in record["loss_terms"] for record in with_aux)
    assert with_aux[-1]["dead"] <= without[-1]["dead"]


def test_a_failing_member_is_dropped_and_the_others_go_on(normaliser):
    bad = SAEConfig("explodes", BatchTopK(4), F, (WindowVariance(window=4, coefficient=float("nan")),))
    result, _ = train([ARMS[0], bad, ARMS[1]], normaliser)
    assert [trainer.arm.name for trainer in result.finished] == ["baseline", "topk"]
    [(trainer, reason)] = result.failed
    assert trainer.arm.name == "explodes"
    assert "diverged" in reason
    assert all(torch.isfinite(tensor).all() for _, tensor in trainer.parameters.items())
    with pytest.raises(LegatoError, match="diverged"):
        train([bad], normaliser)


def test_states_that_are_no_result_are_errors(normaliser):
    with pytest.raises(LegatoError, match="0 training steps"):
        TrainConfig(steps=0)
    with pytest.raises(LegatoError, match="ran out after 3 of 120"):
        train([ARMS[0]], normaliser, batches=planted_batches(3))
    [batch] = planted_batches(1)
    spoiled = dataclasses.replace(batch, acts_BLD=batch.acts_BLD.clone().index_fill_(1, torch.tensor(3), torch.nan))
    with pytest.raises(LegatoError, match="not finite"):
        train([ARMS[0]], normaliser, batches=[spoiled])
    with pytest.raises(LegatoError, match="no valid token"):
        train([ARMS[0]], normaliser, batches=[dataclasses.replace(batch, mask_BL=batch.mask_BL & False)])


def test_the_learning_rate_warms_up_and_decays():
    config = TrainConfig(steps=100, lr=1.0, warmup=0.1, decay=0.2)
    rates = [config.lr_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[79] == pytest.approx(1.0)
    assert rates[80:] == sorted(rates[80:], reverse=True)
    assert rates[99] == pytest.approx(0.05)


def test_the_stated_memory_covers_what_is_allocated():
    [need] = bank_bytes(ARMS[:1], D, B * L)
    assert need > F * D * 4 * 6
