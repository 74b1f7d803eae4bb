"""Each metric as a pure function on dense codes, by the same code that judges SAEs in `legato.evaluate`.

codes_BLF: codes of B rows, L positions, F latents, >= 0, rescaled by the decoder norm where there is one.
mask_BL: bool, valid positions. doc_BL: document numbers, None where every row is one document.
Pairs (t, t + lag) count where both ends are valid and of one document in the same row. Results are float64 tensors or
floats, NaN or None where a quantity is undefined (a latent that never fires). Definitions and sources: the functions in
legato/evaluation that each of these calls.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from legato.evaluation.consistency import persistence as consistency
from legato.evaluation.core.reconstruction import (
    InputSums,
    ReconstructionSums,
    TokenErrors,
    reconstruction_metrics,
    sparsity_metrics,
)
from legato.evaluation.latents.burstiness import GapSums
from legato.evaluation.latents.burstiness import burstiness as gap_burstiness
from legato.evaluation.latents.tokens import TokenCounts
from legato.evaluation.latents.tokens import token_information as information_of
from legato.evaluation.position import attachment as position
from legato.evaluation.position.shift_test import Agreement
from legato.evaluation.sums import accumulators
from legato.evaluation.sums.accumulators import CodeSums
from legato.evaluation.sums.lag_pairs import DEFAULT_LAGS, LagPairs, pairs_by_latent
from legato.sae.codes import SparseCodes

__all__ = [
    "Correlations",
    "agreement",
    "autocorrelation",
    "burstiness",
    "document_eta2",
    "eta2",
    "firing_rate",
    "half_life",
    "jaccard",
    "kappa",
    "mutual_information",
    "position_matrix",
    "position_profile",
    "reconstruction",
    "run_length_ratio",
    "sequence_l0",
    "smoothness",
    "sparsity",
    "switching_ratio",
    "token_information",
]


class Correlations(NamedTuple):
    """Correlation at each lag and its two nulls, each [F, K]."""

    lags: tuple[int, ...]
    real: Tensor
    within_null: Tensor
    cross_null: Tensor

    @property
    def excess_within(self) -> Tensor:
        """Persistence of order: what shuffling inside documents destroys."""
        return self.real - self.within_null

    @property
    def excess_cross(self) -> Tensor:
        """Persistence beyond position: what shuffling across rows at fixed position destroys."""
        return self.real - self.cross_null


def autocorrelation(
    codes_BLF: Tensor, mask_BL: Tensor, doc_BL: Tensor | None = None, *, lags: Sequence[int] = DEFAULT_LAGS
) -> Correlations:
    """corr(f_t, f_{t+lag}) of the codes, centred globally, with both nulls in closed form."""
    sums = _sums(codes_BLF, mask_BL, doc_BL, lags)
    return _correlations(consistency.lag_correlation(sums.counts, sums.value))


def kappa(
    codes_BLF: Tensor, mask_BL: Tensor, doc_BL: Tensor | None = None, *, lags: Sequence[int] = DEFAULT_LAGS
) -> Correlations:
    """Autocorrelation of firing: (P(on_{t+lag} | on_t) - p) / (1 - p) for a stationary latent."""
    sums = _sums(codes_BLF, mask_BL, doc_BL, lags)
    return _correlations(consistency.lag_correlation(sums.counts, sums.firing))


def half_life(
    codes_BLF: Tensor, mask_BL: Tensor, doc_BL: Tensor | None = None, *, lags: Sequence[int] = DEFAULT_LAGS
) -> tuple[Tensor, Tensor]:
    """(tokens until the autocorrelation falls below 1/2 [F], censored at the largest lag [F] bool)."""
    correlations = autocorrelation(codes_BLF, mask_BL, doc_BL, lags=lags)
    half_life_F, censored_F = consistency.half_life(correlations.lags, correlations.real.numpy())
    return torch.from_numpy(half_life_F), torch.from_numpy(censored_F)


def firing_rate(codes_BLF: Tensor, mask_BL: Tensor) -> Tensor:
    """Share of valid positions where each latent is on, [F]."""
    return torch.from_numpy(accumulators.firing_rate(_sums(codes_BLF, mask_BL)))


def run_length_ratio(codes_BLF: Tensor, mask_BL: Tensor, doc_BL: Tensor | None = None) -> Tensor:
    """Mean run of consecutive on positions over 1 / (1 - p), [F]."""
    return torch.from_numpy(consistency.run_length_ratio(_sums(codes_BLF, mask_BL, doc_BL)))


def switching_ratio(codes_BLF: Tensor, mask_BL: Tensor, doc_BL: Tensor | None = None) -> Tensor:
    """Share of adjacent pairs that switch over 2 p (1 - p), [F]."""
    return torch.from_numpy(consistency.switching_ratio(_sums(codes_BLF, mask_BL, doc_BL)))


def jaccard(codes_BLF: Tensor, mask_BL: Tensor, doc_BL: Tensor | None = None) -> tuple[float | None, float | None]:
    """(Jaccard index of adjacent tokens' supports, its value for independent latents of the same rates)."""
    return consistency.jaccard(_sums(codes_BLF, mask_BL, doc_BL))


def sequence_l0(codes_BLF: Tensor, mask_BL: Tensor) -> float | None:
    """Distinct latents that fire per row."""
    return consistency.sequence_l0(_sums(codes_BLF, mask_BL))


def smoothness(codes_BLF: Tensor, acts_BLD: Tensor, mask_BL: Tensor, doc_BL: Tensor | None = None) -> float | None:
    """T-SAE smoothness S of codes against the raw activations acts_BLD; scales with the codes."""
    step_BL = torch.zeros(mask_BL.shape)
    step_BL[:, 1:] = (acts_BLD[:, 1:] - acts_BLD[:, :-1]).float().norm(dim=-1)
    return consistency.smoothness(_sums(codes_BLF, mask_BL, doc_BL, step_BL=step_BL))


def document_eta2(codes_BLF: Tensor, mask_BL: Tensor, doc_BL: Tensor | None = None) -> Tensor:
    """Share of each latent's variance that lies between documents, bias-corrected, [F]."""
    return torch.from_numpy(consistency.document_eta2(_sums(codes_BLF, mask_BL, doc_BL)))


def eta2(codes_BLF: Tensor, mask_BL: Tensor) -> Tensor:
    """Share of each latent's variance explained by position, bias-corrected, [F]."""
    return torch.from_numpy(position.eta2(_sums(codes_BLF, mask_BL)))


def mutual_information(codes_BLF: Tensor, mask_BL: Tensor) -> Tensor:
    """Mutual information of firing and position in nats, Miller-Madow corrected, [F]."""
    return torch.from_numpy(position.mutual_information(_sums(codes_BLF, mask_BL)))


def token_information(codes_BLF: Tensor, tokens_BL: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor]:
    """(mutual information of firing and the token's id in nats, Miller-Madow corrected [F]; share of the entropy of
    firing that the token tells beyond chance [F])."""
    layout = LagPairs.of(mask_BL, None, (1,))
    counts = TokenCounts.zero(codes_BLF.shape[2])
    counts.add(tokens_BL, layout, pairs_by_latent(_sparse(codes_BLF, mask_BL), layout))
    information = information_of(counts)
    return torch.from_numpy(information.miller_madow_F), torch.from_numpy(information.adjusted_F)


def burstiness(codes_BLF: Tensor, mask_BL: Tensor, doc_BL: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(burstiness of the gaps between firings inside a document [F], that of firings shuffled there [F])."""
    layout = LagPairs.of(mask_BL, doc_BL, (1,))
    sums = GapSums.zero(codes_BLF.shape[2])
    sums.add(layout, pairs_by_latent(_sparse(codes_BLF, mask_BL), layout))
    real_F, null_F = gap_burstiness(sums)
    return torch.from_numpy(real_F), torch.from_numpy(null_F)


def position_profile(codes_BLF: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Firing rate by position with its 95 % interval: (rate, low, high), each [F, L]."""
    rate_FL, low_FL, high_FL = position.position_profile(_sums(codes_BLF, mask_BL))
    return torch.from_numpy(rate_FL), torch.from_numpy(low_FL), torch.from_numpy(high_FL)


def position_matrix(codes_BLF: Tensor, mask_BL: Tensor, doc_BL: Tensor | None = None) -> Tensor:
    """Mean over latents of the correlation over rows of f_t and f_t', [L, L]."""
    layout = LagPairs.of(mask_BL, doc_BL, (1,))
    return torch.from_numpy(position.position_matrix(layout, pairs_by_latent(_sparse(codes_BLF, mask_BL), layout)))


def agreement(codes_BLF: Tensor, other_BLF: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How two readings of the same tokens agree, as in the offset test: (Jaccard index of each token's two supports
    [B, L], cosine of its two codes [B, L], Jaccard index of the tokens on which a latent fires [F])."""
    found = Agreement.of(_sparse(codes_BLF, mask_BL), _sparse(other_BLF, mask_BL))
    by_token = [torch.from_numpy(values_N).view(mask_BL.shape) for values_N in (found.jaccard_N, found.cosine_N)]
    return by_token[0], by_token[1], torch.from_numpy(found.jaccard_F)


def sparsity(codes_BLF: Tensor, mask_BL: Tensor) -> dict[str, Any]:
    """l0, l1, frac_alive, dense, density_histogram; keys as in `core` of metrics.json."""
    return sparsity_metrics(_sums(codes_BLF, mask_BL))


def reconstruction(acts_BLD: Tensor, reconstruction_BLD: Tensor, mask_BL: Tensor) -> dict[str, float | None]:
    """fvu, explained_variance, cossim, l2_ratio, ... of a reconstruction; keys as in `core` of metrics.json."""
    inputs, sums = InputSums.zero(acts_BLD.shape[-1]), ReconstructionSums()
    inputs.add(acts_BLD, mask_BL)
    sums.add(TokenErrors.of(acts_BLD, reconstruction_BLD), mask_BL)
    return reconstruction_metrics(inputs, sums)


def _sparse(codes_BLF: Tensor, mask_BL: Tensor) -> SparseCodes:
    return SparseCodes.from_dense(codes_BLF.detach() * mask_BL[..., None])


def _sums(
    codes_BLF: Tensor,
    mask_BL: Tensor,
    doc_BL: Tensor | None = None,
    lags: Sequence[int] = (1,),
    step_BL: Tensor | None = None,
) -> CodeSums:
    layout = LagPairs.of(mask_BL, doc_BL, lags)
    sums = CodeSums.zero(codes_BLF.shape[2], codes_BLF.shape[1], lags)
    sums.add(layout, pairs_by_latent(_sparse(codes_BLF, mask_BL), layout), step_BL)
    return sums


def _correlations(measured: consistency.Persistence) -> Correlations:
    real, within, cross = (
        torch.from_numpy(np.ascontiguousarray(values_FK))
        for values_FK in (measured.real_FK, measured.within_null_FK, measured.cross_null_FK)
    )
    return Correlations(measured.lags, real, within, cross)
