"""Streaming sums: against plain loops, split over batches and ranks, on any number of threads."""

import numba
import numpy as np
import pytest
import torch

from legato.common.errors import UsageError
from legato.evaluation.sums.accumulators import CodeSums, PairCounts, PairSums
from legato.evaluation.sums.lag_pairs import LagPairs, check_lags, pairs_by_latent
from legato.sae.codes import SparseCodes

LAGS = (1, 2, 5)


def random_batch(seed=0, B=6, L=12, F=5, rate=0.3):
    """Codes with runs of repeated firing, masked positions inside documents, two or three documents a row."""
    generator = torch.Generator().manual_seed(seed)
    on_BLF = torch.rand(B, L, F, generator=generator) < rate
    on_BLF[:, 1:] |= on_BLF[:, :-1] & (torch.rand(B, L - 1, F, generator=generator) < 0.5)
    mask_BL = torch.rand(B, L, generator=generator) < 0.85
    cut_B = torch.randint(2, L, (B, 1), generator=generator)
    doc_BL = (torch.arange(L) >= cut_B).int() + 2 * torch.arange(B)[:, None].int()
    codes_BLF = on_BLF * (0.2 + torch.rand(B, L, F, generator=generator)) * mask_BL[..., None]
    return codes_BLF, mask_BL, doc_BL


def accumulate(codes_BLF, mask_BL, doc_BL, step_BL=None, sums=None):
    layout = LagPairs.of(mask_BL, doc_BL, LAGS)
    sums = sums or CodeSums.zero(codes_BLF.shape[2], codes_BLF.shape[1], LAGS)
    sums.add(layout, pairs_by_latent(SparseCodes.from_dense(codes_BLF), layout), step_BL)
    return sums


def flat(sums, prefix=""):
    """All numbers of an accumulator by name."""
    numbers = {}
    for name, value in vars(sums).items():
        numbers |= flat(value, f"{prefix}{name}.") if hasattr(value, "__dict__") else {prefix + name: np.asarray(value)}
    return numbers


def plain_pair_sums(f_BL, mask_BL, doc_BL, stretches):
    """The fields of PairSums for one latent by definition."""
    B, L = f_BL.shape
    product, ends, shuffled_product, shuffled_ends = (np.zeros(len(LAGS)) for _ in range(4))
    for k, lag in enumerate(LAGS):
        for b in range(B):
            for t in range(L - lag):
                if mask_BL[b, t] and mask_BL[b, t + lag] and doc_BL[b, t] == doc_BL[b, t + lag]:
                    product[k] += f_BL[b, t] * f_BL[b, t + lag]
                    ends[k] += f_BL[b, t] + f_BL[b, t + lag]
        for b, positions in stretches:
            n = len(positions)
            pairs = sum(t + lag in positions for t in positions)
            if pairs:
                total, square = f_BL[b, positions].sum(), (f_BL[b, positions] ** 2).sum()
                shuffled_product[k] += pairs * (total**2 - square) / (n * (n - 1))
                shuffled_ends[k] += 2 * pairs * total / n
    return {
        "total_F": f_BL.sum(),
        "square_F": (f_BL**2).sum(),
        "at_FL": f_BL.sum(0),
        "product_FK": product,
        "ends_FK": ends,
        "shuffled_product_FK": shuffled_product,
        "shuffled_ends_FK": shuffled_ends,
    }


def plain_stretches(mask_BL, doc_BL):
    """(row, valid positions) of each document's part in a row."""
    return [
        (b, [t for t in range(mask_BL.shape[1]) if mask_BL[b, t] and doc_BL[b, t] == d])
        for b in range(len(mask_BL))
        for d in np.unique(doc_BL[b][mask_BL[b]])
    ]


