"""Temporal consistency metrics: autocorrelation, kappa, their closed-form nulls, and numbers derived from them.

Two nulls answer two questions. Shuffling the values inside each document destroys order and keeps everything else, so
`real - within_null` is persistence of order. Shuffling across rows at a fixed position destroys all but the dependence
on position, so `real - cross_null` is persistence beyond position. Both expectations are exact, no sampling is
involved. A document is the part of it that lies in one row, so a change slower than a context counts as null (the
cautious choice).

Shape legend: F latents, K lags, L positions.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from legato.evaluation.sums.accumulators import (
    DENSE_RATE,
    ROUNDING,
    CodeSums,
    PairCounts,
    PairSums,
    firing_rate,
    share_between_groups,
)
from legato.evaluation.sums.lag_pairs import Floats

RATE_BINS = ((1e-4, 1e-3), (1e-3, 1e-2), (1e-2, 1e-1))


@dataclass(frozen=True)
class Persistence:
    """Correlation at each lag and under each null, NaN where undefined (no variance, no pairs)."""

    lags: tuple[int, ...]
    real_FK: Floats
    within_null_FK: Floats
    cross_null_FK: Floats

    @property
    def by_suffix(self) -> dict[str, Floats]:
        """The correlations, their nulls and their excesses over these, by the suffix of their columns."""
        return {
            "": self.real_FK,
            "_within_null": self.within_null_FK,
            "_cross_null": self.cross_null_FK,
            "_excess_within": self.real_FK - self.within_null_FK,
            "_excess_cross": self.real_FK - self.cross_null_FK,
        }


def lag_correlation(counts: PairCounts, sums: PairSums) -> Persistence:
    """Compute corr(f_t, f_{t+lag}) over valid pairs, with the global mean and the global variance.

    On the on/off indicator this is kappa: where the left ends of the pairs fire at the global rate p it equals
    (P(on_{t+lag} | on_t) - p) / (1 - p). Global centring makes the statistic linear in the pair sums, hence the nulls
    exact: both shuffles keep the global mean and variance, and
      within: E sum f_t f_{t+lag} = sum over stretches of pairs (S^2 - Q) / (n (n - 1))
      cross:  E sum f_t f_{t+lag} = sum over positions of pairs(t, t + lag) r_t r_{t+lag}, r_t: mean over
      rows valid at t.
    """
    n = counts.n_tokens
    n_pairs_K = counts.pairs_K
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_F1 = (sums.total_F / n)[:, None]
        mean_square_F1 = (sums.square_F / n)[:, None]
        variance_F1 = mean_square_F1 - mean_F1**2
        variance_F1[variance_F1 <= ROUNDING * mean_square_F1] = np.nan
        r_FL = np.divide(sums.at_FL, counts.tokens_L, out=np.zeros_like(sums.at_FL), where=counts.tokens_L > 0)

        def correlation(product_FK: Floats, ends_FK: Floats) -> Floats:
            return ((product_FK - mean_F1 * ends_FK) / n_pairs_K + mean_F1**2) / variance_F1

        cross_product_FK, cross_ends_FK = np.zeros_like(sums.product_FK), np.zeros_like(sums.product_FK)
        for k, lag in enumerate(counts.lags):
            pairs_T = counts.pairs_KL[k, :-lag]
            cross_product_FK[:, k] = (r_FL[:, :-lag] * r_FL[:, lag:]) @ pairs_T
            cross_ends_FK[:, k] = (r_FL[:, :-lag] + r_FL[:, lag:]) @ pairs_T
        return Persistence(
            counts.lags,
            correlation(sums.product_FK, sums.ends_FK),
            correlation(sums.shuffled_product_FK, sums.shuffled_ends_FK),
            correlation(cross_product_FK, cross_ends_FK),
        )


def half_life(lags: tuple[int, ...], ac_FK: Floats) -> tuple[Floats, np.ndarray]:
    """Find the first lag where the autocorrelation is below AC(0) / 2 = 0.5, linear between measured lags.

    Returns (half_life_F in tokens, censored_F). Where it never falls below one half the largest measured lag is
    returned and censored is True. NaN where the autocorrelation is undefined.
    """
    measured_K = np.isfinite(ac_FK).any(0)
    defined_F = np.isfinite(ac_FK[:, measured_K]).all(1) & measured_K.any()
    half_life_F, censored_F = np.full(defined_F.size, np.nan), np.zeros(defined_F.size, bool)
    lags_M = np.concatenate([[0.0], np.asarray(lags, np.float64)[measured_K]])
    ac_GK = ac_FK[defined_F][:, measured_K]
    ac_GM = np.concatenate([np.ones((len(ac_GK), 1)), ac_GK], 1)
    below_GM = ac_GM < 0.5
    falls_G = below_GM.any(1)
    at_G = np.where(falls_G, below_GM.argmax(1), 1)
    before_G, after_G = (np.take_along_axis(ac_GM, at[:, None], 1)[:, 0] for at in (at_G - 1, at_G))
    drop_G = np.where(falls_G, before_G - after_G, 1.0)
    crossing_G = lags_M[at_G - 1] + (before_G - 0.5) / drop_G * (lags_M[at_G] - lags_M[at_G - 1])
    half_life_F[defined_F] = np.where(falls_G, crossing_G, lags_M[-1])
    censored_F[defined_F] = ~falls_G
    return half_life_F, censored_F


def run_length_ratio(sums: CodeSums) -> Floats:
    """Compute the mean length of a run of on positions, over 1 / (1 - p), its value for independent firing."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums.firing.total_F / sums.runs_F * (1.0 - firing_rate(sums))


