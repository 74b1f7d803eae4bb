"""Recovery of the planted sources by an SAE.

Shape legend: F planted sources, S latents of the SAE, N tokens, P active pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csc_array
from torch import Tensor

from legato.sae.codes import SparseCodes
from legato.sae.kernels import held_top
from legato.sae.protocol import EvaluableSAE
from legato.sae.segments import Segments
from legato.synthetic.bed import Bed, Rows

Floats = NDArray[np.float64]

ORACLE_ROWS = 24
_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class Match:
    """One latent for each source: latent_F (-1 where there are fewer latents than sources), score_F (0 there)."""

    latent_F: NDArray[np.intp]
    score_F: Floats

    @classmethod
    def best(cls, score_FS: Floats) -> "Match":
        """Find the one-to-one assignment with the largest sum of scores (Hungarian method); its mean score is the MCC,
        mean correlation coefficient (Hyvärinen & Morioka 2016)."""
        sources, latents = linear_sum_assignment(score_FS, maximize=True)
        latent_F = np.full(len(score_FS), -1)
        score_F = np.zeros(len(score_FS))
        latent_F[sources], score_F[sources] = latents, score_FS[sources, latents]
        return cls(latent_F, score_F)

    @property
    def mcc(self) -> float:
        return float(self.score_F.mean())


def decoder_cosine(directions_FD: Tensor, W_dec_SD: Tensor) -> Floats:
    """Compute |cosine| of every planted direction and every decoder row, [F, S]; 0 for a row of zeros."""
    rows = [torch.nn.functional.normalize(each.double(), dim=-1) for each in (directions_FD, W_dec_SD)]
    return (rows[0] @ rows[1].T).abs().numpy()


def code_correlation(planted: SparseCodes, learned: SparseCodes, mask_BL: Tensor) -> Floats:
    """Compute the Pearson correlation over valid tokens of every planted and learned code, [F, S]; 0 where one of them
    does not vary. Signed: a latent that is silent where the source fires has not found it."""
    tokens = mask_BL.reshape(-1).nonzero().flatten().numpy()
    n = len(tokens)
    matrices = []
    for codes in (planted, learned):
        at, (B, L, F) = (codes.token_P.numpy(), codes.latent_P.numpy()), codes.shape
        matrices.append(csc_array((codes.value_P.double().numpy(), at), shape=(B * L, F)).tocsr()[tokens])
    f, g = matrices
    covariance_FS = (f.T @ g).toarray() / n - np.outer(f.sum(0) / n, g.sum(0) / n)
    deviations = []
    for each in (f, g):
        mean_square = each.power(2).sum(0) / n
        variance = mean_square - (each.sum(0) / n) ** 2
        deviations.append(np.sqrt(np.where(variance > 1e-12 * mean_square, variance, np.inf)))
    return covariance_FS / np.outer(*deviations)


def encode(sae: EvaluableSAE, rows: Rows) -> SparseCodes:
    """Encode all rows of one side; codes are rescaled by decoder norms."""
    starts = range(0, rows.n_rows, _ROWS_AT_ONCE)
    parts = [sae.encode_sparse(rows.take(slice(start, start + _ROWS_AT_ONCE))) for start in starts]
    firsts = np.cumsum([0, *(part.shape[0] * part.shape[1] for part in parts[:-1])])
    return SparseCodes(
        torch.cat([part.token_P + int(first) for part, first in zip(parts, firsts, strict=True)]),
        torch.cat([part.latent_P for part in parts]),
        torch.cat([part.value_P for part in parts]),
        (rows.n_rows, parts[0].shape[1], parts[0].shape[2]),
    )


def chance_mcc(bed: Bed, d_sae: int, seed: int = 0) -> float:
    """Compute the MCC of a random dictionary, the value by chance."""
    generator = torch.Generator().manual_seed(seed)
    return Match.best(decoder_cosine(bed.directions_FD, torch.randn(d_sae, bed.config.d_in, generator=generator))).mcc


def found_by_true_directions(bed: Bed, k: int, release: float) -> dict[str, float]:
    """Measure how hard the bed is for any SAE: the share of planted firings that are on, with the true directions as
    encoder and k pairs on per token on average. single_token: above one threshold. held: with hysteresis."""
    batch = bed.held_out.take(slice(0, ORACLE_ROWS))
    layout = Segments.of(batch.mask_BL, batch.doc_BL)
    pre_NF = (batch.acts_BLD @ bed.directions_FD.T).flatten(0, 1) * torch.from_numpy(layout.valid_N)[:, None]
    planted_NF = bed.held_out.first_codes(len(batch.acts_BLD)).dense().flatten(0, 1) > 0
    token_P, source_P = (place.int().numpy() for place in (pre_NF > 0).nonzero(as_tuple=True))
    value_P, planted_P = (each_NF.numpy()[token_P, source_P] for each_NF in (pre_NF, planted_NF))
    budget = min(k * int(batch.mask_BL.sum()), len(value_P))

    def found(release: float) -> float:
        n_sources = pre_NF.shape[1]
        critical_P = held_top.critical_thresholds(layout.start_N, token_P, source_P, value_P, n_sources, release)
        cut = np.partition(critical_P, -budget)[-budget]
        return float(planted_P[critical_P >= cut].sum() / int(planted_NF.sum()))

    return {"single_token": found(1.0), "held": found(release)}


def bootstrap(
    values: Sequence[Floats], *, replicates: int = 1000, seed: int = 0, level: float = 0.95
) -> tuple[float, list[float]]:
    """Return (mean, [low, high]) of values grouped by seed, no group empty: seeds are drawn with replacement, then
    sources inside each."""
    rng = np.random.default_rng(seed)
    n_seeds = len(values)
    drawn = rng.integers(n_seeds, size=(replicates, n_seeds))
    means_RS = np.empty(drawn.shape)
    for i, values_F in enumerate(values):
        picks = drawn == i
        sources = rng.integers(len(values_F), size=(int(picks.sum()), len(values_F)))
        means_RS[picks] = values_F[sources].mean(1)
    low, high = np.quantile(means_RS.mean(1), [(1 - level) / 2, (1 + level) / 2])
    return float(np.mean([values_F.mean() for values_F in values])), [float(low), float(high)]
