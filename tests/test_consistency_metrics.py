"""Consistency metrics: hand-worked numbers, nulls against real shuffles, what theory says of known processes."""

import math

import numpy as np
import pytest
import torch

from legato import metrics
from legato.evaluation.consistency.persistence import (
    consistency_metrics,
    half_life,
    lag_correlation,
    raw_stream_metrics,
)
from legato.evaluation.sums.accumulators import CodeSums, PairCounts, PairSums
from legato.evaluation.sums.lag_pairs import LagPairs, pairs_by_latent
from legato.sae.codes import SparseCodes

L = 128


def one_latent(*rows):
    """codes_BLF and a full mask of one latent."""
    codes_BLF = torch.tensor(rows, dtype=torch.float32)[..., None]
    return codes_BLF, torch.ones(codes_BLF.shape[:2], dtype=torch.bool)


def sums_of(codes_BLF, mask_BL, doc_BL=None, lags=(1,)):
    layout = LagPairs.of(mask_BL, doc_BL, lags)
    sums = CodeSums.zero(codes_BLF.shape[2], codes_BLF.shape[1], lags)
    sums.add(layout, pairs_by_latent(SparseCodes.from_dense(codes_BLF), layout))
    return sums


# --- hand-worked ------------------------------------------------------------------------------------------------------


def test_autocorrelation_and_both_nulls_by_hand():
    # f = 1 1 0 0: mean 1/2, variance 1/4, S = Q = 2. Pairs (1,1) (1,0) (0,0) give products of deviations 1/4, -1/4,
    # 1/4, so real = (1/4 / 3) / (1/4) = 1/3.
    # Within: E f f' = (S^2 - Q) / (n (n - 1)) = 2 / 12, so (1/6 - 1/4) / (1/4) = -1/3 = -1 / (n - 1).
    # Cross: with a single row a shuffle across rows changes nothing, so 1/3 again.
    correlations = metrics.autocorrelation(*one_latent([1, 1, 0, 0]), lags=(1,))
    assert correlations.real.item() == pytest.approx(1 / 3)
    assert correlations.within_null.item() == pytest.approx(-1 / 3)
    assert correlations.cross_null.item() == pytest.approx(1 / 3)
    assert correlations.excess_within.item() == pytest.approx(2 / 3)
    assert correlations.excess_cross.item() == pytest.approx(0)


def test_the_cross_null_takes_each_positions_mean():
    # Rows 1 0 and 1 2: means by position 1 and 1, overall mean 1, variance (0 + 1 + 0 + 1) / 4 = 1/2.
    # real: deviations (0, -1), (0, 1): 0. cross: r_0 r_1 - 1 = 0. Now rows 2 0 and 2 0: real and cross are both -1.
    assert metrics.autocorrelation(*one_latent([1, 0], [1, 2]), lags=(1,)).real.item() == pytest.approx(0)
    correlations = metrics.autocorrelation(*one_latent([2, 0], [2, 0]), lags=(1,))
    assert correlations.real.item() == pytest.approx(-1)
    assert correlations.cross_null.item() == pytest.approx(-1)


def test_both_nulls_at_a_longer_lag_by_hand():
    # 3 0 0 3 in one document: mean 3/2, variance 9/4. Lag 3 has the one pair (3, 3): deviations 9/4, so real = 1.
    # Within: E f f' = (S^2 - Q) / (n (n - 1)) = (36 - 18) / 12 = 3/2, E (f + f') = 2 * 6 / 4 = 3:
    # (3/2 - 3/2 * 3 + 9/4) / (9/4) = -1/3. A second row 0 3 3 0 makes the means by position 3/2 throughout: cross 0,
    # real (9/4 + 9/4) / 2 / (9/4) = 1, within unchanged.
    correlations = metrics.autocorrelation(*one_latent([3, 0, 0, 3]), lags=(1, 3))
    assert correlations.real[0, 1].item() == pytest.approx(1)
    assert correlations.within_null[0, 1].item() == pytest.approx(-1 / 3)
    correlations = metrics.autocorrelation(*one_latent([3, 0, 0, 3], [0, 3, 3, 0]), lags=(3,))
    assert correlations.real.item() == pytest.approx(1)
    assert correlations.within_null.item() == pytest.approx(-1 / 3)
    assert correlations.cross_null.item() == pytest.approx(0)


