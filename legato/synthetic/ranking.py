"""Rank correlations of metrics with planted properties, which show the metrics that are misled.

Shape legend: F sources or latents.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from legato.evaluation.consistency.persistence import consistency_features
from legato.evaluation.position.attachment import position_features
from legato.evaluation.sums.accumulators import CodeSums, firing_rate
from legato.evaluation.sums.lag_pairs import DEFAULT_LAGS, LagPairs, pairs_by_latent, step_norms
from legato.sae.codes import SparseCodes
from legato.synthetic.bed import Rows

Floats = NDArray[np.float64]

# The property that each metric is meant to measure, or is often read as.
METRICS = {
    "kappa1_excess_within": "persistence",
    "kappa1_order_share": "persistence",
    "kappa1": "persistence",
    "ac1_excess_within": "persistence",
    "ac1": "persistence",
    "half_life": "persistence",
    "run_length_ratio": "persistence",
    "mean_run_length": "persistence",
    "switching_ratio": "persistence",
    "switching_rate": "persistence",
    "smoothness": "persistence",
    "kappa1_excess_cross": "persistence",
    "eta2": "position",
    "mi": "position",
    "document_eta2": "topic",
}
PLANTED = ("persistence", "rate", "magnitude", "magnitude_persistence", "position", "topic")
LEAST = 10  # sources that a rank correlation is taken over


def metric_columns(codes: SparseCodes, rows: Rows) -> dict[str, Floats]:
    """Compute METRICS of each latent, NaN where undefined.

    kappa1_order_share: (real - null) / (1 - null) with the within-document null, the share of the possible order.
    kappa1 ... document_eta2: as in the feature table (evaluation/latents/table.py). mean_run_length, in tokens, and
    switching_rate, switches per token, are the two ratios without their division by chance. smoothness: the latent's
    share in T-SAE's S over the rows in which it fires.
    """
    mask_BL = rows.mask_RL
    layout = LagPairs.of(mask_BL, rows.doc_RL, DEFAULT_LAGS)
    sums = CodeSums.zero(codes.shape[2], codes.shape[1], DEFAULT_LAGS)
    sums.add(layout, pairs_by_latent(codes, layout), step_norms(rows.acts_RLD))
    rate_F = firing_rate(sums)
    columns = {**consistency_features(sums), **position_features(sums)}
    with np.errstate(invalid="ignore", divide="ignore"):
        columns["mean_run_length"] = columns["run_length_ratio"] / (1 - rate_F)
        columns["switching_rate"] = columns["switching_ratio"] * 2 * rate_F * (1 - rate_F)
        columns["smoothness"] = sums.steepest_F / sums.rows_F
    columns["kappa1_order_share"] = (columns["kappa1"] - columns["kappa1_within_null"]) / (
        1 - columns["kappa1_within_null"]
    )
    return {name: columns[name] for name in METRICS}


def rank_correlations(
    columns: Sequence[Mapping[str, Floats]], planted: Sequence[Mapping[str, Floats]], *, replicates: int = 100
) -> dict[str, Any]:
    """Correlate each metric with each planted property; columns and planted: one mapping per seed, values per source.

    "sources": number of those with every metric defined; only they count, and metrics and properties that do not vary
        among them are left out. Fewer than LEAST in a seed give no numbers.
    "spearman": {metric: {property: rank correlation}}, "interval95" its bounds, by a bootstrap over seeds and sources.
    "weight": the standardised coefficients of the regression of the metric's ranks on the ranks of all properties:
        Spearman's correlation without what two properties share by chance. A weight that should be 0 and is not
        shows that the property misleads the metric.
    All are means over seeds.
    """
    seeds = []
    for metric, value in zip(columns, planted, strict=True):
        table = np.stack([metric[name] for name in METRICS] + [value[name] for name in PLANTED])
        seeds.append(table[:, np.isfinite(table).all(0)])
    counts = [table.shape[1] for table in seeds]
    varies = np.all([np.ptp(table, axis=1) > 0 for table in seeds], 0) if min(counts) >= LEAST else np.array([])
    metrics = [name for name, is_free in zip(METRICS, varies[: len(METRICS)], strict=False) if is_free]
    properties = [name for name, is_free in zip(PLANTED, varies[len(METRICS) :], strict=False) if is_free]
    if not metrics or not properties:
        return {"sources": sum(counts), "spearman": {}, "interval95": {}, "weight": {}}
    seeds = [table[varies] for table in seeds]
    n = len(metrics)
    spearman, weight = np.mean([_rank_weights(table, n) for table in seeds], 0)
    rng = np.random.default_rng(0)
    drawn = np.empty((replicates, *spearman.shape))
    for r in range(replicates):
        tables = [seeds[i] for i in rng.integers(len(seeds), size=len(seeds))]
        drawn[r] = np.mean([_spearman(t[:, rng.integers(t.shape[1], size=t.shape[1])], n) for t in tables], 0)
    bounds = np.quantile(drawn, [0.025, 0.975], axis=0)

    def named(values: Floats) -> dict[str, dict[str, Any]]:
        return {
            metric: {name: values[..., i, j].tolist() for j, name in enumerate(properties)}
            for i, metric in enumerate(metrics)
        }

    return {
        "sources": sum(counts),
        "spearman": named(spearman),
        "interval95": named(bounds),
        "weight": named(weight),
    }


def _spearman(table: Floats, n_metrics: int) -> Floats:
    """Correlate the ranks of every metric (the first rows of the table) and property (the others); 0 where a row does
    not vary."""
    ranks = _ranks(table)
    return ranks[:n_metrics] @ ranks[n_metrics:].T


def _rank_weights(table: Floats, n_metrics: int) -> Floats:
    """Compute [2, metrics, properties]: rank correlations, and the weights of the regression on all properties."""
    planted = _ranks(table)[n_metrics:]
    spearman = _spearman(table, n_metrics)
    return np.stack([spearman, spearman @ np.linalg.pinv(planted @ planted.T)])


def _ranks(table: Floats) -> Floats:
    """Rank each row, centred and of unit length."""
    ranks = rankdata(table, axis=1)
    ranks -= ranks.mean(1, keepdims=True)
    return ranks / np.maximum(np.sqrt((ranks**2).sum(1, keepdims=True)), 1e-12)
