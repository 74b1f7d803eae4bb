"""Persistent: every latent leaks its past into its present.

Shape legend: N flat tokens, F latents, P / Q selected pairs by token / by latent, H pairs with a code by latent.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from legato.sae.architectures.base import INNER_SHARE, Architecture, Number, tensor
from legato.sae.architectures.batchtopk import batch_top
from legato.sae.architectures.forward import Decoding, Forward
from legato.sae.architectures.preactivations import Columns, Encoder, Preactivations, budget_threshold, columns
from legato.sae.kernels import pairs as kernels
from legato.sae.kernels.leak import Carried, leak_backward, leak_forward
from legato.sae.kernels.pairs import Array, Pairs, PairsByLatent
from legato.sae.segments import runs

_ROUNDS = 4  # of budget and share settling on each other


@dataclass(frozen=True)
class Persistent(Architecture):
    """h_t = l h_{t-1} + (1 - l) a_t along the tokens of one document, and h is the code that is decoded; a is
    BatchTopK's code, the leak l of each latent is learned (arXiv 2607.17117).

    A stretch ends where nothing is selected and h falls below `tail` of the stretch's peak, so that codes stay sparse;
    the cut passes no gradient. The budget pays for what is carried too: a takes k times the share of selected pairs
    among all codes of the batch before, which holds L0 at k. start: the leak before training.
    """

    k: int = 0
    tail: float = 0.2
    start: float = 0.3
    threshold: Tensor = tensor()
    leak: Tensor = tensor()
    name: ClassVar[str] = "persistent"
    per_latent: ClassVar[Mapping[str, str]] = {"threshold": "F", "leak": "F"}
    numbers: ClassVar[Mapping[str, Number]] = {"tail": INNER_SHARE}
    stateful: ClassVar[bool] = True
    own_parameters: ClassVar[tuple[str, ...]] = ("leak_logit_F",)
    own_rate: ClassVar[float] = 5.0

    def __post_init__(self) -> None:
        if not 0 < self.tail < 1 or not 0 < self.start < 1:
            raise ValueError(f"tail {self.tail} and start {self.start} must lie between 0 and 1")

    def initial(self, pre: Preactivations) -> dict[str, Tensor]:
        logit = float(np.log(self.start / (1 - self.start)))
        return {"leak_logit_F": torch.full(pre.b_enc_F.shape, logit)}

    def forward(self, pre: Preactivations, state: float, progress: float) -> Forward:
        """state: logarithm of the share of selected pairs among the codes."""
        selected, _ = batch_top(pre, self.k * float(np.exp(state)), 0.0)
        leak_F = _leak(pre.own["leak_logit_F"])
        order = kernels.by_latent(selected, len(leak_F))
        carried = leak_forward(order, leak_F, self.tail, pre.layout)
        share = max(len(order.value_Q), 1) / max(len(carried.value_H), 1)
        return _Leaky(carried.pairs(pre.shape[0]), float(np.log(share)), selected, order, carried, leak_F)

    def inference(self, calibration: Sequence[Preactivations]) -> "Persistent":
        state = 0.0
        for _ in range(_ROUNDS):
            state = float(np.mean([self.forward(pre, state, 1.0).state for pre in calibration]))
        threshold = budget_threshold(calibration, self.k * float(np.exp(state)))
        leak = torch.from_numpy(_leak(calibration[0].own["leak_logit_F"]))
        return Persistent(tail=self.tail, threshold=torch.full(leak.shape, threshold), leak=leak)

    def activate(self, pre: Tensor, mask: Tensor | None = None, doc: Tensor | None = None) -> Tensor:
        return leaked(pre.relu() * (pre > self.threshold), self.leak, self.tail, mask, doc)

    def encode_sparse(self, encoder: Encoder, acts_BLD: Tensor, mask_BL: Tensor, doc_BL: Tensor) -> Columns:
        if not bool((self.threshold > 0).all()):
            return super().encode_sparse(encoder, acts_BLD, mask_BL, doc_BL)
        threshold_F, pre = self.threshold.numpy(), encoder.centred(acts_BLD, mask_BL, doc_BL)
        N, F = pre.shape
        token_P, latent_P, value_P = pre.near(threshold_F)
        selected = kernels.keep(N, token_P, latent_P, value_P, value_P > threshold_F[latent_P])
        carried = leak_forward(kernels.by_latent(selected, F), self.leak.numpy(), self.tail, pre.layout)
        return columns(*carried.pairs(N)[1:])


def _leak(logit_F: Array) -> Array:
    return 1 / (1 + np.exp(-logit_F))


@dataclass(frozen=True)
class _Leaky(Forward):
    selected: Pairs
    selected_order: PairsByLatent
    carried: Carried
    leak_F: Array

    def backward(self, decoding: Decoding) -> tuple[dict[str, float], Array]:
        carried, F = self.carried, len(self.leak_F)
        by_code_H = decoding.slope_Q + decoding.code_gradient(carried.token_H, carried.latent_H)
        by_selected_Q, by_leak_F = leak_backward(carried, by_code_H, self.selected_order, self.leak_F)
        decoding.gradients["leak_logit_F"][:] = by_leak_F * self.leak_F * (1 - self.leak_F)
        by_selected_P = np.empty_like(by_selected_Q)
        by_selected_P[self.selected_order.source_Q] = by_selected_Q
        bias_F = np.bincount(self.selected.latent_P, by_selected_P, F)
        return {}, decoding.apart(self.selected._replace(value_P=by_selected_P), bias_F)


def leaked(inputs: Tensor, leak: Tensor, tail: float, mask: Tensor | None = None, doc: Tensor | None = None) -> Tensor:
    """Codes h[..., L, F] of inputs a[..., L, F], leak (F): as `leak_forward`, dense. mask, doc: [..., L]; the state
    ends where a document does and at masked tokens."""
    valid, opens = runs(inputs, mask, doc)
    state = peak = torch.zeros_like(inputs[..., 0, :])
    codes = []
    for t in range(inputs.shape[-2]):
        goes_on = (valid & ~opens)[..., t, None]
        entered = inputs[..., t, :] * valid[..., t, None]
        state, peak = state * goes_on, peak * goes_on
        state = leak * state + (1 - leak) * entered
        stays = (entered > 0) | (state >= tail * peak)
        peak = torch.maximum(peak, state) * stays
        state = state * stays
        codes.append(state)
    return torch.stack(codes, dim=-2)