def test_kappa_is_the_conditional_firing_rate_over_chance():
    # 1 1 0 0 / 0 0 1 1: p = 1/2; three on positions have a successor, two of those are on: P(on | on) = 2/3;
    # kappa = (2/3 - 1/2) / (1 - 1/2) = 1/3. Magnitudes do not matter.
    codes_BLF, mask_BL = one_latent([5, 1, 0, 0], [0, 0, 2, 9])
    assert metrics.kappa(codes_BLF, mask_BL, lags=(1,)).real.item() == pytest.approx(1 / 3)


def test_pairs_do_not_cross_documents_or_masked_positions():
    # 1 1 | 0 0 as two documents: pairs (1,1) and (0,0): real = 1; each document is constant, so its shuffles are too.
    codes_BLF, mask_BL = one_latent([1, 1, 0, 0])
    doc_BL = torch.tensor([[0, 0, 1, 1]])
    correlations = metrics.autocorrelation(codes_BLF, mask_BL, doc_BL, lags=(1,))
    assert correlations.real.item() == pytest.approx(1)
    assert correlations.within_null.item() == pytest.approx(1)
    # With the third position masked, f = 1 1 . 0: one pair (1,1); mean 2/3, variance 2/9: (1/9) / (2/9) = 1/2
    mask_BL = torch.tensor([[True, True, False, True]])
    assert metrics.autocorrelation(codes_BLF, mask_BL, lags=(1,)).real.item() == pytest.approx(1 / 2)


def test_half_life_interpolates_between_measured_lags():
    # lags 1, 2, 4: .9 .6 .2 falls below .5 between 2 and 4: 2 + (.6 - .5) / (.6 - .2) * 2 = 2.5
    # .3 at lag 1, from 1 at lag 0: (1 - .5) / (1 - .3) = 5/7
    # never below one half: the largest lag, censored. Undefined stays undefined.
    ac_FK = np.array([[0.9, 0.6, 0.2], [0.3, 0.0, 0.0], [0.9, 0.8, 0.7], [np.nan] * 3])
    half_life_F, censored_F = half_life((1, 2, 4), ac_FK)
    assert half_life_F[:3].tolist() == pytest.approx([2.5, 5 / 7, 4.0])
    assert math.isnan(half_life_F[3])
    assert censored_F.tolist() == [False, False, True, False]


def test_half_life_is_censored_at_the_largest_lag_with_pairs():
    # a constant document beside a constant silent one: AC = 1 at lags 1 and 2; rows are too short for lag 4
    codes_BLF, mask_BL = one_latent([1, 1, 1], [0, 0, 0])
    half_life_F, censored_F = metrics.half_life(codes_BLF, mask_BL, lags=(1, 2, 4))
    assert half_life_F.item() == 2
    assert censored_F.item()


def test_run_length_and_switching_by_hand():
    # 1 1 0 1: runs of 2 and 1, mean 3/2, times 1 - p = 1/4: 3/8. Two of three pairs switch: (2/3) / (2 * 3/4 * 1/4) =
    # 16/9
    codes_BLF, mask_BL = one_latent([1, 1, 0, 1])
    assert metrics.run_length_ratio(codes_BLF, mask_BL).item() == pytest.approx(3 / 8)
    assert metrics.switching_ratio(codes_BLF, mask_BL).item() == pytest.approx(16 / 9)


