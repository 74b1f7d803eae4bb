"""A recipe of a run with its seeds: one row, line or mark in a comparison of runs."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from legato.report.figures.style import ArmStyle, run_styles
from legato.results.saved_run import Arm, SavedRun, seed_groups, standard_error

LEVEL = 0.95
_MOST_CHARACTERS = 28  # of a name in a figure


@dataclass(frozen=True)
class Recipe:
    """One recipe of one run with its seeds, as a row of the overview and a line of the other figures."""

    run: str
    arms: tuple[Arm, ...]
    style: ArmStyle

    @property
    def name(self) -> str:
        return self.arms[0].group

    @property
    def baseline(self) -> bool:
        return self.arms[0].role == "baseline"

    def _values(self, key: str) -> list[float]:
        return [value for arm in self.arms if (value := arm.value(key)) is not None]

    def estimate(self, key: str) -> tuple[float, float] | None:
        """Mean over seeds and its standard error (0 with one seed); None where no seed has the value."""
        values = self._values(key)
        error = standard_error(values) if len(values) > 1 else 0.0
        return (float(np.mean(values)), error) if values else None

    def interval(self, key: str) -> tuple[float, float] | None:
        """95 % interval of the mean: Student's t over several seeds; with one seed the bootstrap over documents that
        the evaluation saved beside a consistency measure, None where it saved none."""
        values = self._values(key)
        if len(values) > 1:
            half = float(stdtrit(len(values) - 1, (1 + LEVEL) / 2)) * standard_error(values)
            return float(np.mean(values)) - half, float(np.mean(values)) + half
        group, _, measure = key.rpartition(".")
        ends = self.arms[0].series(f"{group}.interval95.{measure}")
        return None if ends is None or not all(map(math.isfinite, ends)) else (float(ends[0]), float(ends[1]))


def shortened(name: str) -> str:
    return name if len(name) <= _MOST_CHARACTERS else name[: _MOST_CHARACTERS - 1] + "\u2026"


def recipes_of(runs: Mapping[str, SavedRun], *, highlighted: bool = True) -> list[Recipe]:
    """The recipes of the runs, by label: the baselines and named ones, or with highlighted=False all the others."""
    styles = run_styles(list(runs))
    return [
        Recipe(label, tuple(arms), styles[label])
        for label, run in runs.items()
        for arms in seed_groups(run).values()
        if any(arm in run.highlighted for arm in arms) == highlighted
    ]
