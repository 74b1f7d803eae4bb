"""Loss of the language model when a site's output is replaced: next-token loss and KL divergence, per token.

One clean forward pass and one chunk of clean logits serve every replacement, and the network restarts at the site.
Logits exist only for a chunk of tokens at a time (a vocabulary of 262k takes 1 MB per token in float32).

Shape legend: B rows, L positions, D width, N counted tokens, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import torch
from numba.extending import overload
from numpy.typing import NDArray
from torch import Tensor

from legato.common.errors import LegatoError
from legato.data.language_model import LanguageModel

TOKENS_PER_CHUNK = 128
_BLOCK = 1024  # vocabulary entries held in the first-level cache at a time


@dataclass(frozen=True)
class TokenLosses:
    """Per counted token, float64 [N], in nats: loss of the next token, and KL(clean || spliced)."""

    ce_N: NDArray[np.float64]
    kl_N: NDArray[np.float64]


@torch.no_grad()
def splice_losses(
    model: LanguageModel,
    acts_BLD: Tensor,
    tokens_BL: Tensor,
    spliced: Mapping[str, Tensor],
    counted_BL: Tensor,
    *,
    layer: int,
    site: str,
) -> tuple[TokenLosses, dict[str, TokenLosses]]:
    """Measure the clean model and each replacement of the site's output, at the counted positions in flat order.

    spliced: name -> acts_BLD to put in place. counted_BL: bool. In the last column only the divergence means something:
    there is no next token, and the loss is for the row's first token. Raises LegatoError where a loss is not finite.
    """

    def hidden(replaced_BLD: Tensor) -> Tensor:
        return model.resume(replaced_BLD.to(acts_BLD.dtype), tokens_BL, layer, site)[counted_BL]

    target_N = tokens_BL.roll(-1, dims=1)[counted_BL].long()
    clean_ND = hidden(acts_BLD)
    spliced_ND = {name: hidden(replaced_BLD) for name, replaced_BLD in spliced.items()}
    n_tokens = target_N.numel()
    clean = TokenLosses(np.zeros(n_tokens), np.zeros(n_tokens))
    losses = {name: TokenLosses(np.zeros(n_tokens), np.zeros(n_tokens)) for name in spliced}
    # Tokens that share a hidden state, as all do under zero ablation, share their logits.
    constant = {
        name: model.unembed(hidden_ND[:1])[0]
        for name, hidden_ND in spliced_ND.items()
        if n_tokens and bool((hidden_ND == hidden_ND[:1]).all())
    }
    buffers: tuple[Tensor, Tensor, Tensor] | None = None  # fresh pages for every chunk would cost as much as the pass
    for start in range(0, n_tokens, TOKENS_PER_CHUNK):
        part = slice(start, start + TOKENS_PER_CHUNK)
        n = min(TOKENS_PER_CHUNK, n_tokens - start)
        if buffers is None:
            one_V = model.unembed(clean_ND[:1])[0]
            own, other = (one_V.new_empty(n, one_V.numel()) for _ in range(2))
            buffers = own, other, torch.empty_like(own, dtype=torch.float32)
        own_NV, other_NV, workspace = (buffer[:n] for buffer in buffers)
        reference = _Reference.of(model.unembed(clean_ND[part], out=own_NV), workspace)
        clean.ce_N[part] = reference.loss(target_N[part])
        for name, hidden_ND in spliced_ND.items():
            if name in constant:
                logits_NV = constant[name].expand(n, -1)
            else:
                logits_NV = model.unembed(hidden_ND[part], out=other_NV)
            losses[name].ce_N[part], losses[name].kl_N[part] = reference.compare(logits_NV, target_N[part])
    for name, loss in {"the clean model": clean, **losses}.items():
        if not (np.isfinite(loss.ce_N).all() and np.isfinite(loss.kl_N).all()):
            raise LegatoError(f"the language model's loss is not finite for {name}; run it in float32 or check the SAE")
    return clean, losses


@dataclass(frozen=True)
class _Reference:
    """A chunk of clean logits with what every comparison reuses: exp(l - max), its sum, logsumexp."""

    logits_NV: Tensor
    exp_NV: Tensor
    sum_N: NDArray[np.float64]
    logsumexp_N: NDArray[np.float64]

    @classmethod
    def of(cls, logits_NV: Tensor, workspace: Tensor) -> "_Reference":
        if not _is_fused(logits_NV):
            logits = logits_NV.float()
            top_N1 = logits.amax(1, keepdim=True)
            exp_NV = (logits - top_N1).exp_()
            sum_N = exp_NV.sum(1, dtype=torch.float64)
            return cls(logits_NV, exp_NV, sum_N.cpu().numpy(), (sum_N.log() + top_N1[:, 0]).cpu().numpy())
        exp_NV = workspace[: logits_NV.shape[0]]
        sum_N, logsumexp_N = _exp_rows(_numpy(logits_NV), exp_NV.numpy())
        return cls(logits_NV, exp_NV, sum_N, logsumexp_N)

    def loss(self, target_N: Tensor) -> NDArray[np.float64]:
        return self.logsumexp_N - _at_target(self.logits_NV, target_N)

    def compare(self, logits_NV: Tensor, target_N: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return (next-token loss, KL(clean || these)) per token; KL = sum p (l_clean - l) - lse_clean + lse."""
        if not _is_fused(logits_NV):
            logits = logits_NV.float()
            logsumexp_N = logits.logsumexp(1).double().cpu().numpy()
            gap_N = (self.exp_NV * (self.logits_NV.float() - logits)).sum(1, dtype=torch.float64).cpu().numpy()
        else:
            gap_N, logsumexp_N = _compare_rows(_numpy(self.logits_NV), self.exp_NV.numpy(), _numpy(logits_NV))
        kl_N = gap_N / self.sum_N - self.logsumexp_N + logsumexp_N
        return logsumexp_N - _at_target(logits_NV, target_N), kl_N


