"""Redundancy across positions: pairs of latents with one meaning, at the same token, at other positions, or later.

Excess: C_ab(lag) = corr(f_a(t), f_b(t + lag)), less its value from position alone (see sums.py). Classes:
  duplicate       similar decoders, high excess at lag 0: two latents for one thing
  position_split  similar decoders, firing at different positions of the context: one thing divided by position. Its
                  correlation at lag 0 is negative, so it is found by its similar decoders, not by C.
  lead_lag        dissimilar decoders, high excess at another lag than 0: b follows a. A bigram, no redundancy.
  antipodal       opposite decoders
Groups are the connected components of duplicates and position splits.

False discoveries are controlled by Benjamini & Hochberg (1995) in three families of one-sided tests, whose units are
stretches (parts of one document in one row), never tokens: excess at lag 0 over all pairs of similar decoders
(duplicate), different position profiles over the same pairs (position_split), and excess over all ordered pairs and
lags 1..W (lead_lag). The last family holds only latents that fire in at least MIN_STRETCHES stretches, a choice that is
independent of their correlation (Bourgon et al. 2010); pairs below the threshold count in it with p = 1. Antipodal
pairs are a fact of the weights and are not tested. Rows of one long document count as independent units: correlation
that comes from its topic is correlation beyond position.

Shape legend: B rows, L positions, D width, F latents, R pairs of the table.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from legato.common.errors import LegatoError, UsageError
from legato.evaluation.redundancy import classes
from legato.evaluation.redundancy.classes import ANTIPODAL, CLASSES, DUPLICATE, LEAD_LAG, POSITION_SPLIT, Limits
from legato.evaluation.redundancy.examples import Contexts, heat_map
from legato.evaluation.redundancy.sums import LatentSums
from legato.evaluation.sums.code_buffer import CodeBuffer
from legato.evaluation.sums.lag_pairs import Floats, Ints

EXAMPLES = 200  # strongest pairs of each class whose contexts are written out
EXAMPLES_IN_METRICS = 3
HEAT_MAP_LATENTS = 64


@dataclass(frozen=True)
class Redundancy:
    """Result. metrics: the section of metrics.json. pairs: columns of the table (table.py). arrays: the heat map."""

    metrics: dict[str, Any]
    pairs: dict[str, Any]
    arrays: dict[str, NDArray[Any]]


def redundancy(
    kept: CodeBuffer,
    W_dec: Tensor,
    *,
    decode: Callable[[Sequence[int]], list[str]] | None = None,
    limits: Limits | None = None,
) -> Redundancy:
    """Find redundant pairs and groups of an SAE's latents on the rows that are kept.

    W_dec: [F, D]. decode: token ids to one string each, for the examples; without it there are none.
    Cost: O(tokens L0^2 W) for the correlations and O(F^2 D) for the decoder; memory O(F (L + W)).
    Raises LegatoError without rows or firings, UsageError for a decoder of another size or a window below 1.
    """
    limits = limits or Limits()
    if not kept.n_rows:
        raise LegatoError("there are no codes to compare: give rows of held-out text")
    if limits.window < 1 or len(W_dec) != kept.n_latents:
        raise UsageError(
            f"redundancy needs a window of at least 1 and the decoder of all {kept.n_latents} latents, "
            f"not {limits.window} and {len(W_dec)}"
        )
    tokens_BL = kept.tokens_BL.long().numpy()
    window = max(1, min(limits.window, tokens_BL.shape[1] - 1))
    layout = kept.layout(tuple(range(1, window + 1)))
    order = kept.order(layout)
    sums = LatentSums.zero(kept.n_latents, layout.shape[1], window)
    sums.add(layout, order)
    if not sums.count_F.any():
        raise LegatoError("no latent fires on the rows given: there is nothing to compare")
    similarity = limits.similarity(W_dec.shape[1])
    directions_FD = torch.nn.functional.normalize(W_dec.detach().float().cpu(), dim=1).numpy()
    evidence = classes.PairEvidence.of(sums, layout, order, directions_FD, similarity, limits.correlation)
    pairs = classes.classify(evidence, limits, similarity)
    group_F = groups(pairs, kept.n_latents)
    pairs["group"] = np.where(_is_redundant(pairs), group_F[pairs["latent_a"]], -1)
    contexts = None if decode is None else Contexts(layout, order, tokens_BL, kept.doc_BL, decode)
    pairs["examples"] = _examples(pairs, contexts)
    metrics = {
        "window": window,
        "tokens": layout.n_tokens,
        "stretches": int(sums.n_stretches),
        "cosine": similarity,
        "similar_decoders": evidence.n_similar,
        "tested_latents": evidence.n_tested,
        "pairs_left_out": evidence.n_left_out,
        **_aggregates(pairs, group_F, sums.count_F),
    }
    # The heat map shows the latents of the first pairs of the table, without antipodal ones.
    chosen_R = pairs["class"] != ANTIPODAL
    both = np.stack([pairs["latent_a"][chosen_R], pairs["latent_b"][chosen_R]], 1).ravel()
    _, first = np.unique(both, return_index=True)
    return Redundancy(metrics, pairs, heat_map(both[np.sort(first)[:HEAT_MAP_LATENTS]], sums, layout, order))


def _is_redundant(pairs: Mapping[str, Any]) -> NDArray[np.bool_]:
    return np.isin(pairs["class"], (DUPLICATE, POSITION_SPLIT))


def groups(pairs: Mapping[str, Any], n_latents: int) -> Ints:
    """Number the groups, components of duplicates and splits: [F], 0 the largest, -1 for latents in none."""
    joined_R = _is_redundant(pairs)
    edges = (pairs["latent_a"][joined_R], pairs["latent_b"][joined_R])
    graph = coo_array((np.ones(joined_R.sum()), edges), shape=(n_latents, n_latents))
    component_F = connected_components(graph, directed=False)[1]
    size_X = np.bincount(component_F)
    rank_X = np.empty(size_X.size, np.int64)
    rank_X[np.argsort(-size_X, kind="stable")] = np.arange(size_X.size)
    return np.where(size_X[component_F] > 1, rank_X[component_F], -1)


def _aggregates(pairs: Mapping[str, Any], group_F: Ints, count_F: Floats) -> dict[str, Any]:
    grouped_F = group_F >= 0
    keys = ("latent_a", "latent_b", "lag", "excess", "cosine", "overlap")
    strongest = [np.flatnonzero(pairs["class"] == name)[:EXAMPLES_IN_METRICS] for name in CLASSES]
    return {
        "pairs": {name: int((pairs["class"] == name).sum()) for name in CLASSES},
        "groups": int(group_F.max()) + 1,
        "largest_group": int(np.bincount(group_F[grouped_F]).max(initial=0)),
        "latents_in_groups": int(grouped_F.sum()),
        "share_of_latents": float(grouped_F.sum() / (count_F > 0).sum()),
        "share_of_firing": float(count_F[grouped_F].sum() / count_F.sum()),
        "examples": [
            {
                "class": str(pairs["class"][row]),
                **{key: value if np.isfinite(value := pairs[key][row].item()) else None for key in keys},
                "contexts": pairs["examples"][row],
            }
            for row in np.concatenate(strongest)
        ],
    }


def _examples(pairs: Mapping[str, Any], contexts: Contexts | None) -> list[list[str]]:
    """Show contexts of the strongest pairs of each class, none for the others."""
    examples: list[list[str]] = [[] for _ in pairs["class"]]
    if contexts is None:
        return examples
    for name in CLASSES:
        for row in np.flatnonzero(pairs["class"] == name)[:EXAMPLES]:
            a, b = int(pairs["latent_a"][row]), int(pairs["latent_b"][row])
            if name in (DUPLICATE, LEAD_LAG):
                examples[row] = contexts.together(a, b, int(pairs["lag"][row]))
            else:
                examples[row] = contexts.apart(a, b)
    return examples
