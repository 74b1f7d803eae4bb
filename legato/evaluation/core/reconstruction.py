"""Core metrics: quality of the reconstruction, sparsity of the codes, loss of the language model.

All are per token over valid positions, sums in float64, divided once at the end.

Shape legend: B rows, L positions, N valid tokens, D width, F latents.
"""

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from torch import Tensor

from legato.common.errors import LegatoError
from legato.evaluation.core.splice import TokenLosses
from legato.evaluation.sums.accumulators import DENSE_RATE, CodeSums, Summed, firing_rate
from legato.evaluation.sums.lag_pairs import Floats

HISTOGRAM_EDGES = np.arange(-6.0, 0.01, 0.25)  # log10 firing rate


@dataclass(frozen=True)
class TokenErrors:
    """Per position, float64 [B, L]: ||x||^2, ||xhat||^2, x.xhat and ||x - xhat||^2."""

    square_in_BL: Floats
    square_out_BL: Floats
    dot_BL: Floats
    error_BL: Floats

    @classmethod
    def of(cls, acts_BLD: Tensor, reconstruction_BLD: Tensor) -> "TokenErrors":
        B, L, D = acts_BLD.shape
        x_ND, out_ND = (
            np.ascontiguousarray(acts.detach().cpu().float().numpy().reshape(B * L, D))
            for acts in (acts_BLD, reconstruction_BLD)
        )
        return cls(*(values_N.reshape(B, L) for values_N in _token_errors(x_ND, out_ND)))


@numba.njit(cache=True, parallel=True, fastmath={"reassoc", "contract"})
def _token_errors(x_ND, out_ND):  # type: ignore[no-untyped-def]
    N, D = x_ND.shape
    square_in_N, square_out_N, dot_N, error_N = np.zeros(N), np.zeros(N), np.zeros(N), np.zeros(N)
    for n in numba.prange(N):
        square_in = 0.0
        square_out = 0.0
        dot = 0.0
        error = 0.0
        for d in range(D):
            x = np.float64(x_ND[n, d])
            out = np.float64(out_ND[n, d])
            square_in += x * x
            square_out += out * out
            dot += x * out
            error += (x - out) * (x - out)
        square_in_N[n] = square_in
        square_out_N[n] = square_out
        dot_N[n] = dot
        error_N[n] = error
    return square_in_N, square_out_N, dot_N, error_N


@dataclass
class InputSums(Summed):
    """Sums over the activations themselves, shared by all SAEs judged on them.

    square: sum ||x||^2.  norm: sum ||x||.  total_D: sum x.  within_rows: sum over rows of sum ||x - row mean||^2.
    """

    total_D: Floats
    tokens: float = 0.0
    square: float = 0.0
    norm: float = 0.0
    within_rows: float = 0.0

    @classmethod
    def zero(cls, width: int) -> "InputSums":
        return cls(np.zeros(width))

    def add(self, acts_BLD: Tensor, mask_BL: Tensor) -> None:
        """Raises LegatoError where a valid activation is not finite, or of another width than those before."""
        if acts_BLD.shape[-1] != len(self.total_D):
            raise LegatoError(f"activations of width {acts_BLD.shape[-1]} follow some of {len(self.total_D)}")
        x_BLD = acts_BLD.detach().cpu().double() * mask_BL[..., None].cpu()
        square_BL = x_BLD.square().sum(-1)
        total_BD = x_BLD.sum(1)
        tokens_B = mask_BL.sum(1).double().cpu()
        square = float(square_BL.sum())
        if not np.isfinite(square):
            raise LegatoError("activations hold values that are not finite; harvest them again or in float32")
        self.tokens += float(tokens_B.sum())
        self.square += square
        self.norm += float(square_BL.sqrt().sum())
        self.total_D += total_BD.sum(0).numpy()
        self.within_rows += square - float((total_BD.square().sum(1) / tokens_B.clamp(min=1)).sum())

    @property
    def variance(self) -> float:
        """Sum ||x - mean||^2 with the global mean."""
        return self.square - float((self.total_D**2).sum()) / self.tokens


@dataclass
class ReconstructionSums(Summed):
    """Sums over the reconstructions of one SAE. cosine_tokens: tokens where input and output are both non-zero."""

    tokens: float = 0.0
    error: float = 0.0
    square: float = 0.0
    norm: float = 0.0
    ratio: float = 0.0
    dot: float = 0.0
    cosine: float = 0.0
    cosine_tokens: float = 0.0

    def add(self, errors: TokenErrors, mask_BL: Tensor) -> None:
        """Raises LegatoError where a reconstruction at a valid position is not finite."""
        mask = mask_BL.cpu().numpy()
        error_N, dot_N = errors.error_BL[mask], errors.dot_BL[mask]
        norm_in_N, norm_out_N = np.sqrt(errors.square_in_BL[mask]), np.sqrt(errors.square_out_BL[mask])
        if not np.isfinite(error_N).all():
            raise LegatoError("the SAE's reconstruction is not finite; its weights are damaged or training diverged")
        both_N = (norm_in_N > 0) & (norm_out_N > 0)
        self.tokens += float(error_N.size)
        self.error += float(error_N.sum())
        self.square += float((norm_out_N**2).sum())
        self.norm += float(norm_out_N.sum())
        self.ratio += float((norm_out_N[norm_in_N > 0] / norm_in_N[norm_in_N > 0]).sum())
        self.dot += float(dot_N.sum())
        self.cosine += float((dot_N[both_N] / (norm_in_N[both_N] * norm_out_N[both_N])).sum())
        self.cosine_tokens += float(both_N.sum())