def _is_fused(logits_NV: Tensor) -> bool:
    """Tell whether the fused passes below are used: they run on the CPU, other devices use torch's own kernels."""
    return logits_NV.device.type == "cpu"


def _at_target(logits_NV: Tensor, target_N: Tensor) -> NDArray[np.float64]:
    return logits_NV.gather(1, target_N.to(logits_NV.device)[:, None])[:, 0].double().cpu().numpy()


def _numpy(logits_NV: Tensor) -> NDArray[np.generic]:
    """View the logits without a copy: bfloat16 as its bits (uint16), anything else as float32."""
    if logits_NV.dtype == torch.bfloat16:
        return logits_NV.view(torch.uint16).numpy()
    return logits_NV.float().numpy()


# --- fused passes over the vocabulary, one token per thread -----------------------------------------------------------
# 0.2 ms a token for 262k logits on 2 cores, where the same in chunked float32 torch takes 1.5 ms.


def _load(row_V, out_V):  # type: ignore[no-untyped-def]
    """Widen a stretch of logits to float32; bfloat16 bits are the upper half of a float32's."""


@overload(_load)
def _overload_load(row_V, out_V):  # type: ignore[no-untyped-def]
    if row_V.dtype == numba.uint16:

        def widen(row_V, out_V):  # type: ignore[no-untyped-def]
            bits_V = out_V.view(np.uint32)
            for i in range(row_V.size):
                bits_V[i] = np.uint32(row_V[i]) << np.uint32(16)

        return widen

    def copy(row_V, out_V):  # type: ignore[no-untyped-def]
        for i in range(row_V.size):
            out_V[i] = row_V[i]

    return copy


