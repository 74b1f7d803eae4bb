"""Parts of a dictionary with consistency numbers of their own: bins of the firing rate, groups of the objective.

Shape legend: F latents, R bootstrap replicates.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from legato.evaluation.consistency.bootstrap import STATISTICS, bootstrap_documents, document_means, intervals
from legato.evaluation.consistency.persistence import consistency_features, mean, rate_bins
from legato.evaluation.sums.accumulators import CodeSums, firing_rate
from legato.evaluation.sums.code_buffer import CodeBuffer
from legato.evaluation.sums.lag_pairs import Floats
from legato.sae.groups import leading_count

Masks = dict[str, NDArray[np.bool_]]
LAG = 1


def bin_key(edges: Sequence[float]) -> str:
    return f"{edges[0]:g}-{edges[1]:g}"


def dictionary_parts(objective: Mapping[str, Any]) -> dict[str, slice]:
    """Find the parts of the dictionary that an objective (`legato.experiment.arms.recipe`) treats differently: nested
    groups, the slow fraction of a term. Empty for an ordinary SAE."""
    width = objective.get("d_sae")
    if width is None:
        return {}
    shares = {float(share) for share, _ in objective.get("groups") or ()}
    shares |= {float(term["slow_fraction"]) for term in objective.get("terms") or () if "slow_fraction" in term}
    ends = sorted({0, width, *(leading_count(width, share) for share in shares)})
    parts = {f"latents {start} to {end - 1}": slice(start, end) for start, end in pairwise(ends)}
    return parts if len(parts) > 1 else {}


def latent_groups(rate_F: Floats, objective: Mapping[str, Any]) -> Masks:
    """Return masks of latents by `<bin>`, `<group>` and `<group>/<bin>`, keys of `bin_key` and `dictionary_parts`."""
    bins = {bin_key(edges): in_bin_F for edges, in_bin_F in rate_bins(rate_F)}
    found = dict(bins)
    for name, latents in dictionary_parts(objective).items():
        in_group_F = np.zeros(rate_F.size, bool)
        in_group_F[latents] = True
        found[name] = in_group_F & (rate_F > 0)
        found |= {f"{name}/{key}": in_group_F & in_bin_F for key, in_bin_F in bins.items()}
    return found


def add_intervals(
    consistency: dict[str, Any], kept: CodeBuffer, sums: CodeSums, objective: Mapping[str, Any], *, replicates: int
) -> dict[str, Floats]:
    """Put 95 % intervals over documents into a section of metrics.json: "interval95" for all latents and in each row of
    "by_rate_bin", and "by_group", the means and intervals of each group of the objective.

    Returns the replicates [R] of each mean excess at lag 1 by `<measure>` for all latents, `<population>/<measure>` for
    the others.
    """
    chosen = latent_groups(firing_rate(sums), objective)
    drawn = bootstrap_documents(kept, lag=LAG, replicates=replicates, populations=chosen)
    found = intervals(drawn, document_means(kept, lag=LAG, populations=chosen))
    measures = [name.replace("_", f"{LAG}_", 1) for name in STATISTICS]

    def of(prefix: str) -> dict[str, Any]:
        return {measure: found[f"{prefix}{measure}"] for measure in measures}

    consistency["interval95"] = {**of(""), "rows": kept.n_rows, "replicates": replicates}
    for row in consistency["by_rate_bin"]:
        row["interval95"] = of(f"{bin_key(row['bin'])}/")
    if groups := dictionary_parts(objective):
        columns = consistency_features(sums)
        consistency["by_group"] = [
            {
                "group": [latents.start, latents.stop - 1],
                "latents": int(chosen[name].sum()),
                **{measure: mean(columns[measure], chosen[name]) for measure in measures},
                "interval95": of(f"{name}/"),
            }
            for name, latents in groups.items()
        ]
    return drawn
