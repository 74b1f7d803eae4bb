"""Kinds of latents of an SAE: named clusters of their descriptors, and a map.

All SAEs that are compared share one standardisation, one set of clusters and one map, so that a name means the same in
each and shares compare.

Shape legend: F latents, M latents that are clustered, X descriptors.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA

from legato.evaluation.specialisation.clustering import Clustering, agreement, cluster, nearest
from legato.evaluation.specialisation.descriptors import DESCRIPTORS, NAMES, Descriptor, describe, medians, name_of
from legato.evaluation.sums.lag_pairs import Floats

MIN_FIRINGS = 20  # fewer say too little of tokens, documents and gaps
MIN_LATENTS = 50  # of one SAE, for clusters to mean something
FIT_LATENTS = 16384  # drawn evenly from the SAEs; all others are assigned to the clusters of these
EXAMPLES = 5

Table = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Specialisation:
    """Result. section: of metrics.json. columns: cluster, cluster_name, map_x, map_y of the feature table."""

    section: dict[str, Any]
    columns: dict[str, NDArray[Any]]


def specialise(
    tables: Mapping[str, Table],
    n_tokens: int,
    *,
    same_recipe: Sequence[Sequence[str]] = (),
    decode: Callable[[int], str] = str,
    seed: int = 0,
) -> dict[str, Specialisation]:
    """Cluster the latents of one or several SAEs, {name: feature table}, judged on the same `n_tokens` valid positions.

    same_recipe: groups of names that differ in the training seed only, between which the agreement is measured.
    decode: token id -> text, for the examples. Latents that fire fewer than 20 times are left out.
    An SAE of which fewer than 50 remain has no clusters: `note` says so, its columns are null.
    """
    chosen = {
        name: np.round(np.asarray(table["density"], np.float64) * n_tokens) >= MIN_FIRINGS
        for name, table in tables.items()
    }
    used = _defined_descriptors(tables, {name: in_F for name, in_F in chosen.items() if in_F.sum() >= MIN_LATENTS})
    values = {name: describe(table, used) for name, table in tables.items()}
    for name, values_FX in values.items():
        chosen[name] &= np.isfinite(values_FX).all(1)
    enough = {name: in_F for name, in_F in chosen.items() if len(np.unique(values[name][in_F], axis=0)) >= MIN_LATENTS}
    results = {}
    for name, in_F in chosen.items():
        note = (
            f"no clusters: {int(in_F.sum())} latents fire {MIN_FIRINGS} times or more and can be described, "
            f"{MIN_LATENTS} that differ are needed; judge on more text"
        )
        section = {"note": note, "k": 0, "latents": 0, "clusters": [], "min_firings": MIN_FIRINGS}
        results[name] = Specialisation(section, _null_columns(in_F.size))
    if not enough:
        return results
    rng, most = np.random.default_rng(seed), FIT_LATENTS // len(enough)
    parts = [values[name][in_F] for name, in_F in enough.items()]
    fitted_MX = np.concatenate([part[np.sort(rng.permutation(len(part))[:most])] for part in parts])
    clustering = cluster(fitted_MX, seed=seed)
    label_M = clustering.predict(fitted_MX)
    names = [name_of(medians(fitted_MX[label_M == number], used)) for number in range(clustering.k)]
    plane = PCA(2, svd_solver="full").fit(clustering.scaler.apply(fitted_MX))
    seeds = [
        agreement(values[one][chosen[one]], values[other][chosen[other]], clustering.k, seed=seed)
        for group in same_recipe
        for one, other in combinations([name for name in group if name in enough], 2)
    ]
    shared = {
        **_trust(clustering),
        "map_variance_explained": [float(share) for share in plane.explained_variance_ratio_],
        "descriptors": [one.name for one in used],
        "undefined_descriptors": [one.name for one in DESCRIPTORS if one not in used],
        "fitted_on": {"saes": list(enough), "latents": len(fitted_MX)},
        "note": None,
    }
    shared["ari"]["sae_seeds"] = float(np.mean(seeds)) if seeds else None
    for name, in_F in enough.items():
        columns = _columns(values[name], in_F, clustering, names, plane)
        section = {**_shares(tables[name], values[name], used, columns, clustering, names, decode), **shared}
        results[name] = Specialisation(section, columns)
    return results


def _defined_descriptors(
    tables: Mapping[str, Table], chosen: Mapping[str, NDArray[np.bool_]]
) -> tuple[Descriptor, ...]:
    """Find the descriptors defined for at least half of each SAE's latents; lags beyond the context never are."""
    return tuple(
        descriptor
        for descriptor in DESCRIPTORS
        if descriptor.undefined_is is not None
        or all(
            descriptor.column in tables[name] and np.isfinite(tables[name][descriptor.column][chosen_F]).mean() >= 0.5
            for name, chosen_F in chosen.items()
        )
    )