def switching_ratio(sums: CodeSums) -> Floats:
    """Compute the share of adjacent pairs that switch, over 2 p (1 - p), its value for independent firing."""
    k = _adjacent(sums)
    p_F = firing_rate(sums)
    with np.errstate(invalid="ignore", divide="ignore"):
        # ends counts each on end once; a pair that is on at both ends does not switch
        switches_F = sums.firing.ends_FK[:, k] - 2.0 * sums.firing.product_FK[:, k]
        ratio_F = switches_F / sums.counts.pairs_K[k] / (2.0 * p_F * (1.0 - p_F))
    return np.where((p_F > 0) & (p_F < 1), ratio_F, np.nan)


def jaccard(sums: CodeSums) -> tuple[float | None, float | None]:
    """Return (Jaccard index of adjacent tokens' supports, its value for independent latents of the same firing rates).

    Pooled over pairs, sum |A and B| / sum |A or B|; the null is sum p^2 / sum (2 p - p^2). None where nothing fires.
    """
    k = _adjacent(sums)
    both, ends = sums.firing.product_FK[:, k].sum(), sums.firing.ends_FK[:, k].sum()
    p_F = firing_rate(sums)
    null_union = (2.0 * p_F - p_F**2).sum()
    return _ratio(both, ends - both), _ratio((p_F**2).sum(), null_union)


def sequence_l0(sums: CodeSums) -> float | None:
    """Count the distinct latents that fire in a row of valid positions, mean over rows."""
    return _ratio(sums.rows_F.sum(), sums.n_rows)


def smoothness(sums: CodeSums) -> float | None:
    """Compute T-SAE smoothness S, lower is smoother (AI4LIFE-GROUP/temporal-saes, `lipschitz_cont`; arXiv 2511.05541).

    max over adjacent tokens of |f_t - f_{t-1}| / ||x_t - x_{t-1}||, mean over the latents that fire in the row, mean
    over rows. It scales with f and falls when codes shrink: compare it with published numbers, but never use it
    alone. None where the raw activations were not given.
    """
    return _ratio(sums.steepest_F.sum(), sums.n_rows_with_steps)


def document_eta2(sums: CodeSums) -> Floats:
    """Compute the share of a latent's variance that lies between documents (stretches), bias-corrected."""
    return share_between_groups(sums, sums.between_F, sums.n_stretches)


def consistency_features(sums: CodeSums) -> dict[str, np.ndarray]:
    """Return per-latent columns; NaN where a quantity is undefined for the latent (it never fires, or never stops)."""
    ac, kappa = lag_correlation(sums.counts, sums.value), lag_correlation(sums.counts, sums.firing)
    columns: dict[str, np.ndarray] = {}
    for name, measured in (("ac", ac), ("kappa", kappa)):
        series = measured.by_suffix
        for k, lag in enumerate(measured.lags):
            columns |= {f"{name}{lag}{suffix}": values_FK[:, k] for suffix, values_FK in series.items()}
    columns["half_life"], columns["half_life_censored"] = half_life(ac.lags, ac.real_FK)
    columns["run_length_ratio"] = run_length_ratio(sums)
    if 1 in sums.counts.lags:
        columns["switching_ratio"] = switching_ratio(sums)
    columns["document_eta2"] = document_eta2(sums)
    return columns


