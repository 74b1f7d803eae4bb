"""Token information and burstiness: hand-worked numbers, exact nulls against real shuffles, batches, silence."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import mutual_info_score
from sklearn.metrics.cluster import contingency_matrix, expected_mutual_information

from legato import metrics
from legato.evaluation.latents import tokens as token_statistics
from legato.evaluation.latents.burstiness import GapSums, burstiness
from legato.evaluation.latents.tokens import TokenCounts, token_features, token_information
from legato.evaluation.sums.lag_pairs import LagPairs, pairs_by_latent
from legato.sae.codes import SparseCodes


def entropy(*shares):
    return -sum(share * math.log(share) for share in shares)


def add(sums, codes_BLF, tokens_BL=None, mask_BL=None, doc_BL=None):
    mask_BL = torch.ones(codes_BLF.shape[:2], dtype=torch.bool) if mask_BL is None else mask_BL
    layout = LagPairs.of(mask_BL, doc_BL, (1,))
    order = pairs_by_latent(SparseCodes.from_dense(codes_BLF), layout)
    sums.add(*([] if tokens_BL is None else [tokens_BL]), layout, order)
    return sums


def token_counts(codes_BLF, tokens_BL, mask_BL=None):
    return add(TokenCounts(codes_BLF.shape[2]), codes_BLF, tokens_BL, mask_BL)


def gap_sums(codes_BLF, **kwargs):
    return add(GapSums.zero(codes_BLF.shape[2]), codes_BLF, **kwargs)


def one_row(values):
    return torch.tensor(values, dtype=torch.float32)[None, :, None]


def random_batch(B=6, L=40, F=5, V=12, seed=0):
    rng = np.random.default_rng(seed)
    tokens_BL = torch.from_numpy(np.minimum(rng.geometric(0.3, (B, L)), V) * 1000)
    codes_BLF = torch.from_numpy(np.maximum(rng.normal(-0.5, 1, (B, L, F)), 0)).float()
    codes_BLF[..., F - 1] = 0  # never fires
    mask_BL = torch.from_numpy(rng.random((B, L)) < 0.9)
    return codes_BLF * mask_BL[..., None], tokens_BL, mask_BL


# --- mutual information ---------------------------------------------------------------------------------------------


def test_a_latent_that_fires_exactly_on_one_token_by_hand():
    # 8 positions, tokens 7 7 3 4 5 6 6 6, on exactly where the token is 7: knowing the token leaves nothing open, so
    # I = H(1/4). Cells: 1 on (7), 4 off (3 4 5 6): m_joint 5, m_firing 2, m_token 5: (5 - 2 - 5 + 1) / 16 = -1/16
    tokens_BL = torch.tensor([[7, 7, 3, 4, 5, 6, 6, 6]])
    information = token_information(token_counts(one_row([1, 2, 0, 0, 0, 0, 0, 0]), tokens_BL))
    assert information.plug_in_F == pytest.approx(entropy(1 / 4, 3 / 4))
    assert information.entropy_F == pytest.approx(entropy(1 / 4, 3 / 4))
    assert information.miller_madow_F == pytest.approx(entropy(1 / 4, 3 / 4) + 1 / 16)
    assert information.adjusted_F == pytest.approx(1)
    features = token_features(token_counts(one_row([1, 2, 0, 0, 0, 0, 0, 0]), tokens_BL))
    assert features["token_mi_share"] == pytest.approx(1 + 1 / 16 / entropy(1 / 4, 3 / 4))
    assert (features["top_token"], features["top_token_share"]) == (7, 1)
    assert np.isnan(features["top_token2"])


def test_a_latent_that_fires_on_half_of_each_token_by_hand():
    # tokens 1 1 2 2, on at one of each: plug-in 0, all 4 cells seen: (4 - 2 - 2 + 1) / 8 = 1/8.
    # Shuffled, the two firings fall on different tokens with probability 4 of 6 (I = 0), else on one (I = ln 2): E = ln
    # 2 / 3, so adjusted (0 - ln 2 / 3) / (ln 2 - ln 2 / 3) = -1/2
    information = token_information(token_counts(one_row([1, 0, 0, 3]), torch.tensor([[1, 1, 2, 2]])))
    assert information.plug_in_F == pytest.approx(0, abs=1e-12)
    assert information.miller_madow_F == pytest.approx(-1 / 8)
    assert information.shuffled_F == pytest.approx(math.log(2) / 3)
    assert information.adjusted_F == pytest.approx(-1 / 2)


def test_independent_latents_have_no_information_after_correction():
    rng = np.random.default_rng(0)
    tokens_BL = torch.from_numpy(rng.integers(0, 20, (40, 100)))
    codes_BLF = torch.from_numpy(rng.random((40, 100, 50)) < 0.3).float()
    information = token_information(token_counts(codes_BLF, tokens_BL))
    # plug-in mean (20 - 1) (2 - 1) / (2 * 4000) = 0.0024; a chi-square of 19 degrees over 2 N: sd 0.0008, over 50 .0001
    assert information.plug_in_F.mean() == pytest.approx(19 / 8000, abs=4e-4)
    assert information.miller_madow_F.mean() == pytest.approx(0, abs=4e-4)
    assert information.adjusted_F.mean() == pytest.approx(0, abs=1e-3)


def test_rare_latents_over_many_tokens_need_the_exact_null():
    # 20 firings among 500 tokens: nearly every firing has a cell of its own, Miller-Madow leaves most of the bias
    rng = np.random.default_rng(1)
    tokens_BL = torch.from_numpy(rng.integers(0, 500, (1, 2000)))
    codes_BLF = torch.from_numpy(rng.permuted(np.tile(np.arange(2000) < 20, (200, 1)), axis=1).T[None]).float()
    information = token_information(token_counts(codes_BLF, tokens_BL))
    assert (information.miller_madow_F / information.entropy_F).mean() > 0.2
    assert information.adjusted_F.mean() == pytest.approx(0, abs=0.01)


def test_plug_in_and_expectation_agree_with_scikit_learn_and_with_shuffles():
    codes_BLF, tokens_BL, mask_BL = random_batch()
    information = token_information(token_counts(codes_BLF, tokens_BL, mask_BL))
    tokens_N, on_NF = tokens_BL[mask_BL].numpy(), (codes_BLF[mask_BL] > 0).numpy()
    for i in range(4):
        assert information.plug_in_F[i] == pytest.approx(mutual_info_score(tokens_N, on_NF[:, i]), abs=1e-12)
        table = contingency_matrix(tokens_N, on_NF[:, i], sparse=True).astype(np.int64)
        assert information.shuffled_F[i] == pytest.approx(expected_mutual_information(table, len(tokens_N)), abs=1e-9)
    rng = np.random.default_rng(0)
    shuffled = np.array([mutual_info_score(tokens_N, rng.permutation(on_NF[:, 0])) for _ in range(300)])
    assert information.shuffled_F[0] == pytest.approx(shuffled.mean(), abs=4 * shuffled.std() / math.sqrt(300))


def test_latents_that_never_fire_or_always_fire_have_no_information():
    tokens_BL = torch.tensor([[5, 6, 6]])
    features = token_features(token_counts(torch.tensor([[[0.0, 1], [0, 1], [0, 1]]]), tokens_BL))
    assert features["token_mi"].tolist() == pytest.approx([0, 0])
    for name in ("token_mi_share", "token_mi_adjusted"):
        assert np.isnan(features[name]).all()
    np.testing.assert_array_equal(features["top_token"], [np.nan, 6])
    np.testing.assert_array_equal(features["top_token2"], [np.nan, 5])
    np.testing.assert_allclose(features["top_token_share"], [np.nan, 2 / 3])


def test_positions_that_are_not_valid_do_not_count():
    codes_BLF, tokens_BL = one_row([0, 1, 0, 1]), torch.tensor([[250_000, 1, 2, 1]])
    mask_BL = torch.tensor([[False, True, True, True]])
    information = token_information(token_counts(codes_BLF, tokens_BL, mask_BL))
    assert information.plug_in_F == pytest.approx(entropy(1 / 3, 2 / 3))


# --- streaming --------------------------------------------------------------------------------------------------------


def state(sums):
    return [*sums.pairs(), np.trim_zeros(sums.tokens_V, "b")]


def assert_same(sums, other):
    for mine, theirs in zip(state(sums), state(other), strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("pending", [1, 1 << 20])
def test_batches_and_parts_add_up_to_the_whole(monkeypatch, pending):
    monkeypatch.setattr(token_statistics, "_PENDING", pending)
    codes_BLF, tokens_BL, mask_BL = random_batch()
    tokens_BL[0, :5] = 200_000  # so that only one part sees the largest ids
    whole = token_counts(codes_BLF, tokens_BL, mask_BL)
    first, second = slice(0, 2), slice(2, 6)
    streamed, other = TokenCounts(5), TokenCounts(5)
    for rows, sums in ((first, streamed), (second, streamed), (second, other)):
        add(sums, codes_BLF[rows], tokens_BL[rows], mask_BL[rows])
    assert_same(streamed, whole)
    other.merge(token_counts(codes_BLF[first], tokens_BL[first], mask_BL[first]))
    assert_same(other, whole)


def test_summed_gaps_add_up():
    codes_BLF, _, mask_BL = random_batch()
    whole = gap_sums(codes_BLF, mask_BL=mask_BL)
    parts = [gap_sums(codes_BLF[rows], mask_BL=mask_BL[rows]) for rows in (slice(0, 2), slice(2, 6))]
    parts[0].merge(parts[1])
    for name, values_F in vars(whole).items():
        np.testing.assert_allclose(getattr(parts[0], name), values_F, rtol=1e-12)


# --- burstiness -------------------------------------------------------------------------------------------------------


def test_burstiness_by_hand():
    # on at 0 1 2 6 of 7: gaps 1 1 4, mean 2, variance (1 + 1 + 16) / 3 - 4 = 2: B = (sqrt 2 - 2) / (sqrt 2 + 2)
    # shuffled, 4 firings in 7: M = 8, m = 5, E g = 8/5, E g^2 = 2 * 8 * 9 / (5 * 6) - 8/5 = 16/5, variance 16/25:
    # (4/5 - 8/5) / (4/5 + 8/5) = -1/3
    real_F, null_F = burstiness(gap_sums(one_row([1, 1, 1, 0, 0, 0, 1])))
    assert real_F == pytest.approx((math.sqrt(2) - 2) / (math.sqrt(2) + 2))
    assert null_F == pytest.approx(-1 / 3)


def test_periodic_poisson_and_bursty_sequences():
    rng = np.random.default_rng(0)
    periodic = np.tile(np.arange(1000) % 10 == 0, (40, 1))
    poisson = rng.random((40, 1000)) < 0.02
    bursts = np.repeat(rng.random((40, 100)) < 0.05, 10, axis=1) & (rng.random((40, 1000)) < 0.5)
    codes_BLF = torch.from_numpy(np.stack([periodic, poisson, bursts], -1)).float()
    real_F, null_F = burstiness(gap_sums(codes_BLF))
    assert real_F[0] == pytest.approx(-1)
    # geometric gaps: sigma / mu = sqrt(1 - p) = 0.990, B = -0.005; the row's end cuts off the longest
    assert real_F[1] == pytest.approx(-0.03, abs=0.03)
    assert real_F[1] - null_F[1] == pytest.approx(0, abs=0.02)
    assert real_F[2] > 0.3
    assert real_F[2] - null_F[2] > 0.3


def test_the_null_is_what_shuffles_give():
    # two stretches of 12 and 8 valid tokens, 5 and 3 firings
    rng = np.random.default_rng(0)
    doc_BL = torch.tensor([[0] * 12 + [1] * 8])
    on_L = np.array([1] * 5 + [0] * 7 + [1] * 3 + [0] * 5)
    exact = gap_sums(one_row(on_L), doc_BL=doc_BL)
    orders = [np.concatenate([rng.permutation(on_L[:12]), rng.permutation(on_L[12:])]) for _ in range(2000)]
    shuffled = gap_sums(torch.tensor(np.array(orders)).T[None].float(), doc_BL=doc_BL)
    for real, null in (("total_F", "shuffled_total_F"), ("square_F", "shuffled_square_F")):
        values_F = getattr(shuffled, real)
        assert getattr(exact, null)[0] == pytest.approx(values_F.mean(), abs=4 * values_F.std() / math.sqrt(2000))


def test_gaps_skip_positions_that_are_not_valid_and_never_leave_a_document():
    mask_BL = torch.tensor([[True, False, True, True, True, True]])
    doc_BL = torch.tensor([[0, 0, 0, 0, 1, 1]])
    sums = gap_sums(one_row([1, 0, 1, 0, 1, 1]), mask_BL=mask_BL, doc_BL=doc_BL)
    # gap 1 in the first document (the masked position takes no time), 1 in the second, none between
    assert (sums.gaps_F.item(), sums.total_F.item()) == (2, 2)


def test_fewer_than_two_gaps_have_no_burstiness():
    for values in ([0, 0, 0], [1, 0, 1]):
        real_F, null_F = burstiness(gap_sums(one_row(values)))
        assert np.isnan(real_F).all()
        assert np.isnan(null_F).all()


def test_both_are_there_as_functions_of_dense_codes():
    codes_BLF, tokens_BL, mask_BL = random_batch()
    information = token_information(token_counts(codes_BLF, tokens_BL, mask_BL))
    corrected_F, adjusted_F = metrics.token_information(codes_BLF, tokens_BL, mask_BL)
    np.testing.assert_array_equal(corrected_F.numpy(), information.miller_madow_F)
    np.testing.assert_array_equal(adjusted_F.numpy(), information.adjusted_F)
    real_F, null_F = metrics.burstiness(one_row([1, 1, 1, 0, 0, 0, 1]), torch.ones(1, 7, dtype=torch.bool))
    assert (real_F.item(), null_F.item()) == pytest.approx(((math.sqrt(2) - 2) / (math.sqrt(2) + 2), -1 / 3))