def _trust(clustering: Clustering) -> dict[str, Any]:
    return {
        "k": clustering.k,
        "silhouette": clustering.chosen.silhouette,
        "silhouette_null": clustering.chosen.silhouette_null,
        "ari": {
            "bootstrap": float(np.mean(clustering.bootstrap_ari)),
            "bootstrap_min": min(clustering.bootstrap_ari),
            "clusterer_seeds": clustering.seed_ari,
        },
        "by_k": [vars(one) for one in clustering.candidates],
    }


def _columns(
    values_FX: Floats, chosen_F: NDArray[np.bool_], clustering: Clustering, names: Sequence[str], plane: PCA
) -> dict[str, NDArray[Any]]:
    columns = _null_columns(chosen_F.size)
    scaled_MX = clustering.scaler.apply(values_FX[chosen_F])
    label_M = nearest(scaled_MX, clustering.centre_KX)
    columns["cluster"][chosen_F] = label_M
    columns["cluster_name"][chosen_F] = np.array(names, dtype=object)[label_M]
    columns["map_x"][chosen_F], columns["map_y"][chosen_F] = plane.transform(scaled_MX).T
    return columns


def _null_columns(n_latents: int) -> dict[str, NDArray[Any]]:
    undefined_F, nameless_F = np.full(n_latents, np.nan), np.full(n_latents, None, dtype=object)
    return {
        "cluster": undefined_F,
        "cluster_name": nameless_F,
        "map_x": undefined_F.copy(),
        "map_y": undefined_F.copy(),
    }


def _shares(
    table: Table,
    values_FX: Floats,
    used: Sequence[Descriptor],
    columns: Table,
    clustering: Clustering,
    names: Sequence[str],
    decode: Callable[[int], str],
) -> dict[str, Any]:
    density_F = np.asarray(table["density"], np.float64)
    in_any_F = np.isfinite(columns["cluster"])

    def share(in_F: NDArray[np.bool_]) -> dict[str, Any]:
        return {
            "latents": int(in_F.sum()),
            "share_of_latents": float(in_F.sum() / in_any_F.sum()),
            "share_of_firing": float(density_F[in_F].sum() / density_F[in_any_F].sum()),
        }

    # The rule on each latent alone shows kinds that are too rare to form a cluster.
    rule_F = np.full(in_any_F.size, None, dtype=object)
    for latent in np.flatnonzero(in_any_F):
        rule_F[latent] = name_of(medians(values_FX[[latent]], used))
    clusters = []
    for number, name in enumerate(names):
        in_F = columns["cluster"] == number
        member_M = np.flatnonzero(in_F)
        distance_M = np.square(clustering.scaler.apply(values_FX[in_F]) - clustering.centre_KX[number]).sum(1)
        typical = member_M[np.argsort(distance_M, kind="stable")[:EXAMPLES]]
        cluster = {"cluster": number, "name": name, **share(in_F)}
        cluster["centroid"] = medians(values_FX[in_F], used) if member_M.size else None
        cluster["examples"] = [_example(table, int(latent), decode) for latent in typical]
        clusters.append(cluster)
    return {
        "latents": int(in_any_F.sum()),
        "left_out": int((density_F > 0).sum() - in_any_F.sum()),
        "share_of_firing": float(density_F[in_any_F].sum() / density_F.sum()),
        "min_firings": MIN_FIRINGS,
        "by_name": {name: share(columns["cluster_name"] == name) for name in NAMES},
        "by_latent": {name: share(rule_F == name) for name in NAMES},
        "clusters": clusters,
    }


def _example(table: Table, latent: int, decode: Callable[[int], str]) -> dict[str, Any]:
    ids = [table[name][latent] for name in ("top_token", "top_token2", "top_token3")]
    return {
        "latent": latent,
        "density": float(table["density"][latent]),
        "tokens": [decode(int(token)) for token in ids if np.isfinite(token)],
        "top_token_share": float(table["top_token_share"][latent]),
    }
