"""Descriptors of a latent for its kind, and the rule that names kinds.

Shape legend: F latents, M latents of a cluster, X descriptors.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from legato.evaluation.sums.accumulators import DENSE_RATE
from legato.evaluation.sums.lag_pairs import Floats

# A cluster's name follows from the medians of its members: the first that reaches its value. The values were set by
# hand on the demo model's baseline and hysteresis SAEs: compare shares between SAEs, alone they mean little.
POSITIONAL_ETA2 = 0.1
PASSAGE_KAPPA16 = 0.05
PHRASE_KAPPA1 = 0.2
TOKEN_SHARE = 0.25
NAMES = ("token", "positional", "phrase", "passage", "dense", "unspecific")


@dataclass(frozen=True)
class Descriptor:
    """A column of the feature table as it is clustered. undefined_is: value in place of NaN; None: latent left out."""

    name: str
    column: str
    scale: Callable[[Floats], Floats] = np.asarray
    undefined_is: float | None = None


DESCRIPTORS = (
    Descriptor("log10_density", "density", np.log10),
    Descriptor("kappa1", "kappa1"),
    Descriptor("kappa4", "kappa4"),
    Descriptor("kappa16", "kappa16"),
    Descriptor("log2_half_life", "half_life", np.log2),  # censored ones at the largest lag
    Descriptor("eta2", "eta2"),
    Descriptor("token_mi", "token_mi_adjusted"),  # chance-corrected: the bias of the others grows as latents get rarer
    Descriptor("document_eta2", "document_eta2"),
    # A latent that never fires twice in a document has no gaps: no more and no fewer bursts than shuffled firings.
    Descriptor("burstiness", "burstiness_excess_within", undefined_is=0.0),
    Descriptor("log10_magnitude", "mean_activation", np.log10),
)


def describe(table: Mapping[str, NDArray[Any]], used: Sequence[Descriptor]) -> Floats:
    """Compute the descriptors, [F, X]; NaN where undefined, such as a lag that was not measured."""
    unmeasured_F = np.full(len(table["density"]), np.nan)
    columns = []
    for descriptor in used:
        values_F = np.asarray(table.get(descriptor.column, unmeasured_F), np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            values_F = np.asarray(descriptor.scale(values_F), np.float64)
        if descriptor.undefined_is is not None:
            values_F = np.where(np.isfinite(values_F), values_F, descriptor.undefined_is)
        columns.append(values_F)
    return np.column_stack(columns)


def medians(values_MX: Floats, used: Sequence[Descriptor]) -> dict[str, float]:
    return dict(zip((one.name for one in used), map(float, np.median(values_MX, axis=0)), strict=True))


def name_of(median: Mapping[str, float]) -> str:
    """Name the kind of a cluster's latents, from the medians of their descriptors (those that are defined).

    dense: fires at more than a tenth of the positions. positional: position alone explains a tenth of its variance.
    passage: after 16 tokens it still fires .05 beyond chance, for the passage or for the document's topic (the
    table's kappa16_excess_within tells them apart). phrase: at the next token it fires .2 beyond chance.
    token: the current token explains a quarter of its firing beyond chance. unspecific: none of these.
    """
    if 10 ** median.get("log10_density", -np.inf) > DENSE_RATE:
        return "dense"
    if median.get("eta2", 0.0) >= POSITIONAL_ETA2:
        return "positional"
    if median.get("kappa16", 0.0) >= PASSAGE_KAPPA16:
        return "passage"
    if median.get("kappa1", 0.0) >= PHRASE_KAPPA1:
        return "phrase"
    if median.get("token_mi", 0.0) >= TOKEN_SHARE:
        return "token"
    return "unspecific"
