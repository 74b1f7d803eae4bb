"""Means, ratios and their intervals over the seeds of two methods, paired seed by seed.

Shape legend: S seeds, R bootstrap replicates.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import stdtrit

from legato.evaluation.sums.lag_pairs import Floats
from legato.results.matched.points import Point
from legato.results.saved_run import standard_error

LEVEL = 0.95
LEAST_GAIN = 0.1  # relative; the share of a smaller gain is noise


def estimate(points: Sequence[Point], key: str) -> dict[str, float | None]:
    """Return the mean over seeds and its standard error (None with one seed)."""
    values_S = _values(points, key)
    return {"mean": float(values_S.mean()), "stderr": _error(values_S)}


def between(ours: Sequence[Point], theirs: Sequence[Point], key: str, their_key: str) -> dict[str, Any] | None:
    """Compare a number of a method with the baseline's: means with standard errors, ratio with 95 % intervals.

    interval95_documents: percentiles over bootstrap replicates with the same documents for both (valid for these SAEs),
    recentred on the ratio: a replicate leaves out latents that fire in no drawn document, mostly rare ones, which
    shifts its means. interval95_seeds: over the seeds (valid for these documents). None where a seed lacks the number;
    no ratio to a baseline that is not positive.
    """
    if not all(key in point.values for point in ours) or not all(their_key in point.values for point in theirs):
        return None
    ours_S, theirs_S = _values(ours, key), _values(theirs, their_key)
    value, base = float(ours_S.mean()), float(theirs_S.mean())
    return {
        "value": value,
        "stderr": _error(ours_S),
        "baseline": base,
        "baseline_stderr": _error(theirs_S),
        "ratio": value / base if base > 0 else None,
        "interval95_documents": _over_documents(ours, theirs, key, their_key) if base > 0 else None,
        "interval95_seeds": ratio_interval(ours_S, theirs_S) if base > 0 else None,
    }


def absent(ours: Sequence[Point], theirs: Sequence[Point], key: str, shuffled_key: str) -> dict[str, Any] | None:
    """Give a number on shuffled activations, and the share of the gain over the baseline that is lost there:
    1 - (gain there) / (gain), None where the gain is below a tenth of the baseline's value. None where a seed lacks
    the number."""
    if not all(name in point.values for point in (*ours, *theirs) for name in (key, shuffled_key)):
        return None
    left_S, base_S = _values(ours, shuffled_key), _values(theirs, shuffled_key)
    gain_S = _values(ours, key) - _values(theirs, key)
    gained = float(gain_S.mean()) > LEAST_GAIN * abs(float(_values(theirs, key).mean()))
    interval = ratio_interval(left_S - base_S, gain_S) if gained else None
    return {
        "value": float(left_S.mean()),
        "baseline": float(base_S.mean()),
        "absent": 1 - float((left_S - base_S).mean() / gain_S.mean()) if gained else None,
        "interval95_seeds": None if interval is None else [1 - interval[1], 1 - interval[0]],
    }


def ratio_interval(ours_S: Floats, theirs_S: Floats) -> list[float] | None:
    """Compute the 95 % interval of R = mean(ours) / mean(theirs) over paired seeds; None with one seed.

    R +- t sd(d) / sqrt(S) with d = (ours - R theirs) / mean(theirs) and Student's t of S - 1 degrees of freedom, the
    linearised ratio estimator (Cochran 1977, 2.11).
    """
    n = len(ours_S)
    if n < 2:
        return None
    ratio = float(ours_S.mean() / theirs_S.mean())
    residual_S = (ours_S - ratio * theirs_S) / theirs_S.mean()
    half = float(stdtrit(n - 1, (1 + LEVEL) / 2) * residual_S.std(ddof=1) / math.sqrt(n))
    return [ratio - half, ratio + half]


def _over_documents(ours: Sequence[Point], theirs: Sequence[Point], key: str, their_key: str) -> list[float] | None:
    """Compute percentiles of the ratio of means over seeds, by replicate; None where replicates do not pair."""
    means = []
    for points, name in ((ours, key), (theirs, their_key)):
        found = [point.replicates[name] for point in points if name in point.replicates]
        if len(found) < len(points) or len({values_R.shape for values_R in found}) > 1:
            return None
        means.append(np.mean(found, axis=0))
    ours_R, theirs_R = means
    if ours_R.shape != theirs_R.shape or not (np.isfinite(ours_R) & np.isfinite(theirs_R) & (theirs_R > 0)).all():
        return None
    spread_R = ours_R / theirs_R
    spread_R *= _values(ours, key).mean() / _values(theirs, their_key).mean() / spread_R.mean()
    return [float(v) for v in np.quantile(spread_R, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])]


def _values(points: Sequence[Point], key: str) -> Floats:
    return np.array([point.values[key] for point in points], np.float64)


def _error(values_S: Floats) -> float | None:
    return standard_error(values_S) if len(values_S) > 1 else None
