"""Metrics as pure functions on dense codes, by the same code that judges SAEs in `legato.evaluate`.

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
from legato.evaluation.sums.lag_pairs import DEFAULT_LAGS, LagPairs, pairs_by_latent, step_norms
from legato.sae.codes import SparseCodes
from legato.sae.kernels.pairs import PairsByLatent

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
        """Persistence of order, which shuffling inside documents destroys."""
        return self.real - self.within_null

    @property
    def excess_cross(self) -> Tensor:
        """Persistence beyond position, which shuffling across rows at fixed position destroys."""
        return self.real - self.cross_null


def autocorrelation(
    codes_BLF: Tensor, mask_BL: Tensor, doc_BL: Tensor | None = None, *, lags: Sequence[int] = DEFAULT_LAGS
) -> Correlations:
    """Compute corr(f_t, f_{t+lag}) of the codes, centred globally, with both nulls in closed form.

    >>> codes, mask = torch.tensor([[[2.0], [2], [0], [0]]]), torch.ones(1, 4, dtype=torch.bool)
    >>> found = autocorrelation(codes, mask, lags=(1, 2))  # deviations 1, 1, -1, -1
    >>> [[round(value, 4) for value in latent] for latent in found.real.tolist()]  # (1 - 1 + 1) / 3 and (-1 - 1) / 2
    [[0.3333, -1.0]]
    >>> [[round(value, 4) for value in latent] for latent in found.within_null.tolist()]  # -1 / (n - 1) in any order
    [[-0.3333, -0.3333]]
    """
    sums = _sums(codes_BLF, mask_BL, doc_BL, lags)
    return _correlations(consistency.lag_correlation(sums.counts, sums.value))


def kappa(
    codes_BLF: Tensor, mask_BL: Tensor, doc_BL: Tensor | None = None, *, lags: Sequence[int] = DEFAULT_LAGS
) -> Correlations:
    """Compute the autocorrelation of firing: (P(on_{t+lag} | on_t) - p) / (1 - p) for a stationary latent.

    >>> codes, mask = torch.tensor([[[7.0], [3], [0], [0]]]), torch.ones(1, 4, dtype=torch.bool)
    >>> kappa(codes, mask, lags=(2,)).real.tolist()  # on where it is off two tokens later, and the reverse
    [[-1.0]]
    """
    sums = _sums(codes_BLF, mask_BL, doc_BL, lags)
    return _correlations(consistency.lag_correlation(sums.counts, sums.firing))


def half_life(
    codes_BLF: Tensor, mask_BL: Tensor, doc_BL: Tensor | None = None, *, lags: Sequence[int] = DEFAULT_LAGS
) -> tuple[Tensor, Tensor]:
    """Return (tokens until the autocorrelation falls below 1/2 [F], censored at the largest lag [F] bool).

    >>> codes, mask = torch.tensor([[[2.0], [2], [0], [0]]]), torch.ones(1, 4, dtype=torch.bool)
    >>> tokens, censored = half_life(codes, mask, lags=(1, 2))  # 1 at lag 0, 1/3 at lag 1: 1/2 at lag 0.75
    >>> round(tokens.item(), 4), censored.item()
    (0.75, False)
    """
    correlations = autocorrelation(codes_BLF, mask_BL, doc_BL, lags=lags)
    half_life_F, censored_F = consistency.half_life(correlations.lags, correlations.real.numpy())
    return torch.from_numpy(half_life_F), torch.from_numpy(censored_F)


def firing_rate(codes_BLF: Tensor, mask_BL: Tensor) -> Tensor:
    """Compute the share of valid positions where each latent is on, [F].

    >>> firing_rate(torch.tensor([[[5.0, 0], [0, 0], [1, 0], [9, 9]]]), torch.tensor([[True, True, True, False]]))
    tensor([0.6667, 0.0000], dtype=torch.float64)
    """
    return torch.from_numpy(accumulators.firing_rate(_sums(codes_BLF, mask_BL)))


def run_length_ratio(codes_BLF: Tensor, mask_BL: Tensor, doc_BL: Tensor | None = None) -> Tensor:
    """Compute the mean run of consecutive on positions over 1 / (1 - p), [F].

    >>> codes, mask = torch.tensor([[[1.0], [1], [0], [0]]]), torch.ones(1, 4, dtype=torch.bool)
    >>> run_length_ratio(codes, mask)  # one run of 2; p = 1/2, so 2 is expected by chance
    tensor([1.], dtype=torch.float64)
    """
    return torch.from_numpy(consistency.run_length_ratio(_sums(codes_BLF, mask_BL, doc_BL)))


def switching_ratio(codes_BLF: Tensor, mask_BL: Tensor, doc_BL: Tensor | None = None) -> Tensor:
    """Compute the share of adjacent pairs that switch over 2 p (1 - p), [F].

    >>> codes, mask = torch.tensor([[[1.0], [1], [0], [0]]]), torch.ones(1, 4, dtype=torch.bool)
    >>> switching_ratio(codes, mask)  # 1 of 3 pairs switches; p = 1/2, so 1 of 2 is expected by chance
    tensor([0.6667], dtype=torch.float64)
    """
    return torch.from_numpy(consistency.switching_ratio(_sums(codes_BLF, mask_BL, doc_BL)))


def jaccard(codes_BLF: Tensor, mask_BL: Tensor, doc_BL: Tensor | None = None) -> tuple[float | None, float | None]:
    """Return (Jaccard index of adjacent tokens' supports, its value for independent latents of the same rates).

    >>> codes, mask = torch.tensor([[[1.0], [1], [0], [0]]]), torch.ones(1, 4, dtype=torch.bool)
    >>> jaccard(codes, mask)  # on at both ends of 1 pair, at either end of 2; p^2 / (2 p - p^2) = 1/3
    (0.5, 0.3333333333333333)
    """
    return consistency.jaccard(_sums(codes_BLF, mask_BL, doc_BL))


def sequence_l0(codes_BLF: Tensor, mask_BL: Tensor) -> float | None:
    """Count the distinct latents that fire per row.

    >>> codes = torch.tensor([[[1.0, 0, 0], [1, 0, 2]], [[0, 0, 0], [0, 3, 0]]])
    >>> sequence_l0(codes, torch.ones(2, 2, dtype=torch.bool))  # 2 in the first row, 1 in the second
    1.5
    """
    return consistency.sequence_l0(_sums(codes_BLF, mask_BL))


def smoothness(codes_BLF: Tensor, acts_BLD: Tensor, mask_BL: Tensor, doc_BL: Tensor | None = None) -> float | None:
    """Compute T-SAE smoothness S of codes against the raw activations acts_BLD; scales with the codes.

    >>> codes, acts = torch.tensor([[[1.0], [3], [2]]]), torch.tensor([[[0.0, 0], [0, 1], [0, 3]]])
    >>> smoothness(codes, acts, torch.ones(1, 3, dtype=torch.bool))  # the steeper of 2 / 1 and 1 / 2
    2.0
    """
    return consistency.smoothness(_sums(codes_BLF, mask_BL, doc_BL, step_BL=step_norms(acts_BLD)))


def document_eta2(codes_BLF: Tensor, mask_BL: Tensor, doc_BL: Tensor | None = None) -> Tensor:
    """Compute the share of each latent's variance that lies between documents, bias-corrected, [F].

    >>> codes, mask = torch.tensor([[[1.0], [1], [0], [0]]]), torch.ones(1, 4, dtype=torch.bool)
    >>> document_eta2(codes, mask, torch.tensor([[0, 0, 1, 1]]))  # all of it: no variance inside a document
    tensor([1.], dtype=torch.float64)
    """
    return torch.from_numpy(consistency.document_eta2(_sums(codes_BLF, mask_BL, doc_BL)))


def eta2(codes_BLF: Tensor, mask_BL: Tensor) -> Tensor:
    """Compute the share of each latent's variance explained by position, bias-corrected, [F].

    >>> codes = torch.tensor([[[1.0, 1], [0, 0]], [[1, 0], [0, 1]]])
    >>> eta2(codes, torch.ones(2, 2, dtype=torch.bool))  # SSB 1 and 0, SSW 0 and 1, (SSB - SSW / 2) / SST
    tensor([ 1.0000, -0.5000], dtype=torch.float64)
    """
    return torch.from_numpy(position.eta2(_sums(codes_BLF, mask_BL)))


def mutual_information(codes_BLF: Tensor, mask_BL: Tensor) -> Tensor:
    """Compute the mutual information of firing and position in nats, Miller-Madow corrected, [F].

    >>> codes = torch.tensor([[[1.0], [0]]]).expand(4, 2, 1)  # log 2, less (2 - 2 - 2 + 1) / 16
    >>> mutual_information(codes, torch.ones(4, 2, dtype=torch.bool))
    tensor([0.7556], dtype=torch.float64)
    """
    return torch.from_numpy(position.mutual_information(_sums(codes_BLF, mask_BL)))


def token_information(codes_BLF: Tensor, tokens_BL: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Return (mutual information of firing and the token's id in nats, Miller-Madow corrected [F]; share of the entropy
    of firing that the token explains beyond chance [F]).

    >>> codes, tokens = torch.tensor([[[1.0], [0]]]).expand(4, 2, 1), torch.tensor([[5, 7]]).expand(4, 2)
    >>> token_information(codes, tokens, torch.ones(4, 2, dtype=torch.bool))  # on at token 5, off at token 7
    (tensor([0.7556], dtype=torch.float64), tensor([1.], dtype=torch.float64))
    """
    layout, order = _laid_out(codes_BLF, mask_BL)
    counts = TokenCounts(codes_BLF.shape[2])
    counts.add(tokens_BL, layout, order)
    information = information_of(counts)
    return torch.from_numpy(information.miller_madow_F), torch.from_numpy(information.adjusted_F)


def burstiness(codes_BLF: Tensor, mask_BL: Tensor, doc_BL: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return (burstiness of the gaps between firings inside a document [F], that of shuffled firings [F]).

    >>> codes = torch.tensor([[[1.0], [0], [1], [0], [1]]])  # gaps 2 and 2; shuffled: mean 6 / 4, variance .45
    >>> burstiness(codes, torch.ones(1, 5, dtype=torch.bool))
    (tensor([-1.], dtype=torch.float64), tensor([-0.3820], dtype=torch.float64))
    """
    layout, order = _laid_out(codes_BLF, mask_BL, doc_BL)
    sums = GapSums.zero(codes_BLF.shape[2])
    sums.add(layout, order)
    real_F, null_F = gap_burstiness(sums)
    return torch.from_numpy(real_F), torch.from_numpy(null_F)


def position_profile(codes_BLF: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the firing rate by position with its 95 % Wilson interval: (rate, low, high), each [F, L].

    >>> codes = torch.tensor([[[1.0], [0]], [[1], [2]]])
    >>> rate, low, high = position_profile(codes, torch.ones(2, 2, dtype=torch.bool))
    >>> rate
    tensor([[1.0000, 0.5000]], dtype=torch.float64)
    >>> low  # of 2 in 2: 1 / (1 + 1.96^2 / 2)
    tensor([[0.3424, 0.0945]], dtype=torch.float64)
    """
    rate_FL, low_FL, high_FL = position.position_profile(_sums(codes_BLF, mask_BL))
    return torch.from_numpy(rate_FL), torch.from_numpy(low_FL), torch.from_numpy(high_FL)


def position_matrix(codes_BLF: Tensor, mask_BL: Tensor, doc_BL: Tensor | None = None) -> Tensor:
    """Average over latents the correlation over rows of f_t and f_t', [L, L].

    >>> codes = torch.tensor([[[1.0], [0]], [[0], [1]]])  # on at either position, never at both
    >>> position_matrix(codes, torch.ones(2, 2, dtype=torch.bool))
    tensor([[ 1., -1.],
            [-1.,  1.]], dtype=torch.float64)
    """
    return torch.from_numpy(position.position_matrix(*_laid_out(codes_BLF, mask_BL, doc_BL)))


def agreement(codes_BLF: Tensor, other_BLF: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compare two readings of the same tokens, as in the offset test. Return (Jaccard index of each token's two
    supports [B, L], cosine of its two codes [B, L], Jaccard index of the tokens on which a latent fires [F]).

    >>> codes, other = torch.tensor([[[3.0, 4], [0, 1]]]), torch.tensor([[[3.0, 0], [0, 2]]])
    >>> tokens, cosines, latents = agreement(codes, other, torch.ones(1, 2, dtype=torch.bool))
    >>> tokens.tolist(), latents.tolist()  # of 2 latents 1 is common, of 1 all; of tokens 1 of 1, 1 of 2
    ([[0.5, 1.0]], [1.0, 0.5])
    >>> cosines  # 9 / (5 * 3) and 2 / (1 * 2)
    tensor([[0.6000, 1.0000]], dtype=torch.float64)
    """
    found = Agreement.of(_sparse(codes_BLF, mask_BL), _sparse(other_BLF, mask_BL))
    by_token = [torch.from_numpy(values_N).view(mask_BL.shape) for values_N in (found.jaccard_N, found.cosine_N)]
    return by_token[0], by_token[1], torch.from_numpy(found.jaccard_F)


def sparsity(codes_BLF: Tensor, mask_BL: Tensor) -> dict[str, Any]:
    """Compute l0, l1, frac_alive, dense, density_histogram; keys as in `core` of metrics.json.

    >>> found = sparsity(torch.tensor([[[1.0, 0, 0], [2, 3, 0]]]), torch.ones(1, 2, dtype=torch.bool))
    >>> found["l0"], found["l1"], round(found["frac_alive"], 4), found["dense"]  # 3 / 2, 6 / 2, 2 / 3; p 1 and 1/2
    (1.5, 3.0, 0.6667, 2)
    """
    return sparsity_metrics(_sums(codes_BLF, mask_BL))


def reconstruction(acts_BLD: Tensor, reconstruction_BLD: Tensor, mask_BL: Tensor) -> dict[str, float | None]:
    """Compute fvu, explained_variance, cossim, l2_ratio, ...; keys as in `core` of metrics.json.

    >>> acts, out = torch.tensor([[[3.0, 0], [-3, 0]]]), torch.tensor([[[3.0, 0], [-2, 0]]])
    >>> found = reconstruction(acts, out, torch.ones(1, 2, dtype=torch.bool))
    >>> round(found["fvu"], 4), found["cossim"], round(found["l2_ratio"], 4)  # 1 / 18; parallel; (1 + 2/3) / 2
    (0.0556, 1.0, 0.8333)
    """
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
    sums = CodeSums.zero(codes_BLF.shape[2], codes_BLF.shape[1], lags)
    sums.add(*_laid_out(codes_BLF, mask_BL, doc_BL, lags), step_BL)
    return sums


def _laid_out(
    codes_BLF: Tensor, mask_BL: Tensor, doc_BL: Tensor | None = None, lags: Sequence[int] = (1,)
) -> tuple[LagPairs, PairsByLatent]:
    layout = LagPairs.of(mask_BL, doc_BL, lags)
    return layout, pairs_by_latent(_sparse(codes_BLF, mask_BL), layout)


def _correlations(measured: consistency.Persistence) -> Correlations:
    series = (measured.real_FK, measured.within_null_FK, measured.cross_null_FK)
    return Correlations(measured.lags, *(torch.from_numpy(np.ascontiguousarray(values_FK)) for values_FK in series))
