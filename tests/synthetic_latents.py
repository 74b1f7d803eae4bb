"""Adds to a made-up run what a real one saves of its latents: kinds, redundancy, profiles, the offset test."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from legato.evaluation.redundancy.table import SCHEMA

KINDS = ("token", "positional", "phrase", "passage", "dense", "unspecific")
CLUSTERS = ("token", "phrase", "phrase", "unspecific")
CLASSES = ("duplicate", "position_split", "lead_lag", "antipodal")
WINDOW = 4


def describe_latents(run: Path, arms: tuple[str, ...], *, token: str = " chem") -> Path:
    """token: what the examples of clusters and pairs show."""
    metrics = json.loads((run / "metrics.json").read_text())
    (run / "redundancy").mkdir()
    for number, arm in enumerate(arms):
        rng = np.random.default_rng(number)
        table = pq.read_table(run / "features" / f"{arm}.parquet")
        latents = len(table)
        cluster = rng.integers(0, len(CLUSTERS), latents)
        extra = {
            "density": table["firing_rate"].to_numpy(),
            "half_life": np.minimum(rng.lognormal(0, 0.7, latents), 64),
            "eta2": rng.exponential(0.01, latents),
            "mi": rng.exponential(0.002, latents),
            "cluster": cluster,
            "cluster_name": np.array(CLUSTERS)[cluster],
            "map_x": rng.normal(cluster, 1),
            "map_y": rng.normal(0, 1, latents),
        }
        for name, values in extra.items():
            table = table.append_column(name, pa.array(values))
        pq.write_table(table, run / "features" / f"{arm}.parquet")
        with np.load(run / "arrays" / f"{arm}.npz") as stored:
            matrix = stored["position_matrix"]
        rates = np.clip(rng.normal(extra["density"][:, None], 0.001, (latents, len(matrix))), 0, 1)
        tokens = np.full(len(matrix), 300)
        tokens[0] = 0
        path = run / "arrays" / f"{arm}.npz"
        np.savez_compressed(path, position_matrix=matrix, rate_FL=rates.astype(np.float32), tokens_L=tokens)
        write_redundancy(run, arm, rng, token)
        l0 = [None, *rng.normal(32, 1, len(matrix) - 1).round(3).tolist()]
        metrics[arm]["position"] |= {
            "l0_by_position": l0,
            "l0_by_position_low": [None if v is None else v - 1 for v in l0],
            "l0_by_position_high": [None if v is None else v + 1 for v in l0],
        }
        metrics[arm]["consistency"]["interval95"] = {
            key: [0.9 * metrics[arm]["consistency"][key], 1.1 * metrics[arm]["consistency"][key]]
            for key in ("kappa1_excess_within", "ac1_excess_within")
        }
        metrics[arm] |= {"offset": offset(), "redundancy": redundancy(), "specialisation": specialisation(token)}
    (run / "metrics.json").write_text(json.dumps(metrics))
    return run


def write_redundancy(run: Path, arm: str, rng: np.random.Generator, token: str) -> None:
    lags = np.arange(-WINDOW, WINDOW + 1)
    excess = rng.normal(0, 0.1, (len(lags), 12, 12)).astype(np.float32)
    latents = rng.permutation(100)[:12]
    np.savez(run / "redundancy" / f"{arm}.npz", latents=latents, lags=lags, c=excess, excess=excess)
    rows = [
        {field.name: 0.5 for field in SCHEMA if pa.types.is_floating(field.type)}
        | {"latent_a": 2 * i, "latent_b": 2 * i + 1, "class": name, "lag": 2 if name == "lead_lag" else 0, "group": i}
        | {"examples": [f"12: of[{token}]\u2081\u2082 and [so]\u2081 on", "3: else"] if i < 8 else None}
        for name in CLASSES
        for i in range(10)
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), run / "redundancy" / f"{arm}.parquet")


def offset() -> dict:
    def rows(jaccard):
        return [
            {"shift": s, "jaccard": jaccard, "jaccard_null": 0.07, "cosine": 0.99, "unchanged": 0.6, "movement": 0.01}
            | {"variance_moved": 0.001}
            for s in (1, 8, 32)
        ]

    still = {"movement": 0.005, "tolerance": 0.03, "holds": True}
    shared = {"rows": 16, "positions": 128, "tokens": 2000, "model_positions": "relative", "stands_still": still}
    return shared | {"position_ids": rows(0.96), "prefix": rows(0.9)}


def redundancy() -> dict:
    pairs = dict.fromkeys(CLASSES, 10)
    shares = {"groups": 9, "largest_group": 3, "latents_in_groups": 20}
    return {"window": WINDOW, "pairs": pairs, **shares, "share_of_latents": 0.05, "share_of_firing": 0.1}


def specialisation(token: str) -> dict:
    def share(n):
        return {"latents": n, "share_of_latents": n / 400, "share_of_firing": n / 400}

    centroid = {"log10_density": -2.5, "kappa1": 0.2, "log2_half_life": -1.0, "eta2": 0.001, "token_mi": 0.3}
    clusters = [
        {"cluster": i, "name": name, **share(100), "centroid": centroid}
        | {"examples": [{"latent": i, "density": 0.01, "tokens": [token, " a"], "top_token_share": 0.2}]}
        for i, name in enumerate(CLUSTERS)
    ]
    return {
        "latents": 400,
        "left_out": 20,
        "share_of_firing": 0.99,
        "min_firings": 20,
        "by_name": {kind: share(50) for kind in KINDS},
        "by_latent": {kind: share(66) for kind in KINDS},
        "clusters": clusters,
        "k": 4,
        "silhouette": 0.23,
        "silhouette_null": 0.13,
        "ari": {"bootstrap": 0.97, "bootstrap_min": 0.95, "clusterer_seeds": 0.98, "sae_seeds": None},
        "map_variance_explained": [0.4, 0.2],
        "note": None,
    }