def test_jaccard_and_sequence_l0_by_hand():
    # supports {a} {a, b} {b}: intersections 1 + 1 over unions 2 + 2 = 1/2. p = 2/3 for both:
    # null = sum p^2 / sum (2 p - p^2) = (8/9) / (16/9) = 1/2
    codes_BLF = torch.tensor([[[1.0, 0], [1, 1], [0, 1]]])
    mask_BL = torch.ones(1, 3, dtype=torch.bool)
    assert metrics.jaccard(codes_BLF, mask_BL) == pytest.approx((1 / 2, 1 / 2))
    two_rows = torch.cat([codes_BLF, codes_BLF * torch.tensor([1.0, 0])])
    assert metrics.sequence_l0(two_rows, mask_BL.expand(2, -1)) == pytest.approx(3 / 2)


def test_smoothness_is_the_steepest_change_per_unit_of_input():
    # x moves by 1 and then by 1/4; the first latent goes 0 2 1: slopes 2 and 4, steepest 4; the second does not move
    codes_BLF = torch.tensor([[[0.0, 1], [2, 1], [1, 1]]])
    acts_BLD = torch.tensor([[[0.0], [1.0], [1.25]]])
    mask_BL = torch.ones(1, 3, dtype=torch.bool)
    assert metrics.smoothness(codes_BLF, acts_BLD, mask_BL) == pytest.approx((4 + 0) / 2)
    assert metrics.smoothness(3 * codes_BLF, acts_BLD, mask_BL) == pytest.approx(6)  # it scales: never use it alone


def test_document_eta2_by_hand():
    # documents 1 3 and 2 4: means 2 and 3, SSB = 2 (1/4 + 1/4) = 1, SST = 5, MSW = 4 / (4 - 2) = 2: (1 - 2) / 5 = -1/5
    codes_BLF, mask_BL = one_latent([1, 3, 2, 4])
    doc_BL = torch.tensor([[0, 0, 1, 1]])
    assert metrics.document_eta2(codes_BLF, mask_BL, doc_BL).item() == pytest.approx(-1 / 5)


# --- degenerate -------------------------------------------------------------------------------------------------------


def test_a_latent_that_never_fires_or_never_stops_is_undefined_not_wrong():
    codes_BLF = torch.tensor([[[0.0, 2.0]] * 4])
    mask_BL = torch.ones(1, 4, dtype=torch.bool)
    for measured in (metrics.autocorrelation, metrics.kappa):
        assert torch.isnan(measured(codes_BLF, mask_BL, lags=(1,)).real).all()
    assert torch.isnan(metrics.switching_ratio(codes_BLF, mask_BL)).all()
    aggregates = consistency_metrics(sums_of(codes_BLF, mask_BL))
    assert aggregates["latents"] == 1
    assert aggregates["kappa1"] is None
    assert aggregates["half_life_median"] is None
    assert aggregates["by_rate_bin"][-1]["latents"] == 1


def test_what_a_silent_latent_has_no_number_for_is_nan():
    codes_BLF, mask_BL = one_latent([0, 0, 0], [0, 0, 0])
    for measured in (metrics.run_length_ratio, metrics.switching_ratio, metrics.document_eta2):
        assert torch.isnan(measured(codes_BLF, mask_BL)).all()
    half_life_F, censored_F = metrics.half_life(codes_BLF, mask_BL)
    assert torch.isnan(half_life_F).all()
    assert not censored_F.any()
    assert metrics.jaccard(codes_BLF, mask_BL) == (None, None)
    assert metrics.sequence_l0(codes_BLF, mask_BL) == 0


def test_documents_of_one_token_say_nothing_about_documents():
    codes_BLF, mask_BL = one_latent([1, 2], [3, 4])
    doc_BL = torch.arange(4).view(2, 2)
    assert torch.isnan(metrics.document_eta2(codes_BLF, mask_BL, doc_BL)).all()
    assert torch.isnan(metrics.autocorrelation(codes_BLF, mask_BL, doc_BL, lags=(1,)).real).all()  # no pair


def test_smoothness_without_movement_is_zero_not_infinite():
    codes_BLF, mask_BL = one_latent([0, 2, 0])
    assert metrics.smoothness(codes_BLF, torch.zeros(1, 3, 1), mask_BL) == 0
    assert consistency_metrics(sums_of(codes_BLF, mask_BL))["smoothness"] is None  # no activations were given


