"""Data of figures from the feature tables: latents with all of some columns, clusters with their style."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from legato.report.figures.style import FAINT, INK, MARKERS, ArmStyle, arm_colours
from legato.results.saved_run import Arm, SavedRun

_MIN_IN_MEDIAN = 15  # latents; fewer give no steady median


@dataclass(frozen=True)
class Latents:
    """latent: their numbers (M,). columns: the values asked for, each (M,), all finite."""

    latent: np.ndarray
    columns: tuple[np.ndarray, ...]

    def thinned(self, most: int) -> "Latents":
        """At most so many of them, evenly over the dictionary."""
        kept = np.unique(np.linspace(0, self.latent.size - 1, most).round().astype(int)) if len(self) > most else ...
        return Latents(self.latent[kept], tuple(column[kept] for column in self.columns))

    def __len__(self) -> int:
        return int(self.latent.size)


def latents_of(run: SavedRun, arm: Arm, names: Sequence[str], *, positive: bool = False) -> Latents | None:
    """The latents for which every column is defined (and positive); None where the table lacks one or none is."""
    found = [column for name in names if (column := run.latent_column(arm.name, name)) is not None]
    if len(found) < len(names):
        return None
    table = np.array(found)
    defined = np.isfinite(table).all(0)
    if positive:
        defined &= (np.where(defined, table, 0) > 0).all(0)
    kept = np.flatnonzero(defined)
    return Latents(kept, tuple(table[:, kept])) if kept.size else None


def running_median(latents: Latents, bins: int = 18) -> tuple[np.ndarray, np.ndarray]:
    """Median of the second column in bins of equal width in the log of the first; sparse bins are left out."""
    x, y = latents.columns
    edges = np.geomspace(x.min(), x.max() * (1 + 1e-9), bins + 1)
    inside = np.digitize(x, edges) - 1
    kept = [b for b in range(bins) if (inside == b).sum() >= _MIN_IN_MEDIAN]
    centres = np.sqrt(edges[:-1] * edges[1:])
    return centres[kept], np.array([np.median(y[inside == b]) for b in kept])


@dataclass(frozen=True)
class Cluster:
    """A cluster of an arm's latents. label: its kind, with its number where several clusters are of that kind."""

    number: int
    label: str
    style: ArmStyle
    found: dict[str, Any]  # its entry in metrics.json


def clusters_of(arm: Arm) -> list[Cluster]:
    """The clusters of an arm, none empty; [] where it has none."""
    section = arm.metrics.get("specialisation") or {}
    entries = [entry for entry in section.get("clusters") or [] if entry.get("latents")]
    kinds = [entry["name"] for entry in section.get("clusters") or []]
    found = []
    for entry in entries:
        kind, number = entry["name"], int(entry["cluster"])
        same = [i for i, name in enumerate(kinds) if name == kind]
        label = kind if len(same) == 1 else f"{kind} {same.index(number) + 1}"
        found.append(Cluster(number, label, kind_style(kind, same.index(number)), entry))
    return found


def kind_style(kind: str, member: int = 0) -> ArmStyle:
    """A kind's colour is the same in every run; its second cluster has another one, and markers differ besides."""
    number = _KINDS.index(kind) if kind in _KINDS else -1
    colour = _SECOND.get(kind, INK) if member else FAINT if number < 0 else arm_colours()[1 + number]
    return ArmStyle(colour, (), MARKERS[(number + 1 + 3 * member) % len(MARKERS)])


_KINDS = ("phrase", "token", "passage", "dense", "positional")  # any other is in faint grey
_SECOND = {"phrase": arm_colours()[5], "token": arm_colours()[6]}
