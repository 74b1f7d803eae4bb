import dataclasses
import json

import pytest
import torch

from legato.common.errors import LegatoError, UsageError
from legato.data.activations import ActivationBatch, Normaliser
from legato.sae.architectures import Gated, Hysteresis, JumpReLU, ReLU
from legato.sae.autoencoder import SparseAutoencoder


def hysteresis_sae(**changes) -> SparseAutoencoder:
    """Two latents that read a dimension each: on from 2, held down to 1."""
    parts = {
        "W_enc": torch.eye(2),
        "b_enc": torch.zeros(2),
        "W_dec": torch.eye(2),
        "b_dec": torch.zeros(2),
        "architecture": Hysteresis(release=0.5, threshold=torch.full((2,), 2.0)),
        "details": {"model": "demo"},
    }
    return SparseAutoencoder(**parts | changes)


def batch_of(first, second, mask=None) -> ActivationBatch:
    acts_BLD = torch.tensor([first, second]).T[None]
    mask_BL = torch.ones(1, len(first), dtype=torch.bool) if mask is None else torch.tensor([mask])
    return ActivationBatch(acts_BLD, mask_BL, torch.zeros(1, len(first)), torch.zeros(1, len(first), dtype=torch.long))


def test_stateless_approximation_by_hand():
    # With state, latent 0 is on at 3.0, 1.5, 1.2 and latent 1 at 2.5: four pairs over five tokens. The four largest
    # values are 3.0, 2.5, 1.9, 1.8, so a plain threshold shares two pairs of six; it lies at the fifth, 1.5.
    batch = batch_of([3.0, 1.5, 1.2, 0.5, 1.9], [0.0, 0.0, 2.5, 0.0, 1.8])
    batch.acts_BLD[0, 4] = torch.tensor([1.9, 1.8])
    batch.acts_BLD[0, 3] = torch.tensor([0.5, 0.9])  # below release: latent 1 is reset
    sae = hysteresis_sae()
    on_LF = sae.encode(batch.acts_BLD, batch.mask_BL, batch.doc_BL)[0] > 0
    assert on_LF.T.tolist() == [[True, True, True, False, False], [False, False, True, False, False]]
    plain = sae.stateless(batch)
    assert plain.architecture == JumpReLU()
    assert plain.architecture.threshold.tolist() == [1.5, 1.5]
    difference = plain.details["stateless"]
    assert difference["l0"] == pytest.approx(4 / 5)
    assert difference["same_pairs"] == pytest.approx(2 / 6)
    x_ND = batch.acts_BLD[0]
    power = (x_ND - x_ND.mean(0)).square().sum().item()
    assert difference["fvu_with_state"] == pytest.approx((0.5**2 + 0.9**2 + 1.9**2 + 1.8**2) / power)
    assert difference["fvu"] == pytest.approx((1.5**2 + 1.2**2 + 0.5**2 + 0.9**2) / power)


def test_stateless_counts_valid_tokens_only_and_is_saved_with_its_difference(tmp_path):
    batch = batch_of([9.0, 3.0, 1.5, 0.1], [9.0, 0.2, 0.3, 0.4], mask=[False, True, True, True])
    path = hysteresis_sae().stateless(batch).save(tmp_path / "sae")
    plain = SparseAutoencoder.load(path)
    assert plain.architecture == JumpReLU()
    assert plain.architecture.threshold.tolist() == pytest.approx(
        [0.4, 0.4]
    )  # 3.0 and 1.5 are on, the next value is 0.4
    stored = json.loads((path / "legato.json").read_text())
    assert stored["model"] == "demo"
    assert stored["stateless"]["same_pairs"] == 1
    assert stored["stateless"]["tokens"] == 3


def test_what_has_no_stateless_approximation_says_so():
    batch = batch_of([3.0, 1.5], [0.0, 0.0])
    with pytest.raises(UsageError, match="keeps no state"):
        hysteresis_sae(architecture=ReLU()).stateless(batch)
    with pytest.raises(LegatoError, match="no latent fires"):
        hysteresis_sae().stateless(batch_of([1.0, 1.0], [1.0, 1.0]))


