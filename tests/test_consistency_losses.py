import numpy as np
import pytest
import torch

from legato import kernels
from legato.codes import SparseCodes
from legato.consistency_losses import Contrastive, WindowVariance
from legato.sequences import SequenceLayout

TERMS = [
    *(WindowVariance(window=w, coefficient=1.0) for w in (2, 3, 8, 16)),
    Contrastive(coefficient=1.0, lag=1, anchors=12),
    Contrastive(coefficient=1.0, lag=3, anchors=7, slow_fraction=0.5),
]


def example(seed: int = 0, B: int = 4, L: int = 24, F: int = 10) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    on = torch.rand(B, L, F, generator=generator) < 0.4
    codes_BLF = on * (0.1 + torch.rand(B, L, F, generator=generator, dtype=torch.float64))
    mask_BL = torch.rand(B, L, generator=generator) < 0.97
    doc_BL = (torch.arange(L) // 20).expand(B, L) + 10 * torch.arange(B)[:, None]
    return codes_BLF * mask_BL[..., None], mask_BL, doc_BL


def sparse_inputs(codes_BLF: torch.Tensor) -> kernels.LatentOrder:
    B, L, F = codes_BLF.shape
    codes = SparseCodes.from_dense(codes_BLF)
    token_P = codes.token_P.numpy().astype(np.int32)
    ptr_N = np.searchsorted(token_P, np.arange(B * L + 1))
    return kernels.by_latent(kernels.Pairs(ptr_N, token_P, codes.latent_P.numpy(), codes.value_P.numpy()), F)


@pytest.mark.parametrize("term", TERMS, ids=str)
def test_sparse_value_and_gradient_equal_the_dense_definition(term):
    codes_BLF, mask_BL, doc_BL = example()
    leaf = codes_BLF.clone().requires_grad_()
    value = term.loss(leaf, mask_BL, doc_BL, step=5)
    (gradient_BLF,) = torch.autograd.grad(value, leaf)
    order = sparse_inputs(codes_BLF)
    sparse = term.sparse(order, SequenceLayout.of(mask_BL, doc_BL), step=5)
    latent_Q = np.repeat(np.arange(codes_BLF.shape[-1]), np.diff(order.ptr_F))
    dense_Q = gradient_BLF.reshape(-1, codes_BLF.shape[-1])[order.token_Q, latent_Q].numpy()
    assert sparse.value == pytest.approx(float(value.detach()), rel=1e-12)
    assert np.abs(dense_Q).max() > 0
    np.testing.assert_allclose(sparse.gradient_Q, dense_Q, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("term", TERMS, ids=str)
def test_gradient_matches_finite_differences(term):
    codes_BLF, mask_BL, doc_BL = example(B=3, L=18, F=4)
    # Every code positive: the cosine of an empty row has no derivative.
    leaf = (codes_BLF + 0.2 * mask_BL[..., None]).requires_grad_()
    assert torch.autograd.gradcheck(lambda codes: term.loss(codes, mask_BL, doc_BL, step=2), (leaf,), atol=1e-6)


@pytest.mark.parametrize("term", TERMS, ids=str)
def test_scale_does_not_change_the_value(term):
    codes_BLF, mask_BL, doc_BL = example()
    value = term.loss(codes_BLF, mask_BL, doc_BL)
    torch.testing.assert_close(term.loss(37.0 * codes_BLF, mask_BL, doc_BL), value)


def test_window_variance_by_hand():
    # One latent, tokens 0..3, codes 2 2 0 0, W = 2. Windows (2,2) (2,0) (0,0): means of squares 4, 2, 0, sum 6;
    # variances 0, 1, 0, sum 1. So 1/6.
    codes_BLF = torch.tensor([2.0, 2.0, 0.0, 0.0]).view(1, 4, 1)
    mask_BL, doc_BL = torch.ones(1, 4, dtype=torch.bool), torch.zeros(1, 4, dtype=torch.int32)
    term = WindowVariance(window=2, coefficient=1.0)
    assert float(term.loss(codes_BLF, mask_BL, doc_BL)) == pytest.approx(1 / 6)
    # A document boundary between tokens 1 and 2 leaves the windows (2,2) and (0,0): variance 0.
    doc_BL = torch.tensor([[0, 0, 1, 1]])
    assert float(term.loss(codes_BLF, mask_BL, doc_BL)) == pytest.approx(0.0)
    # Masking token 1 leaves the window (0,0) alone: no power, value 0 by definition.
    mask_BL = torch.tensor([[True, False, True, True]])
    assert float(term.loss(codes_BLF, mask_BL, doc_BL * 0)) == 0.0


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


def test_a_window_of_one_is_refused():
    with pytest.raises(ValueError, match="use 2 or more"):
        WindowVariance(window=1, coefficient=1.0)


def test_layout_runs_stop_at_rows_documents_and_gaps():
    mask_BL = torch.tensor([[True, True, False, True], [True, True, True, True]])
    doc_BL = torch.tensor([[0, 0, 0, 0], [0, 1, 1, 1]])
    layout = SequenceLayout.of(mask_BL, doc_BL)
    assert layout.start_N.tolist() == [0, 0, -1, 3, 4, 5, 5, 5]
    assert layout.end_N.tolist() == [2, 2, -1, 4, 5, 8, 8, 8]