def test_a_raw_dimension_that_does_not_vary_is_left_out():
    # dimension 0 as f = 1 1 0 0 above (AC 1/3), dimension 1 constant
    acts_BLD = torch.tensor([[[1.0, 7], [1, 7], [0, 7], [0, 7]]])
    layout = LagPairs.of(torch.ones(1, 4, dtype=torch.bool), None, (1,))
    counts, sums = PairCounts.zero(4, (1,)), PairSums.zero(2, 4, 1)
    counts.add(layout)
    sums.add_dense(acts_BLD, layout)
    assert raw_stream_metrics(counts, sums)["ac"]["mean"] == pytest.approx([1 / 3])


def test_rows_too_short_for_a_lag_give_none_for_that_lag():
    aggregates = consistency_metrics(sums_of(*one_latent([1, 0, 1], [0, 1, 1]), lags=(1, 8)))
    assert aggregates["ac"]["mean"][0] is not None
    assert aggregates["ac"]["mean"][1] is None
    assert aggregates["ac_excess_within"][1] is None


def test_no_valid_position_gives_none_throughout():
    codes_BLF, mask_BL = one_latent([1, 1, 0])
    aggregates = consistency_metrics(sums_of(codes_BLF * 0, mask_BL & False))
    assert aggregates["ac1"] is None
    assert aggregates["sequence_l0"] is None
    assert aggregates["jaccard"] is None


# --- nulls against real shuffles --------------------------------------------------------------------------------------


def correlated_codes(seed, B=8, L=10):
    """Two documents a row, holes, codes with memory and a position trend."""
    generator = np.random.default_rng(seed)
    level_BL = generator.normal(size=(B, L)).cumsum(1) * 0.5 + np.linspace(-1, 1, L)
    codes_BLF = np.maximum(np.stack([level_BL, -level_BL, generator.normal(size=(B, L))], 2), 0)
    mask_BL = generator.random((B, L)) < 0.85
    doc_BL = (np.arange(L) >= generator.integers(2, L, (B, 1))) + 2 * np.arange(B)[:, None]
    return codes_BLF * mask_BL[..., None], mask_BL, doc_BL


def shuffled_within_documents(codes_BLF, mask_BL, doc_BL, generator):
    shuffled = codes_BLF.copy()
    for b in range(len(codes_BLF)):
        for document in np.unique(doc_BL[b][mask_BL[b]]):
            where = np.flatnonzero(mask_BL[b] & (doc_BL[b] == document))
            shuffled[b, where] = codes_BLF[b, generator.permutation(where)]
    return shuffled


def shuffled_across_rows(codes_BLF, mask_BL, doc_BL, generator):
    shuffled = codes_BLF.copy()
    for t in range(codes_BLF.shape[1]):
        where = np.flatnonzero(mask_BL[:, t])
        shuffled[where, t] = codes_BLF[generator.permutation(where), t]
    return shuffled


@pytest.mark.parametrize(
    ("null", "shuffle"), [("within_null", shuffled_within_documents), ("cross_null", shuffled_across_rows)]
)
def test_closed_form_nulls_are_the_mean_of_a_thousand_shuffles(null, shuffle):
    codes_BLF, mask_BL, doc_BL = correlated_codes(seed=1)
    mask, doc, lags = torch.from_numpy(mask_BL), torch.from_numpy(doc_BL), (1, 3)

    layout = LagPairs.of(mask, doc, lags)

    def both(codes):
        sums = CodeSums.zero(codes.shape[2], codes.shape[1], lags)
        sums.add(layout, pairs_by_latent(SparseCodes.from_dense(torch.from_numpy(codes)), layout))
        return [lag_correlation(sums.counts, pair_sums) for pair_sums in (sums.value, sums.firing)]

    expected = np.stack([getattr(measured, f"{null}_FK") for measured in both(codes_BLF)])
    generator = np.random.default_rng(2)
    draws = np.stack(
        [
            np.stack([measured.real_FK for measured in both(shuffle(codes_BLF, mask_BL, doc_BL, generator))])
            for _ in range(1000)
        ]
    )
    standard_error = draws.std(0) / math.sqrt(len(draws))
    assert (standard_error > 0).all()
    assert (np.abs(draws.mean(0) - expected) < 3.5 * standard_error).all()