def test_hysteresis_is_saved_and_opened_as_itself(tmp_path):
    sae = hysteresis_sae(b_dec=torch.tensor([5.0, -1.0]))
    opened = SparseAutoencoder.load(sae.save(tmp_path / "sae"))
    assert (opened.architecture, opened.details) == (Hysteresis(release=0.5), {"model": "demo"})
    acts_BLD = 3 * torch.randn(2, 50, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(opened.encode(acts_BLD), sae.encode(acts_BLD))


def test_a_sequence_longer_than_int16_holds_too():
    acts_LD = torch.full((40_000, 2), 1.5)
    acts_LD[0] = 2.5
    assert hysteresis_sae().encode(acts_LD).min() == 1.5


def gated_sae(seed: int = 0) -> SparseAutoencoder:
    generator = torch.Generator().manual_seed(seed)
    W_dec = torch.nn.functional.normalize(torch.randn(24, 6, generator=generator), dim=-1)
    b_dec = 3 * torch.randn(6, generator=generator)
    return SparseAutoencoder(
        W_dec.T.contiguous(),
        0.3 * torch.randn(24, generator=generator) - W_dec @ b_dec,
        W_dec,
        b_dec,
        Gated(b_gate=-1 - W_dec @ b_dec, r_mag=0.3 * torch.randn(24, generator=generator)),
    )


def test_gated_codes_by_hand():
    # Gates: 3 - 2 > 0 and 1 - 2 < 0. Codes: 2 * 3 - 1 = 5, and nothing; with b_enc -7 an open gate passes nothing.
    sae = SparseAutoencoder(
        torch.eye(2),
        torch.tensor([-1.0, 5.0]),
        torch.eye(2),
        torch.zeros(2),
        Gated(b_gate=torch.full((2,), -2.0), r_mag=torch.full((2,), 2.0).log()),
    )
    assert sae.encode(torch.tensor([[3.0, 1.0]]))[0].tolist() == pytest.approx([5.0, 0.0])
    shut = dataclasses.replace(sae, b_enc=torch.full((2,), -7.0))
    assert shut.encode(torch.tensor([[3.0, 1.0]]))[0].tolist() == [0.0, 0.0]


def test_sparse_codes_of_a_gated_sae_are_the_dense_ones(tmp_path):
    sae = gated_sae()
    acts_BLD = sae.b_dec + 2 * torch.randn(3, 20, 6, generator=torch.Generator().manual_seed(1))
    mask_BL = torch.ones(3, 20, dtype=torch.bool)
    mask_BL[:, 0] = False
    batch = ActivationBatch(acts_BLD, mask_BL, torch.zeros(3, 20), torch.zeros(3, 20, dtype=torch.long))
    codes_BLF = sae.encode(acts_BLD, mask_BL)
    assert 0.02 < (codes_BLF > 0).float().mean() < 0.5
    torch.testing.assert_close(sae.encode_sparse(batch).dense(), codes_BLF, atol=1e-4, rtol=1e-4)
    opened = SparseAutoencoder.load(sae.save(tmp_path / "sae"))
    assert opened.architecture.name == "gated"
    assert torch.equal(opened.encode(acts_BLD, mask_BL), codes_BLF)
    wide = dataclasses.replace(sae.architecture, b_gate=sae.architecture.b_gate + 1.5)
    open_gates = dataclasses.replace(sae, architecture=wide)  # no threshold is positive: all codes are computed
    torch.testing.assert_close(open_gates.encode_sparse(batch).dense(), open_gates.encode(acts_BLD, mask_BL))


def test_a_gated_sae_for_raw_activations_sees_what_it_was_trained_on():
    sae = gated_sae()
    acts_LD = torch.randn(50, 6, generator=torch.Generator().manual_seed(2)) + sae.b_dec
    normaliser = Normaliser(mean_D=torch.linspace(-500, 900, 6), scale=0.02)
    raw_LD = acts_LD / normaliser.scale + normaliser.mean_D
    on_raw = sae.on_raw(normaliser)
    torch.testing.assert_close(on_raw.encode(raw_LD) * normaliser.scale, sae.encode(acts_LD), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close((on_raw(raw_LD) - normaliser.mean_D) * normaliser.scale, sae(acts_LD), atol=1e-3, rtol=0)
