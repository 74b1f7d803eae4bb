"""Compare each method of a run with the baseline: is its kappa excess higher, at what cost, and what makes the gain.

A difference counts as one only past stated limits, so that the words never claim more than the numbers carry.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from legato.report.text.words import paragraphs
from legato.results.saved_run import Arm, SavedRun, mean, seed_groups, standard_error
from legato.results.tolerances import SAME

KAPPA_EXCESS = "consistency.kappa1_excess_within"
SHUFFLED_EXCESS = "consistency.position_shuffled.kappa1_excess_within"

# With one seed there is no interval: a smaller relative difference in kappa excess is called no difference.
NOTICEABLE = 0.10
STANDARD_ERRORS = 2.0
MIN_LATENTS_IN_BIN = 20
COLLAPSED_L0 = 0.20  # of the baseline's
COLLAPSED_SILENT = 0.50
MOSTLY_MECHANISM = 0.50  # of the gain in kappa excess that is still there on shuffled activations


@dataclass(frozen=True)
class Comparison:
    """A named arm against the baseline.

    outcome: "higher", "same", "lower", "collapsed" or "unknown": its kappa excess at lag 1 beside the baseline's.
    matched: whether L0 and FVU are close enough to the baseline's for that to be a fair comparison.
    headline: the outcome in one clause. details: the numbers behind it and what limits them, a sentence each.
    excess: kappa excess, the baseline's, and on activations in shuffled order, where each was measured.
    times: kappa excess over the baseline's; None where that is not above 0.
    mechanism: of a gain, the share that remains on activations in shuffled order; None where that was not measured.
    """

    arm: str
    outcome: str
    matched: bool
    headline: str
    details: tuple[str, ...]
    excess: float | None = None
    baseline_excess: float | None = None
    shuffled_excess: float | None = None
    times: float | None = None
    mechanism: float | None = None

    @property
    def mostly_mechanism(self) -> bool:
        return self.mechanism is not None and self.mechanism > MOSTLY_MECHANISM


def headline(run: SavedRun) -> str:
    """The comparison in a sentence or two: who gains at a matched cost, and whose gain is mostly mechanism."""
    found = compare(run)
    higher = [c for c in found if c.outcome == "higher"]
    fair = [c for c in higher if c.matched] or higher
    like_first = [c for c in fair if c.mostly_mechanism == fair[0].mostly_mechanism]
    told = paragraphs(
        "headline",
        baseline=run.baseline is not None,
        found=found,
        comparable=any(c.outcome not in ("collapsed", "unknown") for c in found),
        gains=[arms for arms in (like_first, [c for c in fair if c not in like_first]) if arms],
    )
    return " ".join(told)


def compare(run: SavedRun) -> list[Comparison]:
    """Each named recipe against the baseline; empty where there is no baseline or nothing to compare with it."""
    if run.baseline is None:
        return []
    groups = seed_groups(run)
    base = groups[run.baseline.group]
    return [_compare(arms, base) for arms in groups.values() if arms[0].role == "named"]


def _compare(arms: Sequence[Arm], base: Sequence[Arm]) -> Comparison:
    (ours, theirs), fvu, l0 = (_both(arms, base, key) for key in (KAPPA_EXCESS, "core.fvu", "core.l0"))
    fallen = _collapse(arms[0], base[0])
    error, outcome, matched, times, mechanism, kept = None, "collapsed" if fallen else "unknown", False, None, None, ""
    if ours is not None and theirs is not None and not fallen:
        samples = [[v for arm in group if (v := arm.value(KAPPA_EXCESS)) is not None] for group in (arms, base)]
        error = math.hypot(*map(standard_error, samples)) if min(map(len, samples)) > 1 else None
        limit = NOTICEABLE * abs(theirs) if error is None else STANDARD_ERRORS * error
        outcome = "same" if abs(ours - theirs) <= limit else "higher" if ours > theirs else "lower"
        matched = _near(l0) and _near(fvu, or_below=True)
        times = ours / theirs if theirs > 0 else None
        if outcome == "higher":
            mechanism, kept = made_by_itself(arms, base)
    # A gain by firing more often shows in no bin of the firing rate.
    ours_in, theirs_in = arms[0].rate_bins, base[0].rate_bins
    bins = [b for b in ours_in if b in theirs_in and min(ours_in[b][1], theirs_in[b][1]) >= MIN_LATENTS_IN_BIN]
    told = paragraphs(
        "comparison",
        arm=arms[0].group,
        outcome=outcome,
        fallen=fallen,
        excess=(ours, theirs),
        times=times,
        error=error,
        noticeable=NOTICEABLE,
        seeds=(len(arms), len(base)),
        fvu=fvu,
        l0=l0,
        matched=matched,
        unmatched=["reconstruction"] * (not _near(fvu, or_below=True)) + ["sparsity"] * (not _near(l0)),
        beyond_position=_both(arms, base, "consistency.kappa1_excess_cross"),
        bins=(sum(ours_in[b][0] > theirs_in[b][0] for b in bins), len(bins)),
        latents_in_bin=MIN_LATENTS_IN_BIN,
        mechanism=mechanism,
        mostly=MOSTLY_MECHANISM,
        kept=kept,
    )
    shuffled = mean(arms, SHUFFLED_EXCESS)
    return Comparison(
        arms[0].group, outcome, matched, told[0], tuple(told[1:]), ours, theirs, shuffled, times, mechanism
    )


def made_by_itself(arms: Sequence[Arm], base: Sequence[Arm]) -> tuple[float | None, str]:
    """Compute the share of a gain in kappa excess that remains on activations in shuffled order, and say it in words.

    The share is None where it was not measured, and where there is no gain that it could be a share of.
    """
    (ours, theirs), (left, left_base) = (_both(arms, base, key) for key in (KAPPA_EXCESS, SHUFFLED_EXCESS))
    share, gained = None, True
    if ours is not None and theirs is not None:
        gained = ours > theirs
        if gained and left is not None and left_base is not None:
            share = max(0.0, (left - left_base) / (ours - theirs))
    return share, paragraphs("mechanism", gained=gained, share=share, left=left)[0]


def _both(arms: Sequence[Arm], base: Sequence[Arm], key: str) -> tuple[float | None, float | None]:
    return mean(arms, key), mean(base, key)


def _collapse(arm: Arm, base: Arm) -> dict[str, float]:
    """The numbers of an SAE that hardly fires any more: l0 and the baseline's, or the share that is silent."""
    l0, base_l0, alive = arm.value("core.l0"), base.value("core.l0"), arm.value("core.frac_alive")
    if l0 is not None and base_l0 is not None and l0 < COLLAPSED_L0 * base_l0:
        return {"l0": l0, "base_l0": base_l0}
    return {"silent": 1 - alive} if alive is not None and 1 - alive > COLLAPSED_SILENT else {}


def _near(pair: tuple[float | None, float | None], or_below: bool = False) -> bool:
    """Tell if a cost counts as the baseline's; or_below: a lower one counts too."""
    ours, theirs = pair
    if ours is None or not theirs:
        return False
    change = ours / theirs - 1
    return change <= SAME if or_below else abs(change) <= SAME
