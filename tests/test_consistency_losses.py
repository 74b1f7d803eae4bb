import tracemalloc
from dataclasses import replace

import numba
import numpy as np
import pytest
import torch

from legato import metrics
from legato.sae.codes import SparseCodes
from legato.sae.kernels import pairs as kernels
from legato.sae.segments import Segments
from legato.training.losses import (
    Contrastive,
    FusedLasso,
    PositionPenalty,
    Slowness,
    TsaeContrastive,
    WindowGroupLasso,
    WindowVariance,
    collapse,
    group_diagnostics,
)

SCALE_FREE = [
    *(WindowVariance(window=w, coefficient=1.0) for w in (2, 3, 8, 16)),
    WindowVariance(window=4, coefficient=1.0, slow_fraction=0.5),
    *(Slowness(window=w, coefficient=1.0) for w in (2, 5, 40)),
    Slowness(window=3, coefficient=1.0, slow_fraction=0.5),
    FusedLasso(coefficient=1.0),
    FusedLasso(coefficient=1.0, slow_fraction=0.5),
    PositionPenalty(coefficient=1.0),
    PositionPenalty(coefficient=1.0, slow_fraction=0.5),
    Contrastive(coefficient=1.0, anchors=12),
    Contrastive(coefficient=1.0, lags=(3,), anchors=7, slow_fraction=0.5),
    Contrastive(coefficient=1.0, lags=(1, 2, 8), anchors=200),
]
TERMS = [
    *SCALE_FREE,
    *(WindowGroupLasso(window=w, coefficient=1.0) for w in (1, 2, 7, 40)),
    WindowGroupLasso(window=3, coefficient=1.0, slow_fraction=0.5),
    TsaeContrastive(anchors=30, slow_fraction=0.5),
    TsaeContrastive(anchors=9, slow_fraction=1.0, temperature=0.3),
]