@dataclass
class SpliceSums(Summed):
    """Sums of per-token losses with the SAE's reconstruction spliced in, with zero ablation, and of the clean model."""

    ce_tokens: float = 0.0
    kl_tokens: float = 0.0
    ce_clean: float = 0.0
    ce_sae: float = 0.0
    ce_ablation: float = 0.0
    kl_sae: float = 0.0
    kl_ablation: float = 0.0

    def add(
        self, clean: TokenLosses, sae: TokenLosses, ablation: TokenLosses, ce_N: np.ndarray, kl_N: np.ndarray
    ) -> None:
        """Add tokens. ce_N, kl_N: bool, tokens whose loss, and tokens whose divergence counts."""
        self.ce_tokens += float(ce_N.sum())
        self.kl_tokens += float(kl_N.sum())
        self.ce_clean += float(clean.ce_N[ce_N].sum())
        self.ce_sae += float(sae.ce_N[ce_N].sum())
        self.ce_ablation += float(ablation.ce_N[ce_N].sum())
        self.kl_sae += float(sae.kl_N[kl_N].sum())
        self.kl_ablation += float(ablation.kl_N[kl_N].sum())


def reconstruction_metrics(inputs: InputSums, sums: ReconstructionSums) -> dict[str, float | None]:
    """Compute fvu = sum ||x - xhat||^2 / sum ||x - mean||^2, global mean: 0 is perfect, 1 is no better than the mean.

    explained_variance = 1 - fvu; explained_variance_within_sequence takes each row's own mean instead (FVE of
    temporal-saes). relative_reconstruction_bias = E||xhat||^2 / E x.xhat (arXiv 2404.16014, eq. 10). None where
    undefined.
    """
    if inputs.variance <= 0:
        raise LegatoError("the activations do not vary: evaluate on text of more than one token")
    n = sums.tokens
    fvu = sums.error / inputs.variance
    return {
        "fvu": fvu,
        "explained_variance": 1.0 - fvu,
        "explained_variance_within_sequence": 1.0 - sums.error / inputs.within_rows if inputs.within_rows > 0 else None,
        "mse": sums.error / n / inputs.total_D.size,
        "cossim": sums.cosine / sums.cosine_tokens if sums.cosine_tokens else None,
        "l2_norm_in": inputs.norm / n,
        "l2_norm_out": sums.norm / n,
        "l2_ratio": sums.ratio / n,
        "relative_reconstruction_bias": sums.square / sums.dot if sums.dot > 0 else None,
    }


def sparsity_metrics(codes: CodeSums) -> dict[str, Any]:
    """Compute l0 and l1 per token, alive and dense latents, and a histogram of firing rates.

    frac_alive: latents that fired on any of alive_judged_on_tokens tokens. dense: latents with p > 0.1.
    density_histogram: latents per bin of log10 p, latents rarer than the first edge counted in the first bin.
    """
    n = codes.counts.n_tokens
    rate_F = firing_rate(codes)
    alive_F = rate_F > 0
    log_rate = np.clip(np.log10(rate_F[alive_F]), HISTOGRAM_EDGES[0], None)
    return {
        "l0": float(codes.firing.total_F.sum() / n),
        "l1": float(codes.value.total_F.sum() / n),
        "frac_alive": float(alive_F.mean()),
        "alive_judged_on_tokens": int(n),
        "dense": int((rate_F > DENSE_RATE).sum()),
        "density_histogram": {
            "log10_edges": [round(float(edge), 2) for edge in HISTOGRAM_EDGES],
            "latents": np.histogram(log_rate, HISTOGRAM_EDGES)[0].tolist(),
            "dead": int((~alive_F).sum()),
        },
    }


def splice_metrics(sums: SpliceSums) -> dict[str, Any]:
    """Compute mean next-token loss and KL(clean || spliced), in nats, and scores: 1 is lossless, 0 is zero ablation.

    ce_loss_score = (ablation - sae) / (ablation - clean); kl_div_score = (ablation - sae) / ablation.
    """
    if not sums.ce_tokens:
        raise LegatoError("no token to measure the language model's loss on: every next token is special or masked")
    gap = sums.ce_ablation - sums.ce_clean
    return {
        "ce_loss_without_sae": sums.ce_clean / sums.ce_tokens,
        "ce_loss_with_sae": sums.ce_sae / sums.ce_tokens,
        "ce_loss_with_ablation": sums.ce_ablation / sums.ce_tokens,
        "ce_loss_score": (sums.ce_ablation - sums.ce_sae) / gap if gap else None,
        "kl_div_with_sae": sums.kl_sae / sums.kl_tokens,
        "kl_div_with_ablation": sums.kl_ablation / sums.kl_tokens,
        "kl_div_score": (sums.kl_ablation - sums.kl_sae) / sums.kl_ablation if sums.kl_ablation else None,
        "ce_tokens": int(sums.ce_tokens),
    }