# --- invariance -------------------------------------------------------------------------------------------------------


def test_rescaling_a_latent_changes_no_metric_but_smoothness():
    codes_BLF, mask_BL, doc_BL = (torch.from_numpy(array) for array in correlated_codes(seed=3))
    scale_F = torch.tensor([0.25, 8.0, 64.0])  # powers of two: no rounding
    before = consistency_metrics(sums_of(codes_BLF, mask_BL, doc_BL, (1, 2, 4)))
    after = consistency_metrics(sums_of(codes_BLF * scale_F, mask_BL, doc_BL, (1, 2, 4)))
    assert before == after


# --- six processes with known persistence -----------------------------------------------------------------------------

ROWS = 600


def archetype(name, generator):
    shape = (ROWS, L)
    if name == "iid sparse":
        return generator.random(shape) < 0.02
    if name == "iid dense":
        return generator.random(shape) < 0.5
    if name == "markov":
        p, rho = 0.05, 0.9  # P(on | on) = rho + (1 - rho) p, P(on | off) = (1 - rho) p
        on = np.zeros(shape, bool)
        on[:, 0] = generator.random(ROWS) < p
        for t in range(1, L):
            on[:, t] = generator.random(ROWS) < np.where(on[:, t - 1], rho + (1 - rho) * p, (1 - rho) * p)
        return on
    if name == "topic":
        return (np.arange(ROWS) % 10 == 0)[:, None] & (generator.random(shape) < 0.5)
    if name == "always on in its document":
        return np.broadcast_to((np.arange(ROWS) % 10 == 0)[:, None], shape)
    assert name == "position ramp"
    return generator.random(shape) < 0.4 * np.arange(L) / (L - 1)


def expected_within_null_of_markov(n, rho):
    """Mean of rho^|s - t| over the pairs of n positions."""
    lags = np.arange(1, n)
    return float((2 * (n - lags) * rho**lags).sum() / (n * (n - 1)))


# kappa(1), its within-document null, its cross-document null, tolerance (4 standard errors of the process or more)
THEORY = {
    "iid sparse": (0, 0, 0, 0.015),
    "iid dense": (0, 0, 0, 0.015),
    "markov": (0.9, expected_within_null_of_markov(L, 0.9), 0, 0.03),
    # P(on) = q s with q = 1/2 in a share s = 1/10 of documents: (s q^2 - (s q)^2) / (s q (1 - s q)) = 9/19 at every lag
    "topic": (9 / 19, 9 / 19, 0, 0.03),
    "always on in its document": (1, 1, 0, 1e-9),
    # p_t = 0.4 t / 127: variance between positions 0.4^2 / 12 over p (1 - p) = 0.16 explains all persistence
    "position ramp": (0.16 / 12 / 0.16, 0, 0.16 / 12 / 0.16, 0.02),
}