def example(seed: int = 0, B: int = 4, L: int = 24, F: int = 10) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    on = torch.rand(B, L, F, generator=generator) < 0.4
    codes_BLF = on * (0.1 + torch.rand(B, L, F, generator=generator, dtype=torch.float64))
    mask_BL = torch.rand(B, L, generator=generator) < 0.97
    doc_BL = (torch.arange(L) // 20).expand(B, L) + 10 * torch.arange(B)[:, None]
    return codes_BLF * mask_BL[..., None], mask_BL, doc_BL


def one_row(*codes: float, masked: tuple[int, ...] = ()) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One latent on one row of one document."""
    codes_BLF = torch.tensor(codes, dtype=torch.float64).view(1, -1, 1)
    mask_BL = torch.tensor([[t not in masked for t in range(len(codes))]])
    return codes_BLF, mask_BL, torch.zeros(1, len(codes), dtype=torch.int32)


def sparse_inputs(codes_BLF: torch.Tensor) -> kernels.PairsByLatent:
    B, L, F = codes_BLF.shape
    codes = SparseCodes.from_dense(codes_BLF)
    token_P = codes.token_P.numpy().astype(np.int32)
    ptr_N = np.searchsorted(token_P, np.arange(B * L + 1))
    return kernels.by_latent(kernels.Pairs(ptr_N, token_P, codes.latent_P.numpy(), codes.value_P.numpy()), F)


def sparse(term, codes_BLF, mask_BL, doc_BL, step=0):
    return term.sparse(sparse_inputs(codes_BLF), Segments.of(mask_BL, doc_BL), step=step)


def dense_gradient(term, codes_BLF, mask_BL, doc_BL, step=0) -> tuple[float, np.ndarray]:
    """(value, derivative by each active code in the sparse order) of the dense definition."""
    leaf = codes_BLF.clone().requires_grad_()
    value = term.loss(leaf, mask_BL, doc_BL, step=step)
    (gradient_BLF,) = torch.autograd.grad(value, leaf)
    order = sparse_inputs(codes_BLF)
    latent_Q = np.repeat(np.arange(codes_BLF.shape[-1]), np.diff(order.ptr_F))
    return float(value.detach()), gradient_BLF.reshape(-1, codes_BLF.shape[-1])[order.token_Q, latent_Q].numpy()


@pytest.mark.parametrize("term", TERMS, ids=str)
def test_sparse_value_and_gradient_equal_the_dense_definition(term):
    codes = example()
    value, dense_Q = dense_gradient(term, *codes, step=5)
    result = sparse(term, *codes, step=5)
    assert result.value == pytest.approx(value, rel=1e-12)
    assert np.abs(dense_Q).max() > 0
    np.testing.assert_allclose(result.gradient_Q, dense_Q, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("term", TERMS, ids=str)
def test_gradient_matches_finite_differences(term):
    codes_BLF, mask_BL, doc_BL = example(B=2, L=22, F=3)
    # Every code positive: the cosine of an empty row and the norm of an empty window have no derivative.
    leaf = (codes_BLF + 0.2 * mask_BL[..., None] * (1 + torch.rand_like(codes_BLF))).requires_grad_()
    assert torch.autograd.gradcheck(lambda codes: term.loss(codes, mask_BL, doc_BL, step=2), (leaf,), atol=1e-6)


@pytest.mark.parametrize("term", SCALE_FREE, ids=str)
def test_scale_changes_neither_the_value_nor_what_shrinking_would_gain(term):
    codes_BLF, mask_BL, doc_BL = example()
    value = term.loss(codes_BLF, mask_BL, doc_BL)
    torch.testing.assert_close(term.loss(37.0 * codes_BLF, mask_BL, doc_BL), value)
    # Euler: the derivative of a scale-free function along its argument is 0, so the optimiser cannot gain by shrinking.
    gradient_Q = sparse(term, codes_BLF, mask_BL, doc_BL).gradient_Q
    assert float(gradient_Q @ sparse_inputs(codes_BLF).value_Q) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    "term",
    [Slowness(window=4, coefficient=1.0), PositionPenalty(coefficient=1.0), Contrastive(coefficient=1.0)],
    ids=str,
)
def test_codes_in_float32_give_the_same_gradient_to_their_precision(term):
    codes_BLF, mask_BL, doc_BL = example()
    exact = sparse(term, codes_BLF, mask_BL, doc_BL)
    low = sparse(term, codes_BLF.float(), mask_BL, doc_BL)
    assert low.gradient_Q.dtype == np.float32
    np.testing.assert_allclose(low.gradient_Q, exact.gradient_Q, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("term", TERMS, ids=str)
def test_only_the_leading_latents_count(term):
    codes_BLF, mask_BL, doc_BL = example()
    leading = replace(term, slow_fraction=0.3)
    alone = replace(term, slow_fraction=1.0).loss(codes_BLF[..., :3], mask_BL, doc_BL)
    torch.testing.assert_close(leading.loss(codes_BLF, mask_BL, doc_BL), alone)
    order = sparse_inputs(codes_BLF)
    gradient_Q = leading.sparse(order, Segments.of(mask_BL, doc_BL), step=0).gradient_Q
    assert not gradient_Q[order.ptr_F[3] :].any()


@pytest.mark.parametrize("term", TERMS, ids=str)
def test_nothing_to_compare_is_zero_without_a_gradient(term):
    codes_BLF, mask_BL, doc_BL = example()
    silent, hidden = torch.zeros_like(codes_BLF), torch.zeros_like(mask_BL)
    for codes in ((silent, mask_BL, doc_BL), (silent, hidden, doc_BL)):
        result = sparse(term, *codes)
        assert result.value == pytest.approx(float(term.loss(*codes)), abs=1e-12)
        assert result.gradient_Q.shape == (0,)
        guessing = codes[1].any() and isinstance(term, Contrastive | TsaeContrastive)
        assert (result.value > 0) == guessing  # silent tokens cannot be told apart: the entropy of a guess
    # Every document one token long: nothing to compare along the sequence, but positions and norms remain.
    alone = torch.arange(mask_BL.numel()).view(mask_BL.shape)
    value, gradient_Q = dense_gradient(term, codes_BLF, mask_BL, alone)
    result = sparse(term, codes_BLF, mask_BL, alone)
    assert result.value == pytest.approx(value, rel=1e-12)
    np.testing.assert_allclose(result.gradient_Q, gradient_Q, rtol=1e-9, atol=1e-12)
    if not isinstance(term, PositionPenalty | WindowGroupLasso):
        assert result.value == 0
        assert not gradient_Q.any()


@pytest.mark.parametrize("term", TERMS, ids=str)
def test_the_number_of_threads_changes_nothing(term):
    codes = example()
    both = sparse(term, *codes)
    threads = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        single = sparse(term, *codes)
    finally:
        numba.set_num_threads(threads)
    assert single.value == both.value
    np.testing.assert_array_equal(single.gradient_Q, both.gradient_Q)


def test_window_variance_by_hand():
    # One latent, tokens 0..3, codes 2 2 0 0, W = 2. Windows (2,2) (2,0) (0,0): means of squares 4, 2, 0, sum 6;
    # variances 0, 1, 0, sum 1. So 1/6.
    codes_BLF, mask_BL, doc_BL = one_row(2, 2, 0, 0)
    term = WindowVariance(window=2, coefficient=1.0)
    assert float(term.loss(codes_BLF, mask_BL, doc_BL)) == pytest.approx(1 / 6)
    # A document boundary between tokens 1 and 2 leaves the windows (2,2) and (0,0): variance 0.
    doc_BL = torch.tensor([[0, 0, 1, 1]])
    assert float(term.loss(codes_BLF, mask_BL, doc_BL)) == pytest.approx(0.0)
    # Masking token 1 leaves the window (0,0) alone: no power, value 0 by definition.
    mask_BL = torch.tensor([[True, False, True, True]])
    assert float(term.loss(codes_BLF, mask_BL, doc_BL * 0)) == 0.0
    # A window longer than the row is nowhere whole.
    long = WindowVariance(window=5, coefficient=1.0)
    assert float(long.loss(*one_row(2, 2, 0, 0))) == sparse(long, *one_row(2, 2, 0, 0)).value == 0.0


def test_slowness_by_hand():
    # Codes 3 3 0 0, W = 2: squared differences 0, 9, 0, mean 3; Var = 9/2 - 9/4 = 9/4; 3 / (2 * 9/4) = 2/3.
    assert float(Slowness(window=2, coefficient=1.0).loss(*one_row(3, 3, 0, 0))) == pytest.approx(2 / 3)
    # W = 3 adds lag 2, differences 9, 9: five pairs, sum 27; 27/5 / (9/2) = 6/5.
    assert float(Slowness(window=3, coefficient=1.0).loss(*one_row(3, 3, 0, 0))) == pytest.approx(6 / 5)
    # Token 1 masked leaves the pair (0, 0), with Var = 9/3 - 1 = 2: 0. A constant code does not vary: 0, no gradient.
    assert float(Slowness(window=2, coefficient=1.0).loss(*one_row(3, 0, 0, 0, masked=(1,)))) == 0.0
    constant = sparse(Slowness(window=2, coefficient=1.0), *one_row(0.1, 0.1, 0.1))
    assert constant.value == 0.0
    assert not constant.gradient_Q.any()


def test_slowness_of_codes_without_order_is_about_one():
    generator = torch.Generator().manual_seed(0)
    codes_BLF = (torch.rand(64, 64, 3, generator=generator) < 0.3).double()
    mask_BL, doc_BL = torch.ones(64, 64, dtype=torch.bool), torch.arange(64)[:, None].expand(64, 64)
    assert sparse(Slowness(window=8, coefficient=1.0), codes_BLF, mask_BL, doc_BL).value == pytest.approx(1, abs=0.03)


def test_fused_lasso_by_hand():
    # Codes 2 3 0 1: |1| + |-3| + |1| = 5 over a sum of 6. With token 1 masked: |0 - 1| = 1 over 2 + 1 = 3.
    assert float(FusedLasso(coefficient=1.0).loss(*one_row(2, 3, 0, 1))) == pytest.approx(5 / 6)
    assert float(FusedLasso(coefficient=1.0).loss(*one_row(2, 0, 0, 1, masked=(1,)))) == pytest.approx(1 / 3)


def test_window_group_lasso_by_hand():
    # Codes 3 4 0, W = 2. Windows cut off at the ends: (3) (3,4) (4,0) (0): norms 3 + 5 + 4 + 0 = 12, over 6: 2.
    assert float(WindowGroupLasso(window=2, coefficient=1.0).loss(*one_row(3, 4, 0))) == pytest.approx(2)
    # A boundary before the 4: (3) (3) (4) (4,0) (0): 3 + 3 + 4 + 4 = 14, / 6.
    codes_BLF, mask_BL, _ = one_row(3, 4, 0)
    boundary = torch.tensor([[0, 1, 1]])
    term = WindowGroupLasso(window=2, coefficient=1.0)
    assert float(term.loss(codes_BLF, mask_BL, boundary)) == pytest.approx(14 / 6)
    # W = 1 is the L1 penalty: (3 + 4) / 3.
    assert float(WindowGroupLasso(window=1, coefficient=1.0).loss(codes_BLF, mask_BL, boundary)) == pytest.approx(7 / 3)


@pytest.mark.parametrize("window", [1, 3, 9])
def test_window_group_lasso_grows_with_the_codes(window):
    codes_BLF, mask_BL, doc_BL = example()
    term = WindowGroupLasso(window=window, coefficient=1.0)
    torch.testing.assert_close(term.loss(5 * codes_BLF, mask_BL, doc_BL), 5 * term.loss(codes_BLF, mask_BL, doc_BL))


def test_window_group_lasso_keeps_a_small_code_after_a_huge_one():
    # When 1e6 leaves the window, 1e12 + 2e-8 - 1e12 has lost the small codes; the newest one bounds the sum from below.
    codes = one_row(1e6, 0, 1e-4, 0, 0)
    term = WindowGroupLasso(window=3, coefficient=1.0)
    value, gradient_Q = dense_gradient(term, *codes)
    result = sparse(term, *codes)
    assert result.value == pytest.approx(value, rel=1e-12)
    np.testing.assert_allclose(result.gradient_Q, gradient_Q, rtol=1e-6)


def test_position_penalty_by_hand():
    # Two rows, two positions: codes 3 1 and 2 0, mean 1.5. SST = 9 + 1 + 4 + 0 - 4 * 2.25 = 5; position means 2.5
    # and .5: SSB = 2 * 1 + 2 * 1 = 4; MSW = (5 - 4) / (4 - 2) = .5. (4 - 1 * .5) / 5 = .7.
    codes_BLF = torch.tensor([[3.0, 1.0], [2.0, 0.0]], dtype=torch.float64).unsqueeze(-1)
    mask_BL, doc_BL = torch.ones(2, 2, dtype=torch.bool), torch.arange(2)[:, None].expand(2, 2)
    assert float(PositionPenalty(coefficient=1.0).loss(codes_BLF, mask_BL, doc_BL)) == pytest.approx(0.7)
    # One row: every position has one token, nothing can be said.
    alone = one_row(3, 1)
    assert float(PositionPenalty(coefficient=1.0).loss(*alone)) == sparse(PositionPenalty(1.0), *alone).value == 0.0


def test_position_penalty_is_the_metric_eta2_on_the_batch():
    codes_BLF, mask_BL, doc_BL = example(B=9)
    expected = float(metrics.eta2(codes_BLF, mask_BL).mean())
    assert float(PositionPenalty(coefficient=1.0).loss(codes_BLF, mask_BL, doc_BL)) == pytest.approx(expected, rel=1e-6)


def test_contrastive_by_hand():
    # Two documents, one pair each (lag 1), codes one-hot: equal inside a document, orthogonal between. Logits are
    # 1/tau on the diagonal, 0 off it: loss = log(1 + exp(-1/tau)) in both directions.
    codes_BLF = torch.zeros(2, 2, 2)
    codes_BLF[0, :, 0] = 3.0
    codes_BLF[1, :, 1] = 5.0
    mask_BL, doc_BL = torch.ones(2, 2, dtype=torch.bool), torch.tensor([[0, 0], [1, 1]])
    term = Contrastive(coefficient=1.0, temperature=0.5, anchors=8)
    assert float(term.loss(codes_BLF, mask_BL, doc_BL)) == pytest.approx(np.log1p(np.exp(-2.0)))
    # In one document there are no negatives at all: the loss is 0.
    assert float(term.loss(codes_BLF, mask_BL, doc_BL * 0)) == pytest.approx(0.0)


def test_contrastive_with_a_silent_token_is_finite():
    codes_BLF = torch.zeros(2, 2, 2, dtype=torch.float64)
    codes_BLF[0, 0, 0] = 1.0  # its partner and the other document are silent: every cosine is 0
    mask_BL, doc_BL = torch.ones(2, 2, dtype=torch.bool), torch.tensor([[0, 0], [1, 1]])
    result = sparse(Contrastive(coefficient=1.0), codes_BLF, mask_BL, doc_BL)
    assert result.value == pytest.approx(np.log(2))
    assert result.gradient_Q.tolist() == [0.0]


def test_contrastive_pairs_tokens_at_every_lag():
    # Each document holds latent 0 or 1 on its tokens 0 and 2, and 2 or 3 on token 1: at lag 1 the codes of a pair are
    # orthogonal to each other and to the other document's, at lag 2 equal. With both lags all 2 * (2 + 1) pairs are
    # drawn. Logits over the pairs a of the two documents, tau 1: those at lag 1 see 0 everywhere, so log(1 + 3) against
    # the other document's three; the lag-2 pair log(1 + 3 / e).
    codes_BLF = torch.zeros(2, 3, 4)
    codes_BLF[0, [0, 2], 0] = codes_BLF[0, 1, 2] = codes_BLF[1, [0, 2], 1] = codes_BLF[1, 1, 3] = 2.0
    mask_BL, doc_BL = torch.ones(2, 3, dtype=torch.bool), torch.tensor([[0] * 3, [1] * 3])
    term = Contrastive(coefficient=1.0, temperature=1.0, lags=(1, 2))
    expected = (2 * np.log(4) + np.log1p(3 / np.e)) / 3
    assert float(term.loss(codes_BLF, mask_BL, doc_BL)) == pytest.approx(expected)
    assert term.window == 3


@pytest.mark.parametrize("lags", [(), (0,), (1, -2)])
def test_lags_that_compare_nothing_are_refused(lags):
    with pytest.raises(ValueError, match="each 1 or more"):
        Contrastive(1.0, lags=lags)


@pytest.mark.parametrize("make", [lambda: WindowVariance(1, 1.0), lambda: Slowness(1, 1.0)])
def test_a_window_of_one_is_refused(make):
    with pytest.raises(ValueError, match="use 2 or more"):
        make()


@pytest.mark.parametrize("fraction", [0.0, 1.5])
def test_a_fraction_that_is_none_is_refused(fraction):
    with pytest.raises(ValueError, match="more than 0 and at most 1"):
        FusedLasso(1.0, slow_fraction=fraction)


def test_layout_runs_stop_at_rows_documents_and_gaps():
    mask_BL = torch.tensor([[True, True, False, True], [True, True, True, True]])
    doc_BL = torch.tensor([[0, 0, 0, 0], [0, 1, 1, 1]])
    layout = Segments.of(mask_BL, doc_BL)
    assert layout.start_N.tolist() == [0, 0, -1, 3, 4, 5, 5, 5]
    assert layout.end_N.tolist() == [2, 2, -1, 4, 5, 8, 8, 8]


def test_group_diagnostics_by_hand():
    # Four latents, the first two are the group; ten tokens. Latent 0 fires twice (3 and 1), latent 1 once (4), latent 2
    # on every token (1 each), latent 3 never. Group: 3 of 10 tokens active, mass 8 of 18, power 9 + 1 + 16 = 26 of 36;
    # latent 0 fires on 20 % of the tokens, latent 1 on 10 %, which is not above the 10 % of a dense latent.
    codes_BLF = torch.zeros(1, 10, 4)
    codes_BLF[0, 0, 0], codes_BLF[0, 5, 0], codes_BLF[0, 5, 1] = 3.0, 1.0, 4.0
    codes_BLF[0, :, 2] = 1.0
    dead_F = np.array([False, True, False, True])
    assert group_diagnostics(sparse_inputs(codes_BLF), 10, 0.5, dead_F) == {
        "group_latents": 2.0,
        "group_l0": pytest.approx(0.3),
        "group_mass_share": pytest.approx(8 / 18),
        "group_dead": 1.0,
        "group_dense": 1.0,
        "group_norm": pytest.approx(2.6**0.5),
        "code_norm": pytest.approx(3.6**0.5),
    }
    assert group_diagnostics(sparse_inputs(0 * codes_BLF), 10, 0.5, dead_F)["group_mass_share"] == 0.0


def test_collapse_names_what_fell():
    start = {"group_latents": 100.0, "group_l0": 10.0, "group_mass_share": 0.4, "group_dead": 0.0}
    assert collapse(start, start) is None
    assert collapse(start, {**start, "group_l0": 2.0, "group_mass_share": 0.21, "group_dead": 50.0}) is None
    assert collapse(start, {**start, "group_l0": 1.9}) == "the penalised group collapsed: L0 fell from 10 to 1.9"
    assert "mass share fell from 0.4 to 0.2" in str(collapse(start, {**start, "group_mass_share": 0.2}))
    assert "51 of 100 latents are dead" in str(collapse(start, {**start, "group_dead": 51.0}))
    nothing = {**start, "group_l0": 0.0, "group_mass_share": 0.0}
    assert collapse(nothing, nothing) is None


@pytest.mark.parametrize("make", [WindowVariance, Slowness, WindowGroupLasso])
def test_a_window_costs_no_memory(make):
    """Running sums: with windows of 64 a term allocates what it does with windows of 2 (unfolded copies would be 32
    times as large)."""
    codes_BLF, mask_BL, doc_BL = example(B=8, L=128, F=64)
    order, layout = sparse_inputs(codes_BLF), Segments.of(mask_BL, doc_BL)
    peaks = []
    for window in (2, 64):
        term = make(window, 1.0)
        term.sparse(order, layout, 0)  # compiled outside of what is measured
        tracemalloc.start()
        term.sparse(order, layout, 0)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.05 * peaks[0]
