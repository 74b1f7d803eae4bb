"""Position metrics: hand-worked numbers, degenerate cases, and the matrix against plain correlations."""

import math

import numpy as np
import pytest
import torch

from legato import metrics
from legato.evaluation.position.attachment import position_matrix, position_metrics
from legato.evaluation.sums.accumulators import CodeSums
from legato.evaluation.sums.code_buffer import CodeBuffer, CodedBatch
from legato.evaluation.sums.lag_pairs import LagPairs, pairs_by_latent
from legato.sae.codes import SparseCodes


def one_latent(*rows):
    codes_BLF = torch.tensor(rows, dtype=torch.float32)[..., None]
    return codes_BLF, torch.ones(codes_BLF.shape[:2], dtype=torch.bool)


def sums_of(codes_BLF, mask_BL):
    layout = LagPairs.of(mask_BL, None, (1,))
    sums = CodeSums.zero(codes_BLF.shape[2], codes_BLF.shape[1], (1,))
    sums.add(layout, pairs_by_latent(SparseCodes.from_dense(codes_BLF), layout))
    return sums


def test_eta2_by_hand():
    # rows 1 3 and 2 4: means by position 3/2 and 7/2, SSB = 4, SST = 5, MSW = 1 / (4 - 2): (4 - 1/2) / 5 = 0.7
    codes_BLF, mask_BL = one_latent([1, 3], [2, 4])
    assert metrics.eta2(codes_BLF, mask_BL).item() == pytest.approx(0.7)
    assert metrics.eta2(8 * codes_BLF, mask_BL).item() == pytest.approx(0.7)


def test_eta2_of_codes_that_do_not_depend_on_position_is_zero_on_average():
    codes_BLF = torch.rand(30, 20, 200, generator=torch.Generator().manual_seed(0))
    eta2_F = metrics.eta2(codes_BLF, torch.ones(30, 20, dtype=torch.bool))
    # without the correction it would be (T - 1) / (N - 1) = 0.032; the standard error over 200 latents is about 0.0008
    assert eta2_F.mean().item() == pytest.approx(0, abs=0.003)


def test_eta2_is_undefined_without_variance_or_with_one_token_a_position():
    assert math.isnan(metrics.eta2(*one_latent([2, 2], [2, 2])).item())
    assert math.isnan(metrics.eta2(*one_latent([1, 3])).item())


def test_rescaling_a_latent_changes_no_position_metric():
    codes_BLF = torch.relu(torch.randn(20, 6, 3, generator=torch.Generator().manual_seed(0)))
    mask_BL = torch.rand(20, 6, generator=torch.Generator().manual_seed(1)) < 0.9
    codes_BLF = codes_BLF * mask_BL[..., None]
    scaled_BLF = codes_BLF * torch.tensor([0.25, 8.0, 64.0])  # powers of two: no rounding
    assert position_metrics(sums_of(codes_BLF, mask_BL)) == position_metrics(sums_of(scaled_BLF, mask_BL))
    before, after = (metrics.position_matrix(codes, mask_BL) for codes in (codes_BLF, scaled_BLF))
    assert torch.equal(before, after)


def test_mutual_information_by_hand():
    # on at position 0 always, at 1 never: ln 2, and Miller-Madow adds (2 - 1 + 2 - 1 - (2 - 1)) / (2 * 4) = 1/8
    assert metrics.mutual_information(*one_latent([5, 0], [1, 0])).item() == pytest.approx(math.log(2) + 1 / 8)
    # on once in each position of 2 x 2: independent, plug-in 0, all 4 cells seen: (1 + 1 - 3) / 8 = -1/8
    assert metrics.mutual_information(*one_latent([1, 0], [0, 1])).item() == pytest.approx(-1 / 8)


def test_mutual_information_of_a_constant_latent_is_zero():
    assert metrics.mutual_information(*one_latent([1, 1], [1, 1])).item() == pytest.approx(0)
    assert metrics.mutual_information(*one_latent([0, 0], [0, 0])).item() == pytest.approx(0)


def test_the_profile_has_wilson_intervals():
    # 8 of 10 rows on: Wilson's 95 % interval is (0.4902, 0.9433)
    codes_BLF, mask_BL = one_latent(*[[1.0, 0.0]] * 8, *[[0.0, 0.0]] * 2)
    rate_FL, low_FL, high_FL = metrics.position_profile(codes_BLF, mask_BL)
    assert rate_FL[0].tolist() == pytest.approx([0.8, 0.0])
    assert low_FL[0, 0].item() == pytest.approx(0.4902, abs=1e-4)
    assert high_FL[0, 0].item() == pytest.approx(0.9433, abs=1e-4)
    assert low_FL[0, 1].item() == pytest.approx(0)