@pytest.mark.parametrize("name", THEORY)
def test_known_processes_come_out_as_theory_says(name):
    on_BL = archetype(name, np.random.default_rng(7))
    codes_BLF = torch.from_numpy(on_BL.copy()).float()[..., None]
    mask_BL = torch.ones(ROWS, L, dtype=torch.bool)
    measured = metrics.kappa(codes_BLF, mask_BL)
    real, within, cross, tolerance = THEORY[name]
    assert measured.real[0, 0].item() == pytest.approx(real, abs=tolerance)
    assert measured.within_null[0, 0].item() == pytest.approx(within, abs=tolerance)
    assert measured.cross_null[0, 0].item() == pytest.approx(cross, abs=tolerance)
    half_life_F, censored_F = metrics.half_life(codes_BLF, mask_BL)
    run_length, switching = (f(codes_BLF, mask_BL).item() for f in (metrics.run_length_ratio, metrics.switching_ratio))
    eta2 = metrics.eta2(codes_BLF, mask_BL).item()
    if name.startswith("iid"):
        assert run_length == pytest.approx(1, abs=0.03)
        assert switching == pytest.approx(1, abs=0.03)
        assert half_life_F.item() == pytest.approx(0.5, abs=0.02)  # from 1 at lag 0 to 0 at lag 1
    if name == "markov":
        # rho^k = 1/2 at k = 6.6; switches happen at 1 - rho of their independent rate
        assert half_life_F.item() == pytest.approx(math.log(0.5) / math.log(0.9), abs=1.0)
        assert switching == pytest.approx(0.1, abs=0.02)
    if name == "always on in its document":
        assert censored_F.item()
        assert switching == 0
    if name == "position ramp":
        assert eta2 == pytest.approx(0.16 / 12 / 0.16, abs=0.01)
        assert measured.excess_cross[0].abs().max().item() < 0.02
    else:
        assert eta2 == pytest.approx(0, abs=0.01)


# --- aggregates -------------------------------------------------------------------------------------------------------


def test_aggregates_are_means_over_alive_latents_and_by_firing_rate():
    # latent 0 as in the first hand-worked test (AC 1/3, two firings), latent 1 dead, latent 2 alternates 1 0 1 0:
    # mean 1/2, products -1/4 x 3: AC -1, and P(on | on) = 0
    rows = torch.tensor([[1.0, 1, 0, 0], [0, 0, 0, 0], [4, 0, 4, 0]]).T[None]
    aggregates = consistency_metrics(sums_of(rows, torch.ones(1, 4, dtype=torch.bool)))
    assert aggregates["latents"] == 2
    assert aggregates["ac1"] == pytest.approx((1 / 3 - 1) / 2)
    assert aggregates["ac1_within_null"] == pytest.approx(-1 / 3)
    assert aggregates["ac1_excess_within"] == pytest.approx((2 / 3 - 2 / 3) / 2)
    assert aggregates["ac1_weighted"] == pytest.approx((1 / 3 - 1) / 2)  # both fire twice
    assert [entry["latents"] for entry in aggregates["by_rate_bin"]] == [0, 0, 0, 2]
    assert aggregates["by_rate_bin"][-1]["bin"] == [0.1, 1.0]
    assert aggregates["by_rate_bin"][-1]["kappa1"] == pytest.approx((1 / 3 - 1) / 2)


def test_firing_weighted_means_follow_the_firings():
    # latent 0 fires once in 8, latent 1 four times as 1 1 1 1 0 0 0 0
    rows = torch.tensor([[0.0, 1, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0]]).T[None]
    mask_BL = torch.ones(1, 8, dtype=torch.bool)
    single = metrics.autocorrelation(rows, mask_BL, lags=(1,)).real[:, 0]
    aggregates = consistency_metrics(sums_of(rows, mask_BL))
    assert aggregates["ac1_weighted"] == pytest.approx(float((single[0] * 1 + single[1] * 4) / 5))


def test_the_raw_stream_is_measured_per_dimension():
    # dimension 0 as f = 1 1 0 0 shifted far from zero, dimension 1 alternating: means of 1/3 and -1
    acts_BLD = torch.tensor([[[1001.0, 5], [1001, 6], [1000, 5], [1000, 6]]])
    layout = LagPairs.of(torch.ones(1, 4, dtype=torch.bool), None, (1,))
    counts, sums = PairCounts.zero(4, (1,)), PairSums.zero(2, 4, 1)
    counts.add(layout)
    sums.add_dense(acts_BLD, layout)
    ac = raw_stream_metrics(counts, sums)["ac"]
    assert ac["mean"] == pytest.approx([(1 / 3 - 1) / 2])
    assert ac["within_null"] == pytest.approx([-1 / 3])
    assert ac["excess_within"] == pytest.approx([0], abs=1e-9)
