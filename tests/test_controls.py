from dataclasses import replace

import pytest
import torch

from legato.common.errors import UsageError
from legato.data.activations import ActivationBatch, position_shuffled
from legato.evaluation.controls import (
    CONTROLS,
    ChunkMean,
    MovingAverage,
    Smoothed,
    post_hoc_control,
    smoothed,
    with_hysteresis,
)
from legato.evaluation.one_pass import evaluate
from legato.sae.architectures import Hysteresis, HysteresisTopK, JumpReLU, TopK
from legato.sae.autoencoder import SparseAutoencoder
from legato.sae.codes import SparseCodes


def test_documents_keep_their_activations_and_lose_their_order():
    L = 40
    acts_BLD = torch.arange(2 * L, dtype=torch.float32).view(2, L, 1)
    mask_BL = torch.ones(2, L, dtype=torch.bool)
    mask_BL[:, [0, 7]] = False
    doc_BL = (torch.arange(L) // 25).expand(2, L)
    batch = ActivationBatch(acts_BLD, mask_BL, doc_BL, torch.zeros(2, L, dtype=torch.int64))
    [shuffled] = position_shuffled([batch], seed=3)
    assert torch.equal(shuffled.acts_BLD[~mask_BL], acts_BLD[~mask_BL])
    assert not torch.equal(shuffled.acts_BLD, acts_BLD)
    for row in range(2):
        for document in (0, 1):
            places = (doc_BL[row] == document) & mask_BL[row]
            assert torch.equal(shuffled.acts_BLD[row, places].sort(0).values, acts_BLD[row, places])
    [again] = position_shuffled([batch], seed=3)
    assert torch.equal(again.acts_BLD, shuffled.acts_BLD)


def one_row(*codes):
    """codes_BLF [1, L, F] from a column per latent, and a batch without gaps."""
    codes_BLF = torch.tensor(codes, dtype=torch.float32).T[None]
    length = codes_BLF.shape[1]
    return codes_BLF, torch.ones(1, length, dtype=torch.bool), torch.zeros(1, length, dtype=torch.int64)


def after(smoother, codes_BLF, mask_BL, doc_BL):
    return smoothed(SparseCodes.from_dense(codes_BLF), mask_BL, doc_BL, smoother).dense()[0].T.tolist()


def test_a_moving_average_by_hand():
    # alpha 1/2. Latent 0: 4 on the first token stays 4, then halves: 2, 1. The firing's weight after n tokens is 1/2^n
    # of what it was; 1/2^3 < 0.2, so from the third silent token on it is dropped.
    # Latent 1 fires 8 on the second token: 8/2 = 4, then 2, then 6 more: (2 + 6) / 2 = 4, then 2.
    codes = one_row([4, 0, 0, 0, 0], [0, 8, 0, 6, 0])
    assert after(MovingAverage(0.5, cutoff=0.2), *codes) == [[4, 2, 1, 0, 0], [0, 4, 2, 4, 2]]
    # With a cut-off of a half it lasts one token: 1/2 is not below 1/2, 1/4 is.
    assert after(MovingAverage(0.5, cutoff=0.5), *codes)[0] == [4, 2, 0, 0, 0]
    assert [round(v, 6) for v in after(MovingAverage(0.5, cutoff=0.01), *one_row([1, *[0] * 8]))[0]] == [
        1, 0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0, 0
    ]  # fmt: skip


def test_a_moving_average_starts_anew_in_every_document_and_after_a_masked_token():
    codes_BLF, mask_BL, doc_BL = one_row([4, 0, 0, 2, 0])
    doc_BL[0, 1:] = 1
    assert after(MovingAverage(0.5), codes_BLF, mask_BL, doc_BL) == [[4, 0, 0, 1, 0.5]]
    doc_BL[:] = 0
    mask_BL[0, 2] = False
    assert after(MovingAverage(0.5), codes_BLF, mask_BL, doc_BL) == [[4, 2, 0, 2, 1]]


def test_a_chunk_mean_by_hand():
    # chunks of 2 in a document of 3 tokens (the last chunk has one) and one of 2: (4+0)/2, 1, (0+6)/2
    codes_BLF, mask_BL, doc_BL = one_row([4, 0, 1, 0, 6])
    doc_BL[0, 3:] = 1
    assert after(ChunkMean(2), codes_BLF, mask_BL, doc_BL) == [[2, 2, 1, 3, 3]]
    mask_BL[0, 1] = False  # what lies on a masked token is no code; each side of it is a run of its own
    codes_BLF[0, 1] = 0
    assert after(ChunkMean(2), codes_BLF, mask_BL, doc_BL) == [[4, 0, 1, 3, 3]]


def test_settings_that_smooth_nothing_are_refused():
    with pytest.raises(UsageError, match="averages nothing"):
        ChunkMean(1)
    with pytest.raises(UsageError, match="between 0 and 1"):
        MovingAverage(1.0)


D, F, K = 12, 40, 3


def sticky_batches(n=2, rows=3, length=32):
    """Activations that drift from token to token, with a masked first position and two documents a row."""
    generator = torch.Generator().manual_seed(5)
    for _ in range(n):
        acts_BLD = torch.randn(rows, length, D, generator=generator)
        for t in range(1, length):
            acts_BLD[:, t] = 0.8 * acts_BLD[:, t - 1] + 0.6 * acts_BLD[:, t]
        mask_BL = torch.ones(rows, length, dtype=torch.bool)
        mask_BL[:, 0] = False
        doc_BL = (torch.arange(length) // 20).expand(rows, length)
        yield ActivationBatch(acts_BLD, mask_BL, doc_BL, torch.full((rows, length), 9))


@pytest.fixture
def sae():
    W_dec = torch.nn.functional.normalize(torch.randn(F, D, generator=torch.Generator().manual_seed(1)), dim=-1)
    return SparseAutoencoder(
        W_dec.T.contiguous(), torch.zeros(F), W_dec, 0.1 * torch.ones(D), JumpReLU(threshold=torch.full((F,), 1.2))
    )


def test_post_hoc_hysteresis_keeps_the_budget_and_holds(sae):
    batches = list(sticky_batches())
    held = with_hysteresis(sae, batches, k=K, release=0.5)
    assert held.architecture == Hysteresis(release=0.5)
    assert torch.equal(held.W_dec, sae.W_dec)
    tokens = sum(int(batch.mask_BL.sum()) for batch in batches)
    assert sum(len(held.encode_sparse(batch)) for batch in batches) / tokens == pytest.approx(K, rel=0.02)
    plain = with_hysteresis(sae, batches, k=K, release=1.0)  # releases where it sets: a plain threshold
    kappa = {
        name: result["consistency"]["kappa1_excess_within"]
        for name, result in evaluate({"held": held, "plain": plain}, batches).items()
    }
    assert kappa["held"] > kappa["plain"]


def test_controls_have_their_settings_and_cost_what_they_buy(sae):
    batches = list(sticky_batches())
    controls = {kind: post_hoc_control(kind, sae, batches, k=K, release=0.5) for kind in CONTROLS}
    assert controls["ema"].training == {"post_hoc": {"control": "ema", "alpha": 0.5, "cutoff": 0.01}}
    topk = replace(sae, architecture=TopK(K))
    assert post_hoc_control("ema", topk, batches, k=K, release=0.5) is None  # thresholds are what it is made of
    held = post_hoc_control("hysteresis", topk, batches, k=K, release=0.5)
    assert held.judged == replace(topk, architecture=HysteresisTopK(K, release=0.5))

    bank = {"baseline": sae, **{f"baseline_{kind}": control.judged for kind, control in controls.items()}}
    results = evaluate(bank, batches)
    # The free lunch: the average buys autocorrelation with a code several times as dense.
    ema, plain = results["baseline_ema"], results["baseline"]
    assert ema["consistency"]["ac1"] > plain["consistency"]["ac1"]
    assert ema["core"]["l0"] > 2 * plain["core"]["l0"]


def test_smoothed_codes_are_decoded_as_they_are(sae):
    [batch] = sticky_batches(1)
    control = Smoothed(sae, ChunkMean(4))
    codes = control.encode_sparse(batch)
    assert torch.equal(control.decode_sparse(codes), sae.decode_sparse(codes))
    assert codes.token_P.tolist() == sorted(codes.token_P.tolist())
    mean = sae.encode_sparse(batch).dense()[0, 1:5].mean(0)  # the first chunk starts behind the masked position
    assert torch.allclose(codes.dense()[0, 1:5], mean.expand(4, F))
