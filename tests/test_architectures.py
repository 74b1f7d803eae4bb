"""What holds for every architecture: the dense form, the sparse one and the hand-written pass are one thing."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
import torch.fx.experimental._config
from dense_parts import Flicker, SoftThreshold
from test_export import OWN, random_sae
from test_kernels import CONFIG, F, make_batch, make_parameters

from legato.common.errors import UsageError
from legato.data.activations import ActivationBatch
from legato.sae.architectures import (
    BatchTopK,
    Gated,
    Hysteresis,
    HysteresisTopK,
    JumpReLU,
    ReLU,
    TopK,
    architecture_named,
)
from legato.sae.architectures.base import Architecture
from legato.sae.autoencoder import SparseAutoencoder
from legato.sae.kernels import pairs as kernels
from legato.training.config import SAEConfig
from legato.training.losses import (
    Contrastive,
    FusedLasso,
    PositionPenalty,
    Slowness,
    TemporalLoss,
    TsaeContrastive,
    WindowGroupLasso,
    WindowVariance,
)
from legato.training.step import Workspace, forward_backward

NAMES = sorted(OWN)


def step_of(architecture, terms=()):
    batch, _, _ = make_batch()
    parameters = make_parameters()
    dead_F = torch.arange(F) % 9 == 0
    return forward_backward(
        parameters,
        parameters.W_enc_FD,
        batch,
        SAEConfig("arm", architecture, F, terms, groups=((0.25, 0.3), (1.0, 0.7))),
        [(term, term.coefficient) for term in terms],
        workspace=Workspace(),
        step=3,
        dead_F=dead_F,
        config=CONFIG,
    )


@pytest.mark.parametrize(
    "architecture",
    [TopK(4), BatchTopK(4), ReLU(0.3), HysteresisTopK(4, release=0.4)],
    ids=lambda architecture: architecture.name,
)
def test_the_hand_written_pass_is_the_one_by_autograd(architecture, monkeypatch):
    term = WindowVariance(window=3, coefficient=0.5)
    by_hand = step_of(architecture, (term,))
    monkeypatch.setattr(type(architecture), "forward", Architecture.forward)
    monkeypatch.setattr(type(term), "sparse", TemporalLoss.sparse)
    by_autograd = step_of(architecture, (term,))
    assert by_autograd.order.token_Q.tolist() == by_hand.order.token_Q.tolist()
    assert by_autograd.loss_terms == pytest.approx(by_hand.loss_terms, rel=1e-12)
    assert by_autograd.grad_norm == pytest.approx(by_hand.grad_norm, rel=1e-9)
    for (name, one), (_, other) in zip(by_autograd.gradients.items(), by_hand.gradients.items(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    "term",
    [
        Contrastive(0.3, anchors=20, lags=(1, 3)),
        FusedLasso(0.3),
        PositionPenalty(0.5, slow_fraction=0.5),
        Slowness(5, 0.3),
        TsaeContrastive(0.3),
        WindowGroupLasso(4, 0.2),
        WindowVariance(7, 0.7, slow_fraction=0.5),
    ],
    ids=lambda term: term.name,
)
def test_a_term_by_autograd_is_its_hand_written_form(term):
    batch, _, _ = make_batch()
    generator = torch.Generator().manual_seed(4)
    codes_NF = torch.rand(len(batch.x_ND), F, generator=generator, dtype=torch.float64)
    codes_NF = codes_NF * (torch.rand(codes_NF.shape, generator=generator) < 0.1)
    codes_NF[~torch.from_numpy(batch.layout.valid_N)] = 0
    token, latent = codes_NF.nonzero(as_tuple=True)
    columns = (token.int().numpy(), latent.int().numpy(), codes_NF[token, latent].numpy())
    pairs = kernels.keep(len(codes_NF), *columns, np.ones(len(token), np.bool_))
    order = kernels.by_latent(pairs, F)
    expected, found = term.sparse(order, batch.layout, 3), TemporalLoss.sparse(term, order, batch.layout, 3)
    assert found.value == pytest.approx(expected.value, rel=1e-9)
    np.testing.assert_allclose(found.gradient_Q, expected.gradient_Q, rtol=1e-7, atol=1e-12)
    assert np.abs(found.gradient_Q).max() > 0


def a_batch(seed=3):
    generator = torch.Generator().manual_seed(seed)
    acts_BLD = 2 * torch.randn(6, 32, 16, generator=generator) + 0.5
    mask_BL = torch.rand(6, 32, generator=generator) > 0.1
    return ActivationBatch(acts_BLD, mask_BL, (torch.arange(32) // 10).expand(6, 32), torch.zeros(6, 32))


@pytest.mark.parametrize("name", NAMES)
def test_pairs_of_all_codes_are_the_sparse_ones(name):
    """All codes, from which other devices take the pairs, against the CPU's candidates."""
    sae, batch = random_sae(name), a_batch()
    sparse = sae.encode_sparse(batch)
    codes_NF = sae.encode(batch.acts_BLD, batch.mask_BL, batch.doc_BL).flatten(0, 1)
    token_P, latent_P = (codes_NF > 0).nonzero(as_tuple=True)
    assert torch.equal(token_P, sparse.token_P)
    assert torch.equal(latent_P, sparse.latent_P)
    torch.testing.assert_close(
        codes_NF[token_P, latent_P] * sae.W_dec.norm(dim=-1)[latent_P], sparse.value_P, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", NAMES)
def test_codes_are_differentiable(name):
    sae, acts = random_sae(name), a_batch().acts_BLD.requires_grad_()
    sae(acts).square().sum().backward()
    assert float(acts.grad.abs().max()) > 0


@pytest.mark.parametrize("name", NAMES)
def test_an_sae_on_another_device(name):
    """Every tensor that an operation needs lies there: "meta" has shapes and a place, and refuses those of the CPU."""
    sae, batch = random_sae(name), a_batch()
    expected = sae.encode_sparse(batch)
    moved = sae.to("meta")
    acts_BLD, mask_BL, doc_BL = (each.to("meta") for each in (batch.acts_BLD, batch.mask_BL, batch.doc_BL))
    codes_BLF = moved.encode(acts_BLD, mask_BL, doc_BL)
    reconstruction_BLD = moved(acts_BLD.bfloat16())
    assert (codes_BLF.shape, codes_BLF.dtype) == ((6, 32, 48), torch.float32)
    with torch.fx.experimental._config.patch(meta_nonzero_assume_all_nonzero=True):
        sparse = moved.encode_sparse(batch)
    places = (moved, codes_BLF, reconstruction_BLD, sparse.value_P, moved.decode_sparse(sparse))
    assert {each.device.type for each in places} == {"meta"}
    assert sae.device.type == "cpu"
    assert torch.equal(sae.to("cpu").encode_sparse(batch).value_P, expected.value_P)


def test_what_is_learned_by_autograd_alone():
    """Against the loss as one dense formula."""
    batch, mask_BL, doc_BL = make_batch()
    parameters, threshold_F = make_parameters(), torch.linspace(0.3, 1, F, dtype=torch.float64)
    parameters = replace(parameters, own={"threshold": threshold_F})
    term = Flicker(0.5)
    result = forward_backward(
        parameters,
        parameters.W_enc_FD,
        batch,
        SAEConfig("arm", SoftThreshold(k=4), F, (term,)),
        [(term, term.coefficient)],
        workspace=Workspace(),
        config=CONFIG,
    )
    leaves = parameters.map(lambda tensor: tensor.clone().requires_grad_())
    pre_NF = batch.x_ND @ leaves.W_enc_FD.T + leaves.b_enc_F
    codes_NF = (pre_NF - leaves.own["threshold"]).relu() * mask_BL.view(-1, 1)
    residual_ND = (codes_NF @ leaves.W_dec_FD + leaves.b_dec_D - batch.x_ND) * mask_BL.view(-1, 1)
    scale = 1 / (batch.x_ND.shape[1] * batch.n_valid)
    loss = scale * (residual_ND.square().sum() + 0.3 * codes_NF.sum())
    loss = loss + 0.5 * term.loss(codes_NF.view(*mask_BL.shape, F), mask_BL, doc_BL)
    loss.backward()
    assert result.loss == pytest.approx(float(loss.detach()), rel=1e-12)
    for (name, leaf), (_, gradient) in zip(leaves.items(), result.gradients.items(), strict=True):
        expected, unit = leaf.grad, parameters.W_dec_FD
        if name == "W_dec_FD":
            expected = expected - (expected * unit).sum(-1, keepdim=True) * unit
        torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-12, msg=name)


def test_what_is_missing_is_named():
    with pytest.raises(UsageError, match=r"architecture 'crystal' is unknown: choose one of .*topk"):
        architecture_named("crystal")
    with pytest.raises(UsageError, match="is unknown"):
        architecture_named("batchtopk")  # trains, and is saved as jumprelu
    weights = (torch.eye(2), torch.zeros(2), torch.eye(2), torch.zeros(2))
    with pytest.raises(UsageError, match="a gated SAE without r_mag: give the architecture its r_mag"):
        SparseAutoencoder(*weights, Gated(b_gate=torch.zeros(2)))
    for loaded in (JumpReLU(threshold=torch.ones(2)), Hysteresis(threshold=torch.ones(2))):
        with pytest.raises(ValueError, match="cannot train without a budget: give it k"):
            SAEConfig("again", loaded, 2)


def test_what_is_saved_of_a_recipe_holds_no_tensor():
    trained = JumpReLU(k=3, threshold=torch.ones(2))
    assert trained.settings() == {"type": "JumpReLU", "k": 3, "bandwidth": 1.0, "strength": 1.0}
    assert {f.name for f in fields(trained) if f.compare} == {"k", "bandwidth", "strength"}