def test_positions_without_a_valid_token_are_none():
    codes_BLF, mask_BL = one_latent([9, 1, 0], [9, 1, 1])
    mask_BL[:, 0] = False
    result = position_metrics(sums_of(codes_BLF * mask_BL[..., None], mask_BL))
    assert result["l0_by_position"] == [None, 1.0, 0.5]
    # two tokens at position 2 with L0 0 and 1: standard deviation 1/2, half width 1.96 * 0.5 / sqrt(2)
    assert result["l0_by_position_high"][2] == pytest.approx(0.5 + 1.959964 * 0.5 / math.sqrt(2))
    assert result["first_positions"] == [
        {"position": 0, "tokens": 0, "l0": None},
        {"position": 1, "tokens": 2, "l0": 1.0},
    ]
    assert result["l0_elsewhere"] == 0.5


def test_the_matrix_by_hand():
    # positions over three rows: 1 2 3 and 2 4 6 correlate 1; 1 2 3 and 3 2 1 correlate -1; the second latent is
    # constant at position 0 and does not count there; at (1, 2) both latents count: (-1 + 1) / 2
    first = torch.tensor([[1.0, 2, 3], [2, 4, 2], [3, 6, 1]])
    second = torch.tensor([[1.0, 1, 2], [1, 2, 4], [1, 3, 6]])
    matrix = metrics.position_matrix(torch.stack([first, second], -1), torch.ones(3, 3, dtype=torch.bool))
    assert matrix.tolist() == pytest.approx(np.array([[1, 1, -1], [1, 1, 0], [-1, 0, 1]]))


def test_the_matrix_equals_plain_correlations_over_rows_of_one_document():
    generator = torch.Generator().manual_seed(0)
    codes_BLF = torch.relu(torch.randn(40, 7, 6, generator=generator).cumsum(1))
    mask_BL = torch.rand(40, 7, generator=generator) < 0.8
    doc_BL = (torch.arange(7) >= torch.randint(2, 7, (40, 1), generator=generator)).int()
    matrix = metrics.position_matrix(codes_BLF, mask_BL, doc_BL).numpy()
    f_BLF, mask, doc = codes_BLF.double().numpy(), mask_BL.numpy(), doc_BL.numpy()
    for t in range(7):
        for u in range(7):
            rows = mask[:, t] & mask[:, u] & (doc[:, t] == doc[:, u])
            values = [
                np.corrcoef(f_BLF[rows, t, i], f_BLF[rows, u, i])[0, 1]
                for i in range(6)
                if rows.sum() > 1 and f_BLF[rows, t, i].std() > 0 and f_BLF[rows, u, i].std() > 0
            ]
            if values:
                assert matrix[t, u] == pytest.approx(np.mean(values), abs=1e-9)
            else:
                assert np.isnan(matrix[t, u])


def test_the_matrix_of_positions_never_seen_together_is_undefined():
    codes_BLF, mask_BL = one_latent([1, 2], [2, 1])
    matrix = metrics.position_matrix(codes_BLF, mask_BL, torch.tensor([[0, 1], [2, 3]]))
    assert matrix[0, 0] == pytest.approx(1)
    assert torch.isnan(matrix[0, 1])


def test_kept_codes_are_the_first_rows_across_batches():
    generator = torch.Generator().manual_seed(0)
    codes_BLF = torch.relu(torch.randn(10, 5, 4, generator=generator))
    mask_BL = torch.rand(10, 5, generator=generator) < 0.8
    doc_BL = torch.arange(10)[:, None].expand(10, 5)
    kept = CodeBuffer(max_rows=7)
    for rows in (slice(0, 4), slice(4, 8), slice(8, 10)):
        codes = SparseCodes.from_dense(codes_BLF[rows])
        kept.add(CodedBatch(codes, mask_BL[rows], doc_BL[rows], doc_BL[rows]))
    layout = kept.layout()
    assert layout.shape == (7, 5)
    expected = metrics.position_matrix(codes_BLF[:7], mask_BL[:7], doc_BL[:7]).numpy()
    np.testing.assert_array_equal(position_matrix(layout, kept.order(layout)), expected)
