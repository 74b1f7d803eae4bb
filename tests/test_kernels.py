"""The sparse step against a dense autograd step, in float64."""

import dataclasses

import numpy as np
import pytest
import torch

from legato.sae.architectures import (
    Architecture,
    BatchTopK,
    Gated,
    Hysteresis,
    HysteresisTopK,
    JumpReLU,
    Persistent,
    Preactivations,
    ReLU,
    TopK,
    WindowTopK,
    hysteresis_topk,
)
from legato.sae.architectures.forward import OPENING
from legato.sae.autoencoder import SparseAutoencoder
from legato.sae.kernels import gradients
from legato.sae.kernels import pairs as kernels
from legato.sae.segments import Segments
from legato.training.config import SAEConfig, TrainConfig
from legato.training.losses import (
    Contrastive,
    FusedLasso,
    PositionPenalty,
    Slowness,
    TsaeContrastive,
    WindowGroupLasso,
    WindowVariance,
)
from legato.training.step import Parameters, TrainBatch, Workspace, auxiliary_loss, forward_backward

B, L, D, F = 6, 20, 24, 64
CONFIG = TrainConfig(steps=10, aux_k=5, aux_tokens=1000)


def make_batch(seed: int = 0) -> tuple[TrainBatch, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x_BLD = torch.randn(B, L, D, generator=generator, dtype=torch.float64)
    x_BLD[:, 1:] += 0.8 * x_BLD[:, :-1]  # neighbours resemble each other
    mask_BL = torch.rand(B, L, generator=generator) > 0.1
    doc_BL = (torch.arange(L) // 13).expand(B, L) + 2 * torch.arange(B)[:, None]
    x_ND = (x_BLD * mask_BL[..., None]).view(-1, D)
    batch = TrainBatch(x_ND, x_ND, Segments.of(mask_BL, doc_BL), int(mask_BL.sum()), 1.0, 1.0)
    return batch, mask_BL, doc_BL


def make_parameters(seed: int = 1) -> Parameters:
    parameters = Parameters.initial(D, F, seed).map(torch.Tensor.double)
    noise = torch.Generator().manual_seed(seed)
    for name, tensor in parameters.items():
        if name != "W_dec_FD":
            tensor += 0.2 * torch.randn(tensor.shape, generator=noise, dtype=torch.float64)
    torch.nn.functional.normalize(parameters.W_dec_FD, dim=-1, out=parameters.W_dec_FD)
    return parameters


class JumpingReLU(torch.autograd.Function):
    """pre * [pre > exp(log_threshold)], the step's derivative by the threshold a rectangle of width `bandwidth`."""

    @staticmethod
    def forward(ctx, pre_NF, log_threshold_F, bandwidth):
        threshold_F = log_threshold_F.exp()
        ctx.bandwidth = bandwidth
        ctx.save_for_backward(pre_NF, threshold_F)
        return pre_NF * (pre_NF > threshold_F)

    @staticmethod
    def backward(ctx, slope_NF):
        pre_NF, threshold_F = ctx.saved_tensors
        band_NF = ((pre_NF - threshold_F).abs() < ctx.bandwidth / 2) & (pre_NF > 0)
        by_threshold_F = -(slope_NF * band_NF).sum(0) * threshold_F / ctx.bandwidth
        return slope_NF * (pre_NF > threshold_F), by_threshold_F * threshold_F, None


class Jumps(torch.autograd.Function):
    """[pre > exp(log_threshold)] with the same estimate of its derivative."""

    @staticmethod
    def forward(ctx, pre_NF, log_threshold_F, bandwidth):
        threshold_F = log_threshold_F.exp()
        ctx.bandwidth = bandwidth
        ctx.save_for_backward(pre_NF, threshold_F)
        return (pre_NF > threshold_F).double()

    @staticmethod
    def backward(ctx, slope_NF):
        pre_NF, threshold_F = ctx.saved_tensors
        band_NF = ((pre_NF - threshold_F).abs() < ctx.bandwidth / 2) & (pre_NF > 0)
        return None, -(slope_NF * band_NF).sum(0) * threshold_F / ctx.bandwidth, None


def nested_error(codes_NF, W_dec_FD, b_dec_D, batch: TrainBatch, groups) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted squared error of the nested reconstructions, and the residual of the last."""
    loss = torch.zeros((), dtype=torch.float64)
    for share, weight in groups:
        n = int(share * F)
        residual_ND = codes_NF[:, :n] @ W_dec_FD[:n] + b_dec_D - batch.x_ND
        residual_ND = residual_ND * torch.from_numpy(batch.layout.valid_N)[:, None]
        loss = loss + weight * residual_ND.square().sum() / (D * batch.n_valid)
    return loss, residual_ND


def dense_codes(parameters: Parameters, batch: TrainBatch, mask_BL: torch.Tensor, sparsity: Architecture, groups):
    """Codes as the reconstruction sees them, as the temporal terms see them, and the sparsity's own loss."""
    p, own = parameters, parameters.own
    valid_N1 = mask_BL.view(-1, 1)
    product_NF = batch.x_ND @ p.W_enc_FD.T
    pre_NF = (product_NF + p.b_enc_F).relu() * valid_N1
    if isinstance(sparsity, TopK):
        codes_NF = pre_NF * (pre_NF >= pre_NF.topk(sparsity.k, dim=-1).values[:, -1:])
        return codes_NF, codes_NF, 0.0
    if isinstance(sparsity, BatchTopK):
        codes_NF = pre_NF * (pre_NF >= pre_NF.flatten().topk(sparsity.k * batch.n_valid).values[-1])
        return codes_NF, codes_NF, 0.0
    if isinstance(sparsity, Hysteresis):
        on_BLF, _ = highest_budget(pre_NF.detach().view(B, L, F), batch.layout, sparsity)
        return pre_NF * on_BLF.view(-1, F), pre_NF * on_BLF.view(-1, F), 0.0
    if isinstance(sparsity, HysteresisTopK):
        on_BLF = incumbents(pre_NF.detach().view(B, L, F), batch.layout, sparsity)
        return pre_NF * on_BLF.view(-1, F), pre_NF * on_BLF.view(-1, F), 0.0
    if isinstance(sparsity, WindowTopK):
        on_BLF = best_windows(pre_NF.detach().view(B, L, F), batch.layout, sparsity)
        return pre_NF * on_BLF.view(-1, F), pre_NF * on_BLF.view(-1, F), 0.0
    if isinstance(sparsity, JumpReLU):
        log_threshold_F, width = own["log_threshold_F"], sparsity.bandwidth
        excess = Jumps.apply(pre_NF, log_threshold_F, width).sum() / batch.n_valid / sparsity.k - 1
        return (
            JumpingReLU.apply(pre_NF, log_threshold_F, width),
            JumpingReLU.apply(pre_NF, log_threshold_F.detach(), width),
            sparsity.strength * excess.square(),
        )
    if isinstance(sparsity, Gated):
        gate_NF = (product_NF + own["b_gate_F"]).relu() * valid_N1
        codes_NF = (product_NF * own["r_mag_F"].exp() + p.b_enc_F).relu() * (gate_NF > 0)
        error, _ = nested_error(gate_NF, p.W_dec_FD.detach(), p.b_dec_D.detach(), batch, groups)
        return codes_NF, codes_NF, error + sparsity.l1 / D * gate_NF.sum() / batch.n_valid
    if isinstance(sparsity, Persistent):
        selected_NF, _, _ = dense_codes(parameters, batch, mask_BL, BatchTopK(sparsity.k), groups)
        codes_NF = leaky_loop(selected_NF, batch.layout, own["leak_logit_F"].sigmoid(), sparsity.tail)
        return codes_NF, codes_NF, 0.0
    assert isinstance(sparsity, ReLU)
    return pre_NF, pre_NF, sparsity.l1 / D * pre_NF.sum() / batch.n_valid


def leaky_loop(selected_NF: torch.Tensor, layout: Segments, leak_F: torch.Tensor, tail: float) -> torch.Tensor:
    """h = l h + (1 - l) a, token by token; a stretch ends without input below `tail` of its peak."""
    state_F = peak_F = torch.zeros(F, dtype=torch.float64)
    codes = []
    for n, selected_F in enumerate(selected_NF):
        if layout.start_N[n] in (-1, n):  # invalid, or the first token of a run
            state_F = peak_F = torch.zeros(F, dtype=torch.float64)
        state_F = leak_F * state_F + (1 - leak_F) * selected_F
        ends_F = (selected_F == 0) & (state_F < tail * peak_F)
        state_F = state_F * ~ends_F
        peak_F = torch.maximum(peak_F, state_F.detach()) * ~ends_F
        codes.append(state_F)
    return torch.stack(codes)


def with_own(parameters: Parameters, sparsity: Architecture) -> Parameters:
    """The sparsity's own parameters, scattered: thresholds about .8, gates about -.8, gains about 1, leaks about .4."""
    noise = torch.Generator().manual_seed(7)
    centre = {"log_threshold_F": -0.2, "b_gate_F": -0.8, "r_mag_F": 0.0, "leak_logit_F": -0.4}
    own = {
        name: centre[name] + 0.2 * torch.randn(F, generator=noise, dtype=torch.float64)
        for name in sparsity.own_parameters
    }
    return dataclasses.replace(parameters, own=own)


def schmitt(pre_BLF: torch.Tensor, layout: Segments, threshold: float, release: float) -> torch.Tensor:
    """The trigger as a plain loop."""
    starts = torch.from_numpy(layout.start_N).view(pre_BLF.shape[:2])
    on_BLF = torch.zeros(pre_BLF.shape, dtype=torch.bool)
    for b in range(pre_BLF.shape[0]):
        held_F = torch.zeros(pre_BLF.shape[2], dtype=torch.bool)
        for t in range(pre_BLF.shape[1]):
            if starts[b, t] in (-1, b * pre_BLF.shape[1] + t):  # invalid, or the first token of a run
                held_F = torch.zeros_like(held_F)
            if starts[b, t] >= 0:
                held_F = (pre_BLF[b, t] >= threshold) | (held_F & (pre_BLF[b, t] >= release * threshold))
                on_BLF[b, t] = held_F
    return on_BLF


def highest_budget(pre_BLF: torch.Tensor, layout: Segments, sparsity: Hysteresis) -> tuple[torch.Tensor, float]:
    """Bisect the threshold on the plain loop."""
    count, low, high = sparsity.k * int(layout.valid_N.sum()), 0.0, float(pre_BLF.max())
    while high - low > 1e-5 * high:
        middle = (low + high) / 2
        if int(schmitt(pre_BLF, layout, middle, sparsity.release).sum()) >= count:
            low = middle
        else:
            high = middle
    return schmitt(pre_BLF, layout, low, sparsity.release), low


def incumbents(pre_BLF: torch.Tensor, layout: Segments, sparsity: HysteresisTopK) -> torch.Tensor:
    """Each token's k best, where what was on before counts 1 / release times, as a plain loop."""
    starts = torch.from_numpy(layout.start_N).view(B, L)
    on_BLF = torch.zeros(pre_BLF.shape, dtype=torch.bool)
    for b in range(B):
        for t in range(L):
            if starts[b, t] < 0:
                continue
            score_F = pre_BLF[b, t].clone()
            if starts[b, t] != b * L + t:
                score_F[on_BLF[b, t - 1]] /= sparsity.release
            on_BLF[b, t, score_F.topk(sparsity.k).indices] = True
            on_BLF[b, t] &= pre_BLF[b, t] > 0
    return on_BLF


def best_windows(pre_BLF: torch.Tensor, layout: Segments, sparsity: WindowTopK) -> torch.Tensor:
    """The windows of largest norm, one after the other until the budget is spent, as a plain loop."""
    pre_NF, starts, ends = pre_BLF.relu().reshape(-1, F), layout.start_N, layout.end_N
    firsts = [n for n in range(B * L) if starts[n] >= 0 and (n - starts[n]) % sparsity.window == 0]
    cells = [(float(pre_NF[n : min(n + sparsity.window, ends[n]), f].norm()), n, f) for n in firsts for f in range(F)]
    on_NF = torch.zeros(B * L, F, dtype=torch.bool)
    for _, n, f in sorted(cells, reverse=True):
        if on_NF.sum() >= sparsity.k * int(layout.valid_N.sum()):
            break
        part = slice(n, min(n + sparsity.window, ends[n]))
        on_NF[part, f] = pre_NF[part, f] > 0
    return on_NF.view(pre_BLF.shape)


@pytest.mark.parametrize("sparsity", [HysteresisTopK(5, release=0.4), WindowTopK(5, window=4)])
def test_choices_along_the_sequence_equal_the_plain_loop_in_training_and_inference(sparsity):
    batch, mask_BL, doc_BL = make_batch()
    parameters = make_parameters()
    pre_NF = batch.x_ND @ parameters.W_enc_FD.T + parameters.b_enc_F
    loop = incumbents if isinstance(sparsity, HysteresisTopK) else best_windows
    on_BLF = loop(pre_NF.view(B, L, F), batch.layout, sparsity)
    arrays = [tensor.numpy() for tensor in (batch.x_ND, parameters.W_enc_FD, parameters.b_enc_F)]
    pre = Preactivations(pre_NF, *arrays, batch.layout)
    pairs, _ = sparsity.select(pre, 0.0, 1.0)
    found_NF = torch.zeros(B * L, F, dtype=torch.bool)
    found_NF[pairs.token_P, pairs.latent_P] = True
    assert torch.equal(found_NF.view(B, L, F), on_BLF)
    assert 4.9 * batch.n_valid <= on_BLF.sum() <= 5.1 * batch.n_valid
    plain_NF = pre_NF >= pre_NF.topk(5).values[:, -1:]
    assert (on_BLF.view(-1, F) != plain_NF)[mask_BL.view(-1)].any()  # spent on other pairs

    p = parameters
    sae = SparseAutoencoder(p.W_enc_FD.T.contiguous(), p.b_enc_F, p.W_dec_FD, p.b_dec_D, sparsity.inference([pre]))
    codes_BLF = sae.encode(batch.x_ND.view(B, L, D), mask_BL, doc_BL)
    assert torch.equal(codes_BLF > 0, on_BLF)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_held_top_from_rounded_values_is_exact(dtype):
    # The state of the rounded pass may differ from the exact one; its candidates must still hold the exact choice.
    generator = torch.Generator().manual_seed(0)
    tokens, width, latents, k = 256, 24, 128, 8
    x_ND = torch.randn(tokens, width, generator=generator).cumsum(0) / 4
    W_FD = torch.randn(latents, width, generator=generator)
    layout = Segments.of(torch.ones(2, tokens // 2, dtype=torch.bool), torch.zeros(2, tokens // 2))
    exact_NF = x_ND @ W_FD.T
    expected = hysteresis_topk.held_top(exact_NF.view(2, -1, latents), k, 0.4).view(tokens, latents)
    pre = Preactivations(exact_NF.to(dtype), x_ND.numpy(), W_FD.numpy(), np.zeros(latents, np.float32), layout)
    pairs, _ = HysteresisTopK(k, release=0.4).select(pre, 0.0, 1.0)
    found_NF = torch.zeros(tokens, latents, dtype=torch.bool)
    found_NF[pairs.token_P, pairs.latent_P] = True
    assert torch.equal(found_NF, expected)


def test_hysteresis_budget_and_inference_equal_the_plain_loop():
    batch, mask_BL, doc_BL = make_batch()
    parameters = make_parameters()
    sparsity = Hysteresis(5, release=0.5)
    pre_NF = batch.x_ND @ parameters.W_enc_FD.T + parameters.b_enc_F
    on_BLF, threshold = highest_budget(pre_NF.view(B, L, F), batch.layout, sparsity)
    plain_BLF, _ = highest_budget(pre_NF.view(B, L, F), batch.layout, Hysteresis(5, release=1.0))
    assert plain_BLF.sum() == 5 * batch.n_valid
    assert 0 <= on_BLF.sum() - 5 * batch.n_valid <= L  # the same budget, up to one held stretch at the cut
    assert (on_BLF != plain_BLF).any()  # spent on other pairs

    arrays = [tensor.numpy() for tensor in (batch.x_ND, parameters.W_enc_FD, parameters.b_enc_F)]
    pre = Preactivations(pre_NF, *arrays, batch.layout)
    for floor in (0.0, 0.3, 1e9):
        pairs, _ = sparsity.select(pre, floor, 1.0)
        found_NF = torch.zeros(B * L, F, dtype=torch.bool)
        found_NF[pairs.token_P, pairs.latent_P] = True
        assert torch.equal(found_NF.view(B, L, F), on_BLF)
    assert sparsity.inference([pre]).threshold.tolist() == pytest.approx([threshold] * F, rel=0.02)

    p = parameters
    sae = SparseAutoencoder(
        p.W_enc_FD.T.contiguous(),
        p.b_enc_F,
        p.W_dec_FD,
        p.b_dec_D,
        Hysteresis(release=0.5, threshold=torch.full((F,), threshold, dtype=torch.float64)),
    )
    codes_BLF = sae.encode(batch.x_ND.view(B, L, D), mask_BL, doc_BL)
    assert torch.equal(codes_BLF > 0, on_BLF)
    torch.testing.assert_close(codes_BLF, (pre_NF * on_BLF.view(-1, F)).view(B, L, F))


def test_release_one_is_batch_top_k():
    batch, _, _ = make_batch()
    parameters = make_parameters()
    arrays = [tensor.numpy() for tensor in (batch.x_ND, parameters.W_enc_FD, parameters.b_enc_F)]
    pre = Preactivations(batch.x_ND @ parameters.W_enc_FD.T + parameters.b_enc_F, *arrays, batch.layout)
    held, _ = Hysteresis(6, release=0.3).select(pre, 0.0, 0.0)  # before annealing starts
    plain, _ = BatchTopK(6).select(pre, 0.0, 0.0)
    assert set(zip(held.token_P, held.latent_P, strict=True)) == set(zip(plain.token_P, plain.latent_P, strict=True))


SPARSITIES = [
    BatchTopK(4),
    TopK(4),
    ReLU(0.3),
    Hysteresis(4, release=0.4),
    HysteresisTopK(4, release=0.4),
    WindowTopK(4, window=3),
    JumpReLU(5),
    Gated(0.3),
    Persistent(3),
]


@pytest.mark.parametrize("sparsity", SPARSITIES, ids=lambda sparsity: type(sparsity).__name__)
@pytest.mark.parametrize(
    "terms",
    [
        (),
        (WindowVariance(window=2, coefficient=0.7),),
        (WindowVariance(window=7, coefficient=0.7),),
        (Contrastive(coefficient=0.3, anchors=20), WindowVariance(window=20, coefficient=1.0)),
        (Slowness(window=5, coefficient=0.3), TsaeContrastive(coefficient=0.3, slow_fraction=0.5)),
        (WindowGroupLasso(window=4, coefficient=0.2), FusedLasso(0.3, slow_fraction=0.5), PositionPenalty(0.5)),
    ],
)
@pytest.mark.parametrize("with_dead", [False, True])
@pytest.mark.parametrize("groups", [((1.0, 1.0),), ((0.2, 0.3), (0.5, 0.2), (1.0, 0.6))], ids=["plain", "matryoshka"])
def test_every_gradient_equals_dense_autograd(sparsity, terms, with_dead, groups):
    batch, mask_BL, doc_BL = make_batch()
    parameters = with_own(make_parameters(), sparsity)
    dead_F = torch.arange(F) % 9 == 0 if with_dead else None
    arm = SAEConfig("arm", sparsity, F, terms, groups=groups)
    result = forward_backward(
        parameters,
        parameters.W_enc_FD,
        batch,
        arm,
        [(term, term.coefficient) for term in terms],
        workspace=Workspace(),
        step=3,
        dead_F=dead_F,
        config=CONFIG,
    )

    leaves = parameters.map(lambda tensor: tensor.clone().requires_grad_())
    codes_NF, seen_NF, own_loss = dense_codes(leaves, batch, mask_BL, sparsity, groups)
    loss, residual_ND = nested_error(codes_NF, leaves.W_dec_FD, leaves.b_dec_D, batch, groups)
    loss = loss + own_loss
    for term in terms:
        loss = loss + term.coefficient * term.loss(seen_NF.view(B, L, F), mask_BL, doc_BL, step=3)
    if dead_F is not None:
        dead = leaves.map(lambda tensor: tensor[dead_F] if len(tensor) == F else tensor)
        valid_N = mask_BL.flatten()
        aux = auxiliary_loss(batch.x_ND[valid_N], residual_ND[valid_N].detach(), dead, CONFIG.aux_k)
        loss = loss + CONFIG.aux_coefficient * aux
        if isinstance(sparsity, JumpReLU):
            loss = loss + OPENING * leaves.own["log_threshold_F"][dead_F].exp().sum()
        if isinstance(sparsity, Gated):
            loss = loss - OPENING * leaves.own["b_gate_F"][dead_F].sum()
    loss.backward()

    assert result.loss == pytest.approx(float(loss.detach()), rel=1e-12)
    assert len(result.order.value_Q) == int((codes_NF > 0).sum())
    for (name, leaf), (_, gradient) in zip(leaves.items(), result.gradients.items(), strict=True):
        assert leaf.grad is not None
        expected = leaf.grad
        if name == "W_dec_FD":  # rows stay on the unit sphere: only the tangential part moves them
            unit = parameters.W_dec_FD
            expected = expected - (expected * unit).sum(-1, keepdim=True) * unit
        assert float(expected.abs().max()) > 0
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("sparsity", [BatchTopK(8), TopK(8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_selection_is_exact_whatever_the_floor_and_the_matmul_dtype(sparsity, dtype):
    N, width, latents = 96, 32, 2048  # wide enough that TopK's floors come from a sample
    generator = torch.Generator().manual_seed(3)
    x_ND = torch.randn(N, width, generator=generator)
    W_FD = torch.randn(latents, width, generator=generator) / width**0.5
    b_F = 0.1 * torch.randn(latents, generator=generator)
    valid_N = np.arange(N) % 7 != 0
    exact_NF = x_ND @ W_FD.T + b_F
    exact_NF[~torch.from_numpy(valid_N)] = -1
    layout = Segments.of(torch.from_numpy(valid_N)[None], torch.zeros(1, N, dtype=torch.int32))
    pre = Preactivations(exact_NF.to(dtype), x_ND.numpy(), W_FD.numpy(), b_F.numpy(), layout)
    k = sparsity.k
    if isinstance(sparsity, TopK):
        cut_N = exact_NF.topk(k, dim=-1).values[:, -1:]
    else:
        cut_N = exact_NF.flatten().topk(k * int(valid_N.sum())).values[-1]
    expected = {(int(n), int(f)) for n, f in (exact_NF >= cut_N).nonzero() if valid_N[n]}
    for floor in (0.0, 0.5, 2.0, 1e9):  # far too low, low, high, absurd
        pairs, _ = sparsity.select(pre, floor, 1.0)
        chosen = set(zip(pairs.token_P.tolist(), pairs.latent_P.tolist(), strict=True))
        assert len(chosen ^ expected) <= 2  # float32 sums in another order may swap the two pairs at the cut
        assert len(chosen) == k * int(valid_N.sum())


def test_ties_at_the_cut_keep_exactly_the_budget():
    value_P = np.array([1.0, 2.0, 1.0, 1.0, 3.0])
    assert kernels.keep_batch_top(value_P, 3).tolist() == [True, True, False, False, True]
    assert kernels.keep_row_top(1, np.zeros(5, np.int32), value_P, 3).tolist() == [True, True, False, False, True]


def test_fewer_positive_values_than_the_budget_keeps_them_all():
    value_P = np.array([1.0, -2.0, 0.0])
    assert kernels.keep_batch_top(value_P, 3).tolist() == [True, False, False]


def test_adam_equals_torch():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    reference = weight.clone().requires_grad_()
    optimiser = torch.optim.Adam([reference], lr=0.01)
    m, v = torch.zeros_like(weight), torch.zeros_like(weight)
    for step in range(1, 6):
        gradient = torch.randn(5, 3, generator=generator, dtype=torch.float64)
        reference.grad = gradient.clone()
        optimiser.step()
        gradients.adam(*(t.numpy() for t in (weight, m, v, gradient)), clip=1.0, lr=0.01, step=step, unit_rows=False)
    torch.testing.assert_close(weight, reference.detach(), rtol=1e-10, atol=1e-12)


def test_adam_keeps_unit_rows():
    weight = torch.nn.functional.normalize(torch.randn(4, 8, dtype=torch.float64), dim=-1)
    moments = [torch.zeros_like(weight) for _ in range(2)]
    gradient = torch.randn(4, 8, dtype=torch.float64)
    gradients.adam(*(t.numpy() for t in (weight, *moments, gradient)), clip=1.0, lr=0.1, step=1, unit_rows=True)
    torch.testing.assert_close(weight.norm(dim=-1), torch.ones(4, dtype=torch.float64))