_ZERO: Any = np.float32(0.0)
_LOWEST: Any = np.float32(-3.0e38)
_LOG2E = np.float32(1.4426950408889634)
_HALF = np.float32(0.5)
_FLOOR = np.float32(-126.0)
# All of fastmath but "nsz", as in sae/kernels/pairs.py.
_SUMMING = {"contract", "reassoc", "arcp", "nnan", "ninf"}
# Taylor series of 2^g for |g| <= 1/2, relative error 2e-8
_C0, _C1, _C2, _C3, _C4, _C5, _C6 = (np.float32(np.log(2.0) ** n / d) for n, d in enumerate((1, 1, 2, 6, 24, 120, 720)))


@numba.njit(cache=True, fastmath={"contract", "nnan", "ninf"})
def _exp_block(x_V, shift, out_V, scale_V):  # type: ignore[no-untyped-def]
    """Compute out = exp(x - shift) with 2^y = 2^g 2^k, in a form that compiles to vector instructions."""
    bits_V = scale_V.view(np.int32)
    for i in range(x_V.size):
        y = max((x_V[i] - shift) * _LOG2E, _FLOOR)
        k = np.floor(y + _HALF)
        g = y - k
        out_V[i] = _C0 + g * (_C1 + g * (_C2 + g * (_C3 + g * (_C4 + g * (_C5 + g * _C6)))))
        bits_V[i] = (np.int32(k) + np.int32(127)) << np.int32(23)
    for i in range(x_V.size):
        out_V[i] *= scale_V[i]


@numba.njit(cache=True, fastmath=_SUMMING, parallel=True)
def _exp_rows(logits_NV, exp_NV):  # type: ignore[no-untyped-def]
    N, V = logits_NV.shape
    sum_N = np.zeros(N)
    logsumexp_N = np.zeros(N)
    for n in numba.prange(N):
        x_V = np.empty(_BLOCK, np.float32)
        scale_V = np.empty(_BLOCK, np.float32)
        top = _LOWEST
        for a in range(0, V, _BLOCK):
            b = min(a + _BLOCK, V)
            _load(logits_NV[n, a:b], x_V[: b - a])
            for i in range(b - a):
                top = max(top, x_V[i])
        total = 0.0
        for a in range(0, V, _BLOCK):
            b = min(a + _BLOCK, V)
            _load(logits_NV[n, a:b], x_V[: b - a])
            _exp_block(x_V[: b - a], top, exp_NV[n, a:b], scale_V[: b - a])
            part = _ZERO
            for i in range(a, b):
                part += exp_NV[n, i]
            total += part
        sum_N[n] = total
        logsumexp_N[n] = top + np.log(total)
    return sum_N, logsumexp_N


@numba.njit(cache=True, fastmath=_SUMMING, parallel=True)
def _compare_rows(clean_NV, exp_NV, logits_NV):  # type: ignore[no-untyped-def]
    N, V = clean_NV.shape
    gap_N = np.zeros(N)
    logsumexp_N = np.zeros(N)
    for n in numba.prange(N):
        clean_V = np.empty(_BLOCK, np.float32)
        x_V = np.empty(_BLOCK, np.float32)
        exp_V = np.empty(_BLOCK, np.float32)
        scale_V = np.empty(_BLOCK, np.float32)
        top = _LOWEST
        gap = 0.0
        for a in range(0, V, _BLOCK):
            b = min(a + _BLOCK, V)
            _load(clean_NV[n, a:b], clean_V[: b - a])
            _load(logits_NV[n, a:b], x_V[: b - a])
            part = _ZERO
            for i in range(b - a):
                top = max(top, x_V[i])
                part += exp_NV[n, a + i] * (clean_V[i] - x_V[i])
            gap += part
        total = 0.0
        for a in range(0, V, _BLOCK):
            b = min(a + _BLOCK, V)
            _load(logits_NV[n, a:b], x_V[: b - a])
            _exp_block(x_V[: b - a], top, exp_V[: b - a], scale_V[: b - a])
            part = _ZERO
            for i in range(b - a):
                part += exp_V[i]
            total += part
        gap_N[n] = gap
        logsumexp_N[n] = top + np.log(total)
    return gap_N, logsumexp_N
