"""Redundancy across positions: a hand-worked example of each class, the null against shuffles, no false discoveries."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from legato.common.errors import LegatoError, UsageError
from legato.data.activations import ActivationBatch
from legato.evaluation.redundancy import pairs
from legato.evaluation.redundancy.classes import Limits, adjusted, lagged_pairs, similar_pairs
from legato.evaluation.redundancy.sums import (
    Candidates,
    CandidateSums,
    Correlations,
    LatentSums,
    binned_firing,
    position_bins,
    profile_overlap,
    split_z,
)
from legato.evaluation.redundancy.table import write_redundancy
from legato.evaluation.sums.code_buffer import CodeBuffer, CodedBatch, coded
from legato.evaluation.sums.lag_pairs import LagPairs, pairs_by_latent
from legato.report.text.latents import redundancy_lines
from legato.sae.codes import SparseCodes

LIMITS = Limits(window=4, cosine=0.5)


def batch_of(codes_BLF, mask_BL=None, doc_BL=None):
    B, L, _ = codes_BLF.shape
    mask_BL = torch.ones(B, L, dtype=torch.bool) if mask_BL is None else mask_BL
    doc_BL = torch.arange(B)[:, None].expand(B, L) if doc_BL is None else doc_BL
    return CodedBatch(SparseCodes.from_dense(codes_BLF), mask_BL, doc_BL, torch.arange(B * L).view(B, L))


def redundancy(batches, W_dec, rows=10_000, **options):
    return pairs.redundancy(CodeBuffer.of(batches, rows), W_dec, **options)


def ordered(codes_BLF, mask_BL=None, doc_BL=None, window=2):
    batch = batch_of(codes_BLF, mask_BL, doc_BL)
    layout = LagPairs.of(batch.mask_BL, batch.doc_BL, tuple(range(1, window + 1)))
    return layout, pairs_by_latent(batch.codes, layout)


def summed(codes_BLF, candidates, mask_BL=None, doc_BL=None, window=2, first_row=0):
    layout, order = ordered(codes_BLF, mask_BL, doc_BL, window)
    sums = LatentSums.zero(codes_BLF.shape[2], codes_BLF.shape[1], window)
    sums.add(layout, order, first_row)
    pairs = CandidateSums.zero(candidates, window)
    pairs.add(layout, order)
    return sums, pairs


def one_pair(a, b, **options):
    """Correlations of latent 0 and latent 1, whose rows are given."""
    codes_BLF = torch.stack([torch.tensor(a, dtype=torch.float32), torch.tensor(b, dtype=torch.float32)], -1)
    return Correlations.of(*summed(codes_BLF, PAIR, **options))


PAIR = Candidates(np.array([0]), np.array([1]))


def random_rows(seed, B=60, L=16, F=1, rate=0.1):
    generator = torch.Generator().manual_seed(seed)
    on_BLF = torch.rand(B, L, F, generator=generator) < rate
    return on_BLF * (0.5 + torch.rand(B, L, F, generator=generator))


def ragged(B, L, seed=0):
    """Masked positions, and two documents in each row."""
    generator = torch.Generator().manual_seed(seed)
    mask_BL = torch.rand(B, L, generator=generator) < 0.85
    doc_BL = (torch.arange(L) >= torch.randint(2, L, (B, 1), generator=generator)) + 2 * torch.arange(B)[:, None]
    return mask_BL, doc_BL


def persistent_rows(seed, B=60, L=16, F=40):
    """Independent latents that stay on for several tokens, so that tokens of a row are anything but independent."""
    starts_BLF = random_rows(seed, B, L, F, rate=0.04)
    codes_BLF = starts_BLF.clone()
    for step in range(1, 5):
        codes_BLF[:, step:] += starts_BLF[:, :-step]
    return codes_BLF


# --- correlation, null and test ---------------------------------------------------------------------------------------


def test_correlation_by_hand():
    # a = 1010, b = 0101: means 1/2, variances 1/4. Lag 0: no product, (0 - 1 - 1) / 4 + 1/4 = -1/4, over 1/4: -1.
    # Lag 1, three pairs: product 2, left ends of a 2, right ends of b 2: (2 - 1 - 1) / 3 + 1/4 = 1/4: 1.
    # Lag -1, b before a: product 1, left ends of b 1, right ends of a 1: (1 - 1/2 - 1/2) / 3 + 1/4 = 1/4: 1.
    found = one_pair([[1, 0, 1, 0]], [[0, 1, 0, 1]], window=1)
    assert found.real_CK[0].tolist() == pytest.approx([1, -1, 1])
    # One row: every position's mean is its value, the null knows everything.
    assert found.excess_CK[0].tolist() == pytest.approx([0, 0, 0])
    assert found.z_CK[0].tolist() == [0, 0, 0]


def test_null_and_z_by_hand():
    # Both on at position 0 of the first of two rows. Means 1/4, variances 3/16: C(0) = 1.
    # r(0) = 1/2 for both, so the null expects a product of 2 * 1/4 = 1/2: ((1/2 - 1/2) / 4 + 1/16) / (3/16) = 1/3.
    # Each row is expected to give 1/4 and gives 1 and 0: z = (1 - 1/2) / sqrt((3/4)^2 + (1/4)^2) = 0.6325.
    found = one_pair([[1, 0], [0, 0]], [[1, 0], [0, 0]], window=1)
    assert found.real_CK[0, 1] == pytest.approx(1)
    assert found.null_CK[0, 1] == pytest.approx(1 / 3)
    assert found.z_CK[0, 1] == pytest.approx(0.5 / np.sqrt(0.625))


def test_latents_that_do_not_vary_have_no_correlation():
    found = one_pair([[1, 1], [1, 1]], [[1, 0], [0, 0]], window=1)
    assert np.isnan(found.real_CK).all()
    assert np.isnan(found.null_CK).all()
    assert (found.z_CK == 0).all()


def test_the_null_is_the_mean_of_real_shuffles():
    B, L = 30, 8
    generator = torch.Generator().manual_seed(0)
    mask_BL, doc_BL = ragged(B, L)
    ramp_L = torch.linspace(0.1, 0.9, L)[:, None]  # rates that depend on position, or the null would be nothing
    on_BLF = torch.rand(B, L, 2, generator=generator) < torch.cat([ramp_L, ramp_L.flip(0)], 1)
    codes_BLF = on_BLF * torch.rand(B, L, 2, generator=generator) * mask_BL[..., None]
    real = Correlations.of(*summed(codes_BLF, PAIR, mask_BL, doc_BL))
    shuffles = []
    for _ in range(400):
        shuffled_BLF = codes_BLF.clone()
        for t in range(L):
            rows = mask_BL[:, t].nonzero()[:, 0]
            for i in range(2):
                shuffled_BLF[rows, t, i] = codes_BLF[rows[torch.randperm(len(rows), generator=generator)], t, i]
        shuffles.append(Correlations.of(*summed(shuffled_BLF, PAIR, mask_BL, doc_BL)).real_CK[0])
    error_K = np.std(shuffles, axis=0, ddof=1) / np.sqrt(len(shuffles))
    assert (np.abs(real.null_CK[0]) > 10 * error_K).any()
    np.testing.assert_allclose(np.mean(shuffles, axis=0), real.null_CK[0], atol=4 * error_K.max(), rtol=0)


def test_pairs_never_cross_a_document_boundary_or_a_masked_end():
    a, b = [[0, 1, 0, 0]], [[0, 0, 1, 0]]
    assert one_pair(a, b).real_CK[0, 3] > 0.9
    _, cut = summed(torch.tensor([[[0, 0], [1, 0], [0, 1], [0, 0.0]]]), PAIR, doc_BL=torch.tensor([[0, 0, 1, 1]]))
    assert (cut.product_CK == 0).all()
    mask_BL = torch.tensor([[True, True, False, True]])
    _, masked = summed(torch.tensor([[[0, 0], [1, 0], [0, 1], [0, 0.0]]]), PAIR, mask_BL=mask_BL)
    assert (masked.product_CK == 0).all()


def test_rescaling_a_latent_changes_nothing():
    codes_BLF = random_rows(0, F=2, rate=0.3)
    candidates = PAIR
    before = Correlations.of(*summed(codes_BLF, candidates))
    after = Correlations.of(*summed(codes_BLF * torch.tensor([64.0, 0.25]), candidates))
    for name in ("real_CK", "null_CK", "z_CK"):
        np.testing.assert_allclose(getattr(after, name), getattr(before, name), rtol=1e-9, atol=1e-12)


def test_sums_of_two_parts_add_up_to_the_sums_of_the_whole():
    codes_BLF = random_rows(1, B=9, F=4, rate=0.3)
    mask_BL, doc_BL = ragged(9, 16)
    codes_BLF *= mask_BL[..., None]
    candidates = Candidates.of(np.array([0, 2, 1]), np.array([1, 0, 3]))
    whole = summed(codes_BLF, candidates, mask_BL, doc_BL)
    first = summed(codes_BLF[:5], candidates, mask_BL[:5], doc_BL[:5])
    second = summed(codes_BLF[5:], candidates, mask_BL[5:], doc_BL[5:], first_row=5)
    for one, other, expected in zip(first, second, whole, strict=True):
        one.merge(other)
        for name, value in vars(expected).items():
            if name != "candidates":
                np.testing.assert_allclose(getattr(one, name), value, rtol=1e-12)


def test_the_screen_finds_exactly_the_pairs_above_the_floor():
    mask_BL, doc_BL = ragged(60, 16)
    codes_BLF = random_rows(2, F=12, rate=0.15)
    codes_BLF[:, 2:, 5] += codes_BLF[:, :-2, 3]
    codes_BLF[:, 1:, 7] += 0.5 * codes_BLF[:, :-1, 8]
    codes_BLF *= mask_BL[..., None]
    pairs = np.array([(a, b) for a in range(12) for b in range(a + 1, 12)])
    everything = Candidates.of(pairs[:, 0], pairs[:, 1])
    sums, pair_sums = summed(codes_BLF, everything, mask_BL, doc_BL, window=3)
    excess_CK = Correlations.of(sums, pair_sums).excess_CK
    expected = {}
    for a, b, excess_K in zip(everything.a_C, everything.b_C, excess_CK, strict=True):
        expected |= {(a, b): excess_K[4:].max(), (b, a): excess_K[:3].max()}
    chosen_F = np.arange(12) != 11
    for floor in (0.03, 0.2):
        found = lagged_pairs(sums, *ordered(codes_BLF, mask_BL, doc_BL, window=3), chosen_F, floor)
        above = {pair: value for pair, value in expected.items() if value >= floor and 11 not in pair}
        assert len(above) > 1
        assert {(a, b): value for a, b, value in zip(*found, strict=True)} == pytest.approx(above)


def test_similar_decoders_are_found_across_blocks(monkeypatch):
    monkeypatch.setattr("legato.evaluation.redundancy.classes.COSINE_BLOCK", 2)
    directions = np.array([[1, 0], [0, 1], [0.8, 0.6], [-1, 0], [1, 0]])
    alive_F = np.array([True, True, True, True, False])
    a_C, b_C, cosine_C = similar_pairs(directions, alive_F, 0.7)
    assert list(zip(a_C, b_C, cosine_C, strict=True)) == [(0, 2, 0.8), (0, 3, -1.0), (2, 3, -0.8)]


# --- position profiles ------------------------------------------------------------------------------------------------


def test_position_bins_double_up_to_a_sixteenth_of_the_context():
    assert position_bins(128)[[0, 1, 2, 3, 4, 7, 8, 15, 16, 127]].tolist() == [0, 1, 2, 2, 3, 3, 4, 4, 5, 18]
    assert position_bins(5).tolist() == [0, 1, 2, 3, 4]
    assert position_bins(1).tolist() == [0]


def test_profile_overlap_by_hand():
    # a fires at positions 0, 0, 1, 1, b at 1, 1, 1, 2: shares (1/2, 1/2, 0) and (0, 3/4, 1/4) have 1/2 in common
    a = [[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0]]
    b = [[0, 1, 0], [0, 1, 0], [0, 1, 0], [0, 0, 1]]
    codes_BLF = torch.tensor([a, b], dtype=torch.float32).permute(1, 2, 0)
    sums, _ = summed(codes_BLF, PAIR)
    assert profile_overlap(binned_firing(sums), PAIR) == pytest.approx([0.5])


def test_split_z_by_hand():
    # Four rows of two positions, a at 0 and b at 1 in each. In both folds n = 2 and the scores, the other fold's
    # difference of profiles, are (1, -1) with mean 0: each row gives 1/2 + 1/2 = 1, z = 2 / sqrt(2), twice.
    codes_BLF = torch.eye(2).expand(4, 2, 2)
    sums, _ = summed(codes_BLF, PAIR, window=1)
    assert split_z(binned_firing(sums), PAIR, *ordered(codes_BLF, window=1)) == pytest.approx([2**0.5])


# --- classes ----------------------------------------------------------------------------------------------------------


def planted():
    """Latents 0, 1: duplicates; 3 leads 2 by two tokens; 4, 5: one direction, first and second half; 6, 7: opposite."""
    codes_BLF = torch.cat([random_rows(seed) for seed in range(8)], -1)
    codes_BLF[..., 1] = codes_BLF[..., 0]
    codes_BLF[..., 2] = 0
    codes_BLF[:, 2:, 2] = 3 * codes_BLF[:, :-2, 3]
    codes_BLF[:, 8:, 4] = 0
    codes_BLF[:, :8, 5] = 0
    W_dec = torch.eye(8)
    W_dec[1] = torch.tensor([0.8, 0.6, 0, 0, 0, 0, 0, 0])
    W_dec[5] = 2 * W_dec[4]
    W_dec[7] = -W_dec[6]
    return codes_BLF, W_dec


def columns(result, *names):
    return list(zip(*(result.pairs[name].tolist() for name in names), strict=True))


def test_each_class_is_found():
    result = redundancy([batch_of(planted()[0])], planted()[1], limits=LIMITS)
    found = columns(result, "class", "latent_a", "latent_b", "lag")
    assert found == [
        ("duplicate", 0, 1, 0),
        ("position_split", 4, 5, 0),
        ("lead_lag", 3, 2, 2),
        ("antipodal", 6, 7, 0),
    ]
    duplicate, split, lead, antipodal = range(4)
    pairs = result.pairs
    assert pairs["c"][duplicate] == pytest.approx(1)
    assert pairs["cosine"].tolist() == pytest.approx([0.8, 1, 0, -1])
    # Latents on at rates p, q and never together correlate at -sqrt(p q / ((1 - p)(1 - q))), were their codes 0 and 1.
    assert -0.1 < pairs["c_lag0"][split] < 0
    assert pairs["overlap"][split] == 0
    # What 3 does at the last two positions of a row has no follower, and 2 rests at the first two: 1, but for the ends
    assert pairs["c"][lead] == pytest.approx(1, abs=0.1)
    assert (pairs["q"][:3] < 0.01).all()
    assert np.isnan(pairs["q"][antipodal])
    np.testing.assert_allclose(pairs["excess"], pairs["c"] - pairs["null"])


def test_groups_and_shares_by_hand():
    # Latents 0, 1, 2 duplicate each other and 3 does not: one group of 3 of the 4 alive ones (4 is dead)
    codes_BLF = torch.cat([random_rows(0).expand(-1, -1, 3), random_rows(1), torch.zeros(60, 16, 1)], -1)
    result = redundancy([batch_of(codes_BLF)], torch.eye(5)[[0, 0, 0, 1, 0]], limits=LIMITS)
    assert columns(result, "class", "latent_a", "latent_b", "group") == [
        ("duplicate", 0, 1, 0),
        ("duplicate", 0, 2, 0),
        ("duplicate", 1, 2, 0),
    ]
    count_F = (codes_BLF > 0).sum((0, 1))
    metrics = result.metrics
    assert (metrics["groups"], metrics["largest_group"], metrics["latents_in_groups"]) == (1, 3, 3)
    assert metrics["share_of_latents"] == 0.75
    assert metrics["share_of_firing"] == pytest.approx(float(count_F[:3].sum() / count_F.sum()))


def test_independent_latents_give_no_pairs():
    # Forty persistent latents that share one decoder direction: 780 pairs could be duplicates or splits, and with
    # directions apart 12,480 ordered pairs and lags could lead. Tokens as units would give dozens.
    codes_BLF = persistent_rows(0)
    same = redundancy([batch_of(codes_BLF)], torch.ones(40, 8), limits=Limits(8, 0.5, correlation=0.0, overlap=1.0))
    assert same.metrics["similar_decoders"] == 780
    assert sum(same.metrics["pairs"].values()) <= 2
    apart = redundancy([batch_of(codes_BLF)], torch.eye(40), limits=Limits(8, 0.5, correlation=0.02, lead=0.0))
    assert apart.metrics["tested_latents"] == 40
    assert sum(apart.metrics["pairs"].values()) <= 2


def test_z_is_not_inflated_by_dependence_inside_rows():
    pairs = np.array([(a, b) for a in range(40) for b in range(a + 1, 40)])
    candidates = Candidates.of(pairs[:, 0], pairs[:, 1])
    codes_BLF = persistent_rows(1)
    sums, pair_sums = summed(codes_BLF, candidates, window=4)
    # 5 % of independent pairs should pass 1.645; of 780 pairs, which share latents, 7 % is well within chance
    assert (Correlations.of(sums, pair_sums).z_CK[:, 4] > 1.645).mean() < 0.07
    z_C = split_z(binned_firing(sums), candidates, *ordered(codes_BLF, window=4))
    assert (z_C > 1.645).mean() < 0.07
    assert z_C.std() == pytest.approx(1, abs=0.15)


def test_batches_make_no_difference_and_rows_beyond_the_limit_are_not_read():
    codes_BLF, W_dec = planted()
    mask_BL, doc_BL = ragged(60, 16)
    parts = [slice(0, 23), slice(23, 60)]
    whole = redundancy([batch_of(codes_BLF, mask_BL, doc_BL)], W_dec, limits=LIMITS)
    split = redundancy([batch_of(codes_BLF[part], mask_BL[part], doc_BL[part]) for part in parts], W_dec, limits=LIMITS)
    assert split.metrics == whole.metrics
    for name in whole.arrays:
        np.testing.assert_array_equal(split.arrays[name], whole.arrays[name])

    def endless():
        while True:
            yield batch_of(codes_BLF)

    short = redundancy(endless(), W_dec, rows=90, limits=Limits(window=4, cosine=0.5))
    assert short.metrics["tokens"] == 90 * 16


def test_adjusted_p_values_by_hand():
    # of 10 tests: .01 * 10 / 1, .03 * 10 / 2 = .15, .04 * 10 / 3 = .1333, and q may not fall with p
    assert adjusted(np.array([0.01, 0.04, 1.0, 0.03]), 10) == pytest.approx([0.1, 0.4 / 3, 1, 0.4 / 3])
    assert adjusted(np.ones(2), 0).tolist() == [1, 1]


# --- what is shown and written ----------------------------------------------------------------------------------------


def decode(ids):
    return [f" t{number}" for number in ids]


def test_contexts_mark_the_tokens_that_fire():
    codes_BLF, W_dec = planted()
    codes_BLF[0, :, 2:4] = 0
    codes_BLF[0, 4, 3], codes_BLF[0, 6, 2] = 4.0, 4.0
    contexts = redundancy([batch_of(codes_BLF)], W_dec, decode=decode, limits=LIMITS).pairs["examples"]
    assert [len(texts) for texts in contexts] == [3, 3, 3, 3]
    assert contexts[2][0] == "4:  t0 t1 t2 t3[ t4]₁ t5[ t6]₂ t7 t8 t9"
    assert "]₁₂" in contexts[0][0]
    assert int(contexts[1][0].split(":")[0]) < 8 <= int(contexts[1][1].split(":")[0])


def test_the_heat_map_puts_pairs_beside_each_other():
    codes_BLF, W_dec = planted()
    arrays = redundancy([batch_of(codes_BLF)], W_dec, limits=LIMITS).arrays
    latents = arrays["latents"].tolist()
    assert sorted(latents) == [0, 1, 2, 3, 4, 5]
    assert abs(latents.index(0) - latents.index(1)) == 1
    assert abs(latents.index(2) - latents.index(3)) == 1
    lag = arrays["lags"].tolist().index(2)
    leads = arrays["c"][lag]
    assert leads[latents.index(3), latents.index(2)] > 0.9
    assert abs(leads[latents.index(2), latents.index(3)]) < 0.2
    np.testing.assert_allclose(np.diagonal(arrays["c"][4]), 1, rtol=1e-6)


def test_the_table_is_written_with_its_schema(tmp_path):
    codes_BLF, W_dec = planted()
    result = redundancy([batch_of(codes_BLF)], W_dec, decode=decode, limits=LIMITS)
    write_redundancy(tmp_path / "redundancy", "arm", result)
    table = pq.read_table(tmp_path / "redundancy" / "arm.parquet").to_pydict()
    assert table["class"] == ["duplicate", "position_split", "lead_lag", "antipodal"]
    assert table["group"] == [0, 1, None, None]
    assert table["q"][3] is None
    assert table["examples"][0] == result.pairs["examples"][0]
    with np.load(tmp_path / "redundancy" / "arm.npz") as arrays:
        assert arrays["excess"].shape == (9, 6, 6)
    lines = redundancy_lines({"arm": {"redundancy": result.metrics}, "other": {}})
    assert [line.split()[0] for line in lines] == ["arm", "arm"]
    assert lines[1].split()[1:6] == ["1", "1", "1", "1", "2"]
    assert redundancy_lines({"other": {}}) == []


def test_nothing_redundant_is_a_result(tmp_path):
    result = redundancy([batch_of(random_rows(0, F=3))], torch.eye(3), decode=decode, limits=LIMITS)
    assert result.metrics["pairs"] == dict.fromkeys(("duplicate", "position_split", "lead_lag", "antipodal"), 0)
    assert (result.metrics["groups"], result.metrics["share_of_latents"], result.metrics["examples"]) == (0, 0.0, [])
    write_redundancy(tmp_path, "arm", result)
    assert pq.read_table(tmp_path / "arm.parquet").num_rows == 0


def test_what_cannot_be_measured_is_an_error():
    with pytest.raises(LegatoError, match="no codes"):
        redundancy([], torch.eye(3))
    with pytest.raises(LegatoError, match="no latent fires"):
        redundancy([batch_of(torch.zeros(2, 4, 3))], torch.eye(3))
    with pytest.raises(UsageError, match="decoder of all 3 latents"):
        redundancy([batch_of(random_rows(0, F=3))], torch.eye(4))


def test_an_sae_encodes_the_batches():
    class Fixed:
        def encode_sparse(self, batch):
            return SparseCodes.from_dense(batch.acts_BLD)

    acts_BLD = random_rows(0, F=3)
    place_BL = torch.arange(60 * 16).view(60, 16)
    (batch,) = coded(Fixed(), [ActivationBatch(acts_BLD, place_BL >= 0, place_BL, place_BL)])
    assert torch.equal(batch.codes.dense(), acts_BLD)
    assert torch.equal(batch.tokens_BL, place_BL)
