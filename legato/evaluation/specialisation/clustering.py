"""Clusters of latents by their standardised descriptors, with k chosen by a stated rule, and measures of trust.

Shape legend: M latents, X descriptors.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, silhouette_score

from legato.evaluation.sums.lag_pairs import Floats, Ints

CLIP = 3.0  # robust standard deviations; descriptors have tails a hundred wide, which would decide all of k-means
IQR_OF_NORMAL = 1.349
LISTED_K = range(2, 11)
FEWEST_CLUSTERS = 4  # two or three clusters cannot tell the kinds of latents apart
STABLE_ARI = 0.8
NEARLY = 0.95
BOOTSTRAPS = 10
CLUSTERER_SEEDS = 5
PERMUTATIONS = 3
SILHOUETTE_LATENTS = 2000  # silhouettes cost the square of it


@dataclass(frozen=True)
class Scaler:
    """Scale to (x - median) / (IQR / 1.349), clipped; by the standard deviation where half of the values are equal."""

    centre_X: Floats
    scale_X: Floats

    @classmethod
    def fit(cls, values_MX: Floats) -> "Scaler":
        low_X, centre_X, high_X = np.percentile(values_MX, [25, 50, 75], axis=0)
        scale_X = (high_X - low_X) / IQR_OF_NORMAL
        scale_X = np.where(scale_X > 0, scale_X, values_MX.std(0))
        return cls(centre_X, np.where(scale_X > 0, scale_X, 1.0))

    def apply(self, values_MX: Floats) -> Floats:
        return np.clip((values_MX - self.centre_X) / self.scale_X, -CLIP, CLIP)


@dataclass(frozen=True)
class Candidate:
    """Quality of k clusters: silhouette, its mean over column-wise permutations, mean bootstrap ARI."""

    k: int
    silhouette: float
    silhouette_null: float
    ari: float


@dataclass(frozen=True)
class Clustering:
    """Cluster centres in standardised units, the largest cluster first, and the quality of every k."""

    scaler: Scaler
    centre_KX: Floats
    candidates: tuple[Candidate, ...]
    bootstrap_ari: tuple[float, ...]
    seed_ari: float

    @property
    def k(self) -> int:
        return len(self.centre_KX)

    @property
    def chosen(self) -> Candidate:
        return next(one for one in self.candidates if one.k == self.k)

    def predict(self, values_MX: Floats) -> Ints:
        """Return the nearest centre of each latent."""
        return nearest(self.scaler.apply(values_MX), self.centre_KX)


def nearest(scaled_MX: Floats, centre_KX: Floats) -> Ints:
    distance_MK = (centre_KX**2).sum(1) - 2.0 * scaled_MX @ centre_KX.T
    return distance_MK.argmin(1)


def cluster(values_MX: Floats, *, seed: int = 0) -> Clustering:
    """Cluster by k-means (Lloyd 1982) on robustly standardised descriptors, deterministic for a seed.

    k is chosen from 4 to 10, among those whose mean ARI (Hubert & Arabie 1985) over bootstraps of the latents is at
    least .8 (among all where none is): the smallest whose silhouette (Rousseeuw 1987) exceeds that of column-permuted
    descriptors by at least 95 % of the largest such excess. Excesses of several k often lie that close.
    """
    rng = np.random.default_rng(seed)
    scaler = Scaler.fit(values_MX)
    scaled_MX = scaler.apply(values_MX)
    permuted = [np.column_stack([rng.permutation(column_M) for column_M in scaled_MX.T]) for _ in range(PERMUTATIONS)]
    shown = rng.permutation(len(scaled_MX))[:SILHOUETTE_LATENTS]
    samples = [rng.integers(0, len(scaled_MX), len(scaled_MX)) for _ in range(BOOTSTRAPS)]
    centres: dict[int, Floats] = {}
    aris: dict[int, list[float]] = {}
    candidates = []
    for k in LISTED_K:
        centres[k] = _centres(scaled_MX, k, seed)
        size_K = np.bincount(nearest(scaled_MX, centres[k]), minlength=k)
        centres[k] = centres[k][np.argsort(-size_K, kind="stable")]  # the largest cluster first
        label_M = nearest(scaled_MX, centres[k])
        aris[k] = [
            adjusted_rand_score(label_M, nearest(scaled_MX, _centres(scaled_MX[sample], k, seed + 1 + number)))
            for number, sample in enumerate(samples)
        ]
        null = [_silhouette(null_MX, nearest(null_MX, _centres(null_MX, k, seed)), shown) for null_MX in permuted]
        real = _silhouette(scaled_MX, label_M, shown)
        candidates.append(Candidate(k, real, float(np.mean(null)), float(np.mean(aris[k]))))
    k = choose(candidates)
    label_M = nearest(scaled_MX, centres[k])
    again = [_centres(scaled_MX, k, seed + 1 + other) for other in range(CLUSTERER_SEEDS)]
    seed_ari = np.mean([adjusted_rand_score(label_M, nearest(scaled_MX, centre_KX)) for centre_KX in again])
    return Clustering(scaler, centres[k], tuple(candidates), tuple(map(float, aris[k])), float(seed_ari))


def choose(candidates: Sequence[Candidate]) -> int:
    """Choose k by the rule above."""
    eligible = [one for one in candidates if one.k >= FEWEST_CLUSTERS]
    stable = [one for one in eligible if one.ari >= STABLE_ARI]
    excess = {one.k: one.silhouette - one.silhouette_null for one in stable or eligible}
    best = max(excess.values())
    return min(k for k, value in excess.items() if value >= best - (1 - NEARLY) * abs(best))


def agreement(first_MX: Floats, second_MX: Floats, k: int, *, seed: int = 0) -> float:
    """Compute the ARI between clusters learned on two SAEs separately, standardisation included.

    Latents of two SAEs do not correspond, but their descriptors do: the clusters of one SAE are applied to the latents
    of the other and compared with the other's own (as in prediction strength, Tibshirani & Walther 2005).
    """
    scalers = [Scaler.fit(values_MX) for values_MX in (first_MX, second_MX)]
    both = zip(scalers, (first_MX, second_MX), strict=True)
    own = [_centres(scaler.apply(values_MX), k, seed) for scaler, values_MX in both]
    aris = []
    for values_MX in (first_MX, second_MX):
        labels = [nearest(scaler.apply(values_MX), centre_KX) for scaler, centre_KX in zip(scalers, own, strict=True)]
        aris.append(adjusted_rand_score(*labels))
    return float(np.mean(aris))


def _centres(scaled_MX: Floats, k: int, seed: int) -> Floats:
    return KMeans(k, n_init=4, random_state=seed).fit(scaled_MX).cluster_centers_


def _silhouette(scaled_MX: Floats, label_M: Ints, shown: Ints) -> float:
    """Average over the latents `shown`; 0 where they lie in fewer than two clusters."""
    if not 2 <= np.unique(label_M[shown]).size < shown.size:
        return 0.0
    return float(silhouette_score(scaled_MX[shown], label_M[shown]))