def consistency_metrics(sums: CodeSums) -> dict[str, Any]:
    """Average over latents; keys as in metrics.json. Plain floats and lists; None where a value is undefined.

    Means are over alive latents (those that fire in the evaluated text), `*_weighted` are weighted by firing counts,
    and `by_rate_bin` repeats the means within bins of the firing rate, dense latents (p > 0.1) last.
    """
    columns = consistency_features(sums)
    count_F = sums.firing.total_F
    alive_F = count_F > 0
    lags = sums.counts.lags
    result: dict[str, Any] = {"lags": list(lags), "latents": int(alive_F.sum())}
    for name in ("ac", "kappa"):
        result[name] = {
            key: [mean(columns[f"{name}{lag}{suffix}"], alive_F) for lag in lags]
            for key, suffix in (("mean", ""), ("within_null", "_within_null"), ("cross_null", "_cross_null"))
        }
        for null in ("within", "cross"):
            per_lag = [columns[f"{name}{lag}_excess_{null}"] for lag in lags]
            result[f"{name}_excess_{null}"] = [mean(column, alive_F) for column in per_lag]
            result[f"{name}_excess_{null}_weighted"] = [mean(column, alive_F, count_F) for column in per_lag]
        for suffix in ("", "_within_null", "_cross_null", "_excess_within", "_excess_cross"):
            if 1 in lags:
                result[f"{name}1{suffix}"] = mean(columns[f"{name}1{suffix}"], alive_F)
                result[f"{name}1{suffix}_weighted"] = mean(columns[f"{name}1{suffix}"], alive_F, count_F)
    result["by_rate_bin"] = _by_rate_bin(columns, firing_rate(sums), lags)
    result["rare_latents"] = int((alive_F & (firing_rate(sums) < RATE_BINS[0][0])).sum())
    defined_F = np.isfinite(columns["half_life"])
    result["half_life_median"] = float(np.median(columns["half_life"][defined_F])) if defined_F.any() else None
    result["half_life_censored_share"] = _ratio(columns["half_life_censored"].sum(), defined_F.sum())
    result["run_length_ratio"] = mean(columns["run_length_ratio"], alive_F)
    if 1 in lags:
        result["switching_ratio"] = mean(columns["switching_ratio"], alive_F)
        result["jaccard"], result["jaccard_null"] = jaccard(sums)
        result["jaccard_ratio"] = _ratio(result["jaccard"], result["jaccard_null"])
    result["sequence_l0"] = sequence_l0(sums)
    result["smoothness"] = smoothness(sums)
    result["document_eta2"] = mean(columns["document_eta2"], alive_F)
    return result


def raw_stream_metrics(counts: PairCounts, sums: PairSums) -> dict[str, Any]:
    """Average autocorrelation and nulls of the raw stream over dimensions, as a yardstick for the codes."""
    series = lag_correlation(counts, sums).by_suffix
    means = {suffix: [mean(column_F) for column_F in values_FK.T] for suffix, values_FK in series.items()}
    return {"lags": list(counts.lags), "ac": {suffix[1:] or "mean": values for suffix, values in means.items()}}


def mean(values_F: np.ndarray, chosen_F: np.ndarray | bool = True, weight_F: np.ndarray | None = None) -> float | None:
    """Average the finite chosen values; None where there are none."""
    use_F = chosen_F & np.isfinite(values_F)
    if not use_F.any():
        return None
    return float(np.average(values_F[use_F], weights=None if weight_F is None else weight_F[use_F]))


def finite_or_none(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def rate_bins(rate_F: Floats) -> list[tuple[tuple[float, float], np.ndarray]]:
    """Return ((low, high), latents in it) of each bin of the firing rate, dense latents last. An edge belongs to the
    bin above it, but p = .1 is not dense yet."""
    chosen = [((low, high), (rate_F >= low) & (rate_F < high)) for low, high in RATE_BINS[:-1]]
    low, high = RATE_BINS[-1]
    return [*chosen, ((low, high), (rate_F >= low) & (rate_F <= high)), ((DENSE_RATE, 1.0), rate_F > DENSE_RATE)]


def _by_rate_bin(columns: dict[str, np.ndarray], rate_F: Floats, lags: tuple[int, ...]) -> list[dict[str, Any]]:
    names = [
        f"{name}{lags[0]}{suffix}" for name in ("ac", "kappa") for suffix in ("", "_excess_within", "_excess_cross")
    ]
    return [
        {
            "bin": [low, high],
            "latents": int(in_bin_F.sum()),
            **{name: mean(columns[name], in_bin_F) for name in names},
            "half_life": mean(columns["half_life"], in_bin_F),
        }
        for (low, high), in_bin_F in rate_bins(rate_F)
    ]


def _adjacent(sums: CodeSums) -> int:
    if 1 not in sums.counts.lags:
        raise ValueError("lag 1 was not measured")
    return sums.counts.lags.index(1)


def _ratio(numerator: float | None, denominator: float | None) -> float | None:
    return float(numerator) / float(denominator) if numerator is not None and denominator else None
