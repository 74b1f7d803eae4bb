"""Passages that the browser shows first: some picked by a stated rule, some drawn at random, and marked so."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from legato.report.browser.columns import KAPPA_EXCESS
from legato.report.browser.tables import StripTable

GOOD_MATCH = 0.7  # decoder cosine
FEWEST_FIRINGS = 20
GAINS, LOSSES, RANDOM = 4, 2, 4
SEED = 0


def showcase(
    arms: Sequence[tuple[str, Mapping[str, NDArray[Any]], StripTable]], baseline: str | None
) -> list[dict[str, Any]]:
    """Per arm that is matched with the baseline: how the matched pairs compare, and a handful of their passages.

    A pair counts where the decoder cosine is above GOOD_MATCH and both latents fire FEWEST_FIRINGS times on the text
    shown. `gains`, `losses`: the largest differences in kappa excess, the arm's less its match's, each with the
    strongest passage of the arm's latent. `random`: pairs drawn evenly, each with a passage drawn evenly. Items:
    [latent, match, difference, centre]. pairs, median, share: their number, the median difference, and what part of
    them is above 0.
    """
    tables = {name: (features, strips) for name, features, strips in arms}
    found = []
    for name, (features, strips) in tables.items():
        for other, (nearest_F, cosine_F) in strips.matches.items():
            if name == baseline or other not in tables:
                continue
            theirs, their_strips = tables[other]
            if KAPPA_EXCESS not in features or KAPPA_EXCESS not in theirs:
                continue
            counts = (nearest_F >= 0) & (cosine_F > GOOD_MATCH) & (strips.count_F >= FEWEST_FIRINGS)
            counts &= their_strips.count_F[nearest_F] >= FEWEST_FIRINGS
            difference_F = features[KAPPA_EXCESS] - theirs[KAPPA_EXCESS][nearest_F]
            pairs = np.flatnonzero(counts & np.isfinite(difference_F))
            found.append({"arm": name, "other": other} | _chosen(pairs, nearest_F, difference_F, strips))
    return found


def _chosen(
    pairs: NDArray[np.int64], nearest_F: NDArray[np.int32], difference_F: NDArray[Any], strips: StripTable
) -> dict[str, Any]:
    ranked = pairs[np.argsort(-difference_F[pairs], kind="stable")]
    drawn = np.random.default_rng(SEED).permutation(pairs)[:RANDOM]

    def items(latents: NDArray[np.int64], kind: str) -> list[list[float]]:
        return [
            [int(i), int(nearest_F[i]), round(float(difference_F[i]), 4), int(strips.centres[kind][i, 0])]
            for i in latents
        ]

    differences = difference_F[pairs]
    return {
        "pairs": len(pairs),
        "median": float(np.median(differences)) if len(pairs) else None,
        "share": float((differences > 0).mean()) if len(pairs) else None,
        "gains": items(ranked[differences[np.argsort(-differences, kind="stable")] > 0][:GAINS], "top"),
        "losses": items(ranked[::-1][np.sort(differences) < 0][:LOSSES], "top"),
        "random": items(drawn, "random"),
    }