@pytest.mark.parametrize("seed", range(5))
def test_sums_equal_plain_loops(seed):
    codes_BLF, mask_BL, doc_BL = random_batch(seed)
    step_BL = torch.rand(mask_BL.shape, generator=torch.Generator().manual_seed(seed)) + 0.1
    sums = accumulate(codes_BLF, mask_BL, doc_BL, step_BL)
    f_BLF, mask, doc = codes_BLF.double().numpy(), mask_BL.numpy(), doc_BL.numpy()
    stretches = plain_stretches(mask, doc)
    rows_with_text = mask.any(1).sum()
    assert sums.n_stretches == len(stretches)
    assert sums.n_rows == sums.n_rows_with_steps == rows_with_text
    assert sums.counts.tokens_L.tolist() == mask.sum(0).tolist()
    fires_BF = (f_BLF > 0).any(1)
    for i in range(f_BLF.shape[2]):
        f_BL = f_BLF[..., i]
        for name, signal in (("value", f_BL), ("firing", (f_BL > 0).astype(float))):
            for field, expected in plain_pair_sums(signal, mask, doc, stretches).items():
                np.testing.assert_allclose(getattr(getattr(sums, name), field)[i], expected, rtol=1e-12, atol=1e-12)
        runs, steepest, between = 0, 0.0, 0.0
        for b, positions in stretches:
            on = [f_BL[b, t] > 0 for t in positions]
            runs += sum(
                is_on and not (n and on[n - 1] and positions[n - 1] == t - 1)
                for n, (t, is_on) in enumerate(zip(positions, on, strict=True))
            )
            between += f_BL[b, positions].sum() ** 2 / len(positions)
        for b in np.flatnonzero(fires_BF[:, i]):
            slopes = [
                abs(f_BL[b, t] - f_BL[b, t - 1]) / float(step_BL[b, t])
                for t in range(1, mask.shape[1])
                if mask[b, t] and mask[b, t - 1] and doc[b, t] == doc[b, t - 1]
            ]
            steepest += max([*slopes, 0.0]) / fires_BF[b].sum()
        assert sums.runs_F[i] == runs
        assert sums.rows_F[i] == fires_BF[:, i].sum()
        assert sums.between_F[i] == pytest.approx(between, rel=1e-12)
        assert sums.steepest_F[i] == pytest.approx(steepest, rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_a_dense_signal_gives_the_same_sums_as_codes(seed):
    codes_BLF, mask_BL, doc_BL = random_batch(seed)
    layout = LagPairs.of(mask_BL, doc_BL, LAGS)
    dense = PairSums.zero(codes_BLF.shape[2], codes_BLF.shape[1], len(LAGS))
    junk_BLF = torch.where(mask_BL[..., None], codes_BLF, torch.full_like(codes_BLF, 1e9))
    dense.add_dense(junk_BLF, layout)
    for name, expected in flat(accumulate(codes_BLF, mask_BL, doc_BL).value).items():
        np.testing.assert_allclose(getattr(dense, name), expected, rtol=1e-12, atol=1e-12)


def test_the_layout_of_a_row_with_two_documents_and_a_hole():
    # positions 0..5: document 0 at 0, 1, (2 masked), 3; document 1 at 4, 5
    mask_BL = torch.tensor([[True, True, False, True, True, True]])
    doc_BL = torch.tensor([[0, 0, 0, 0, 1, 1]])
    layout = LagPairs.of(mask_BL, doc_BL, (1, 2))
    assert layout.stretch_N.tolist() == [0, 0, -1, 0, 1, 1]
    assert layout.size_S.tolist() == [3, 2]
    assert layout.pairs_SK.tolist() == [[1, 1], [1, 0]]  # (0,1), (1,3) and (4,5); (3,4) and (3,5) cross documents
    assert layout.left_N.tolist() == [0b01, 0b10, 0, 0, 0b01, 0]
    assert layout.right_N.tolist() == [0, 0b01, 0, 0b10, 0, 0b01]
    assert layout.n_tokens == 5


def test_pairs_at_positions_that_are_not_valid_are_dropped():
    codes_BLF = torch.ones(1, 3, 1)
    layout = LagPairs.of(torch.tensor([[True, False, True]]), None, (1,))
    order = pairs_by_latent(SparseCodes.from_dense(codes_BLF), layout)
    assert order.token_Q.tolist() == [0, 2]


def test_two_parts_add_up_to_the_whole():
    batches = [random_batch(seed) for seed in range(4)]
    steps = [torch.rand(b[1].shape) for b in batches]
    whole, *ranks = (None, None, None)
    for n, (batch, step_BL) in enumerate(zip(batches, steps, strict=True)):
        whole = accumulate(*batch, step_BL, sums=whole)
        ranks[n % 2] = accumulate(*batch, step_BL, sums=ranks[n % 2])
    merged, other = ranks
    reduced = {name: value.copy() for name, value in flat(merged).items()}
    merged.merge(other)
    for name, expected in flat(whole).items():
        np.testing.assert_allclose(flat(merged)[name], expected, rtol=1e-12, err_msg=name)
        assert name == "counts.lags" or (reduced[name] + flat(other)[name] == flat(merged)[name]).all()


def test_sums_of_different_lags_do_not_merge():
    with pytest.raises(AssertionError, match="lags"):
        PairCounts.zero(4, (1, 2)).merge(PairCounts.zero(4, (1, 3)))


def test_the_result_does_not_depend_on_the_number_of_threads():
    batch = random_batch(B=16, F=40)
    many = flat(accumulate(*batch))
    before = numba.get_num_threads()
    numba.set_num_threads(1)
    one = flat(accumulate(*batch))
    numba.set_num_threads(before)
    assert all((one[name] == many[name]).all() for name in many)


@pytest.mark.parametrize("lags", [(), (0,), (2, 1), (1, 1), tuple(range(1, 66))])
def test_lags_that_make_no_sense_are_refused(lags):
    with pytest.raises(UsageError, match="lags"):
        check_lags(lags)


def test_sixty_four_lags_fit():
    codes_BLF, mask_BL, doc_BL = random_batch(L=70)
    lags = tuple(range(1, 65))
    layout = LagPairs.of(mask_BL, doc_BL, lags)
    sums = CodeSums.zero(codes_BLF.shape[2], 70, lags)
    sums.add(layout, pairs_by_latent(SparseCodes.from_dense(codes_BLF), layout))
    few = LagPairs.of(mask_BL, doc_BL, (1, 64))
    few_sums = CodeSums.zero(codes_BLF.shape[2], 70, (1, 64))
    few_sums.add(few, pairs_by_latent(SparseCodes.from_dense(codes_BLF), few))
    np.testing.assert_array_equal(sums.value.product_FK[:, [0, 63]], few_sums.value.product_FK)


def test_other_shapes_are_refused():
    codes_BLF, mask_BL, doc_BL = random_batch()
    layout = LagPairs.of(mask_BL, doc_BL, LAGS)
    with pytest.raises(ValueError, match=r"\[B, L\]"):
        LagPairs.of(mask_BL, doc_BL[:, 1:], LAGS)
    with pytest.raises(ValueError, match="rows x positions"):
        pairs_by_latent(SparseCodes.from_dense(codes_BLF[:, 1:]), layout)
    order = pairs_by_latent(SparseCodes.from_dense(codes_BLF), layout)
    with pytest.raises(ValueError, match="number of latents"):
        CodeSums.zero(codes_BLF.shape[2] + 1, codes_BLF.shape[1], LAGS).add(layout, order)


def test_memory_is_bounded_by_latents_and_lags_not_tokens():
    # F = 65,536 latents, 7 lags, 128 positions: 2 x (2 + 128 + 4 x 7) + 4 float64 each
    sums = CodeSums.zero(65_536, 128)
    n_bytes = sum(value.nbytes for value in flat(sums).values())
    assert n_bytes == pytest.approx(65_536 * (2 * (2 + 128 + 28) + 4) * 8, rel=1e-3)
    assert n_bytes < 0.2 * 2**30
