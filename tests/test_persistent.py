"""The leak along the sequence: codes by hand, dense as sparse, trained and saved."""

import dataclasses

import numpy as np
import pytest
import torch

from legato.common.hardware import fast_matmul_dtype
from legato.data.activations import ActivationBatch, Normaliser
from legato.sae.architectures import Persistent
from legato.sae.architectures.persistent import leaked
from legato.sae.autoencoder import SparseAutoencoder
from legato.sae.kernels import pairs as kernels
from legato.sae.kernels.leak import leak_forward
from legato.sae.segments import Segments
from legato.training.bank import train_bank
from legato.training.config import SAEConfig, TrainConfig
from legato.training.step import TrainBatch

B, L, D, F = 6, 24, 16, 32


def test_a_stretch_by_hand():
    # leak 1/2, tail 1/10, one latent. 4 enters at position 1: 2, 1, .5, .25; below .2 it would end, but 1 enters:
    # .5 * .25 + .5 = .625, and goes on with .3125. The peak is still 2, so .15625 is cut. A new document starts at 8.
    inputs_L = torch.tensor([0, 4, 0, 0, 0, 1, 0, 0, 8, 0], dtype=torch.float64)
    doc_L = torch.tensor([0] * 8 + [1] * 2)
    expected = [0, 2, 1, 0.5, 0.25, 0.625, 0.3125, 0, 4, 2]
    leak = torch.tensor([0.5], dtype=torch.float64)
    assert leaked(inputs_L[:, None], leak, 0.1, doc=doc_L)[:, 0].tolist() == expected
    mask_L = torch.ones(10, dtype=torch.bool)
    mask_L[2] = False  # a masked token ends the state
    masked = [0, 2, 0, 0, 0, 0.5, 0.25, 0.125, 4, 2]
    assert leaked(inputs_L[:, None], leak, 0.1, mask_L, doc_L)[:, 0].tolist() == masked


def random_inputs(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    inputs_BLF = torch.rand(B, L, F, generator=generator, dtype=torch.float64)
    inputs_BLF = inputs_BLF * (torch.rand(B, L, F, generator=generator) < 0.1)
    mask_BL = torch.rand(B, L, generator=generator) > 0.1
    doc_BL = (torch.arange(L) // 10).expand(B, L)
    leak_F = 0.95 * torch.rand(F, generator=generator, dtype=torch.float64)
    return inputs_BLF * mask_BL[..., None], mask_BL, doc_BL, leak_F


def test_carried_pairs_are_the_dense_codes():
    inputs_BLF, mask_BL, doc_BL, leak_F = random_inputs()
    token_P, latent_P = inputs_BLF.view(-1, F).nonzero(as_tuple=True)
    values = inputs_BLF.view(-1, F)[token_P, latent_P].numpy()
    arrays = (token_P.numpy().astype(np.int32), latent_P.numpy().astype(np.int32), values)
    pairs = kernels.keep(B * L, *arrays, np.ones(len(values), np.bool_))
    carried = leak_forward(kernels.by_latent(pairs, F), leak_F.numpy(), 0.05, Segments.of(mask_BL, doc_BL))
    found = carried.pairs(B * L)
    codes_NF = torch.zeros(B * L, F, dtype=torch.float64)
    codes_NF[found.token_P, found.latent_P] = torch.from_numpy(found.value_P)
    expected_BLF = leaked(inputs_BLF, leak_F, 0.05, mask_BL, doc_BL)
    torch.testing.assert_close(codes_NF.view(B, L, F), expected_BLF)
    assert len(found.value_P) == int((expected_BLF > 0).sum()) > 1.5 * len(values)
    in_order = found.token_P.astype(np.int64) * F + found.latent_P
    assert (np.diff(in_order) > 0).all()


def moving_batches(n: int) -> list[ActivationBatch]:
    """20 directions whose strength decays from token to token by .7, after a start at every tenth token or so."""
    generator = torch.Generator().manual_seed(5)
    directions = torch.nn.functional.normalize(torch.randn(20, D, generator=generator), dim=-1)
    batches = []
    for _ in range(n):
        starts = (torch.rand(B, L, 20, generator=generator) < 0.05) * (0.5 + torch.rand(B, L, 20, generator=generator))
        strength_BLK = leaked(starts, torch.full((20,), 0.7), 0.05)
        acts_BLD = 50 * strength_BLK @ directions + 10
        doc_BL = torch.arange(B)[:, None].expand(B, L)
        mask_BL, tokens_BL = torch.ones(B, L, dtype=torch.bool), torch.zeros(B, L, dtype=torch.long)
        batches.append(ActivationBatch(acts_BLD, mask_BL, doc_BL, tokens_BL))
    return batches


class InMemory:
    d_in, n_rows = D, 100 * B

    def batches(self, *_args, **_options):
        return iter(moving_batches(100))


def test_trained_finished_saved_and_opened(tmp_path):
    normaliser = Normaliser.fit(InMemory())
    config = TrainConfig(steps=100, lr=1e-2)
    log: list[dict] = []
    arm = SAEConfig("persistent", Persistent(2), F)
    [trainer] = train_bank([arm], moving_batches(100), normaliser, config, log=log.append).finished
    assert log[-1]["fvu"] < 0.5 * log[0]["fvu"]
    assert sum(record["l0"] for record in log[-5:]) / 5 == pytest.approx(2, rel=0.1)
    leak_F = torch.sigmoid(trainer.parameters.own["leak_logit_F"])
    assert float((leak_F - 0.3).abs().max()) > 0.05  # it learns
    batches = moving_batches(4)
    sae = trainer.finish(normaliser, [TrainBatch.of(batch, normaliser, fast_matmul_dtype()) for batch in batches])
    assert sae.architecture.name == "persistent"
    opened = SparseAutoencoder.load(sae.save(tmp_path / "sae"))
    [batch] = batches[:1]
    batch.mask_BL[:, 5] = False
    codes_BLF = sae.encode(batch.acts_BLD, batch.mask_BL, batch.doc_BL)
    assert torch.equal(opened.encode(batch.acts_BLD, batch.mask_BL, batch.doc_BL), codes_BLF)
    torch.testing.assert_close(opened.encode_sparse(batch).dense(), codes_BLF, rtol=1e-3, atol=1e-2)
    assert float((codes_BLF > 0).sum() / batch.mask_BL.sum()) == pytest.approx(2, rel=0.2)
    error = (sae.decode(codes_BLF) - batch.acts_BLD)[batch.mask_BL].square().sum()
    power = (batch.acts_BLD[batch.mask_BL] - batch.acts_BLD[batch.mask_BL].mean(0)).square().sum()
    assert error / power < 1.5 * log[-1]["fvu"] + 0.05
    plain = sae.stateless(batch)
    assert plain.architecture.name == "jumprelu"
    assert plain.details["stateless"]["l0"] == pytest.approx(float((codes_BLF > 0).sum() / batch.mask_BL.sum()))


def test_unusable_options_are_refused():
    for change in ({"tail": 0.0}, {"start": 1.0}):
        with pytest.raises(ValueError, match="between 0 and 1"):
            dataclasses.replace(Persistent(2), **change)
