"""Columns of the feature table in the browser, their headings, and their meaning in a line."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from legato.report.browser.pack import Pack

HOLD, GAIN, MATCH_COSINE = "kappa1_hold", "kappa1_gain", "match_cosine"
KAPPA_EXCESS, KAPPA_BEYOND_POSITION = "kappa1_excess_within", "kappa1_excess_cross"
# The page makes these columns itself: an excess is the number less its null.
_EXCESS = re.compile(r"^(ac|kappa)(\d+)_excess_(within|cross)$")
_LAGGED = re.compile(r"^(ac|kappa)(\d+)(_within_null|_cross_null|_excess_within|_excess_cross)?$")
_LEFT_OUT = ("latent", "map_x", "map_y", "cluster", "top_token", "top_token2", "top_token3", "feature_density")
_KNOWN = {
    "density": ("firing rate", "share of valid positions where it fires"),
    "mean_activation": ("mean activation", "where it fires, rescaled by the decoder norm"),
    "half_life": ("half-life", "tokens until the autocorrelation falls below one half"),
    "half_life_censored": ("half-life censored", "1: not within the largest lag"),
    "run_length_ratio": ("run length", "mean run of consecutive firing over its value for independent firing"),
    "switching_ratio": ("switching", "switches per token over their value for independent firing"),
    "document_eta2": ("document eta²", "share of variance between documents"),
    "eta2": ("position eta²", "share of variance explained by position in the context"),
    "mi": ("position MI", "information of firing and position, nats"),
    "token_mi": ("token MI", "information of firing and the current token, nats"),
    "token_mi_share": ("token share", "that information over the entropy of firing"),
    "token_mi_adjusted": ("token share, adjusted", "beyond chance: 1 where the token alone decides"),
    "top_token_share": ("top token's share", "share of its firings on its most frequent token"),
    "burstiness": ("burstiness", "of the gaps between firings: -1 regular, 0 at random, 1 in bursts"),
    "offset_jaccard": ("offset Jaccard", "tokens it fires on before and after the text is shifted: 1 if the same"),
    "max_decoder_cosine_sim": ("nearest cosine", "cosine to the nearest other decoder row"),
    "cluster_name": ("kind", "cluster of latents, by their descriptors"),
    HOLD: ("hold", "kappa at lag 1 beyond both nulls: what neither the document nor the position explains"),
    GAIN: ("gain", "kappa excess less that of its match in the baseline, where their cosine is .5 or more"),
    MATCH_COSINE: ("match cosine", "decoder cosine to the best match in the other arm"),
}
_SUFFIXES = {
    None: ("", ""),
    "_within_null": (", order null", ": expected when tokens are shuffled inside each document"),
    "_cross_null": (", position null", ": expected from position alone"),
    "_excess_within": (" excess", " over its value when tokens are shuffled inside each document"),
    "_excess_cross": (" beyond position", " over what position alone would give"),
}


def described(name: str) -> dict[str, str]:
    """Heading and meaning of a column."""
    if name in _KNOWN:
        heading, meaning = _KNOWN[name]
    elif lagged := _LAGGED.match(name):
        measure, lag, suffix = lagged.groups()
        tokens = "token" if lag == "1" else "tokens"
        after, more = _SUFFIXES[suffix]
        heading = f"{measure} {lag}{after}"
        kind = "of firing, Cohen's kappa" if measure == "kappa" else "of activation"
        meaning = f"autocorrelation {kind}, {lag} {tokens} apart{more}"
    else:
        heading, meaning = name.replace("_", " "), ""
    return {"name": name, "heading": heading, "meaning": meaning}


def pack_columns(pack: Pack, table: Mapping[str, NDArray[Any]], kinds: Sequence[str]) -> list[dict[str, Any]]:
    """Add the table's columns to the pack; what the page must know of each, in order.

    kinds: the clusters' names, which the column of names is given as numbers of.
    """
    described_columns: list[dict[str, Any]] = []
    for name, values_F in table.items():
        if name in _LEFT_OUT:
            continue
        if made := _EXCESS.match(name):
            measure, lag, null = made.groups()
            parts = [f"{measure}{lag}", f"{measure}{lag}_{null}_null"]
            if all(part in table for part in parts):
                described_columns.append({**described(name), "less": parts})
                continue
        if name == "cluster_name":
            numbers = {kind: number for number, kind in enumerate(kinds)}
            pack.add_indices(name, np.array([numbers.get(kind, -1) for kind in values_F]))
        elif _LAGGED.match(name) or name in (HOLD, GAIN, MATCH_COSINE):
            pack.add_fixed(name, values_F.astype(np.float64))
        else:
            pack.add_floats(name, values_F.astype(np.float64))
        described_columns.append(described(name))
    return described_columns
