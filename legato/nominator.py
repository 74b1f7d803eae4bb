"""Active pairs of a trained SAE with positive thresholds or a budget, without computing every code exactly.

Shape legend: B rows, L positions, N flat tokens, D width, F latents, P pairs in token order.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from legato import kernels
from legato.hardware import fast_matmul_dtype, fixed_matmul
from legato.persistence import carry
from legato.sequences import SequenceLayout
from legato.sparsity import Preactivations
from legato.sparsity.hysteresis_topk import held_top_pairs
from legato.sparsity.preactivations import Array

_NOMINATED_SHARE = 0.9


@dataclass(frozen=True)
class Nominator:
    """A matmul in the machine's fast dtype nominates pairs within a tenth of their threshold, or of their token's
    budget, and only those are computed exactly, in float32.

    pre = (acts - b_dec) @ W_enc + bias_F, on above threshold_F > 0, or where it is one of the token's k largest (with a
    release: see sparsity.Hysteresis and HysteresisTopK). Code of what is on: pre, or relu(gain_F * pre + offset_F);
    with a leak it enters a state, which is the code (see persistence.carry).
    """

    W_enc_FD: Tensor
    b_dec: Tensor
    bias_F: Tensor
    threshold_F: Tensor | None
    gain_F: Tensor | None = None
    offset_F: Tensor | None = None
    release: float | None = None
    k: int | None = None
    leak_F: Tensor | None = None
    tail: float | None = None

    @cached_property
    def _low_W_enc_FD(self) -> Tensor:
        return self.W_enc_FD.to(fast_matmul_dtype())

    def codes(self, acts_BLD: Tensor, layout: SequenceLayout) -> tuple[Tensor, Tensor, Tensor]:
        """(token_P, latent_P, code_P) of the active pairs."""
        x_ND = acts_BLD.flatten(0, 1) - self.b_dec
        low_W_enc_FD = self._low_W_enc_FD
        dtype = low_W_enc_FD.dtype
        pre = Preactivations(
            fixed_matmul(x_ND.to(dtype), low_W_enc_FD.T, self.bias_F.to(dtype)),
            x_ND.numpy(),
            self.W_enc_FD.numpy(),
            self.bias_F.numpy(),
            layout,
        )
        if self.k is not None:
            return _tensors(*held_top_pairs(pre, self.k, self.release or 1.0, _NOMINATED_SHARE)[1:])
        assert self.threshold_F is not None
        threshold_F = self.threshold_F.numpy()
        floor_F = np.float32(_NOMINATED_SHARE * (self.release or 1)) * threshold_F
        token_P, latent_P, value_P = pre.scan_latents(floor_F, 64 * len(x_ND))
        if self.release is not None:
            on_P = pre.critical(token_P, latent_P, value_P / threshold_F[latent_P], self.release) >= 1
        else:
            on_P = value_P > threshold_F[latent_P]
        if self.gain_F is not None and self.offset_F is not None:
            value_P = self.gain_F.numpy()[latent_P] * value_P + self.offset_F.numpy()[latent_P]
            on_P &= value_P > 0
        if self.leak_F is not None and self.tail is not None:
            selected = kernels.keep(len(x_ND), token_P, latent_P, value_P, on_P)
            order = kernels.by_latent(selected, len(threshold_F))
            codes = carry(order, self.leak_F.numpy(), self.tail, layout).pairs(len(x_ND))
            return _tensors(codes.token_P, codes.latent_P, codes.value_P)
        return _tensors(token_P[on_P], latent_P[on_P], value_P[on_P])


def _tensors(token_P: Array, latent_P: Array, value_P: Array) -> tuple[Tensor, Tensor, Tensor]:
    return torch.from_numpy(token_P).long(), torch.from_numpy(latent_P).long(), torch.from_numpy(value_P)
