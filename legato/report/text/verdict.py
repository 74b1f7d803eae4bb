"""Each method of a run against the baseline: does it hold its features longer, at what cost, and what makes the gain.

A difference counts as one only past stated limits, so that the words never claim more than the numbers carry.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from legato.results.saved_run import Arm, SavedRun, joined, mean, seed_groups, standard_error
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


def headline(run: SavedRun) -> str:
    """The comparison in a sentence or two: who gains at a matched cost, and whose gain is mostly mechanism."""
    found = compare(run)
    if run.baseline is None:
        return "There is no baseline in this run, so nothing is compared."
    if not found:
        return "There is only the baseline, so nothing is compared."
    longer = [c for c in found if c.outcome == "longer"]
    fair = [c for c in longer if c.matched] or longer
    if not fair:
        if all(c.outcome in ("collapsed", "unknown") for c in found):
            return "No temporal arm can be compared: each collapsed or was not measured."
        return "No temporal arm holds its features longer than the baseline."
    cost = "at matched sparsity and reconstruction" if fair[0].matched else "but not at a matched cost"
    told = []
    for mechanism in (fair[0].mostly_mechanism, not fair[0].mostly_mechanism):
        arms = [c for c in fair if c.mostly_mechanism == mechanism]
        if not arms:
            continue
        verb = "holds its" if len(arms) == 1 else "hold their"
        who = joined([c.arm if mechanism or c.times is None else f"{c.arm} ({c.times:.1f} times)" for c in arms])
        told.append(f"{who} {verb} features longer than the baseline {cost}" + _made_by(arms) * mechanism + ".")
    return " ".join(told)


@dataclass(frozen=True)
class Comparison:
    """A named arm against the baseline.

    outcome: "longer", "same", "shorter", "collapsed" or "unknown": how long its features hold by kappa excess at lag 1.
    matched: whether L0 and FVU are close enough to the baseline's for that to be a fair comparison.
    headline: the outcome in one clause. details: the numbers behind it and what limits them, a sentence each.
    times: kappa excess over the baseline's; None where that is not above 0.
    mechanism: of a gain, the share that remains on activations in shuffled order; None where that was not measured.
    """

    arm: str
    outcome: str
    matched: bool
    headline: str
    details: tuple[str, ...]
    times: float | None = None
    mechanism: float | None = None

    @property
    def mostly_mechanism(self) -> bool:
        return self.mechanism is not None and self.mechanism > MOSTLY_MECHANISM


def compare(run: SavedRun) -> list[Comparison]:
    """Each named recipe against the baseline; empty where there is no baseline or nothing to compare with it."""
    if run.baseline is None:
        return []
    groups = seed_groups(run)
    base = groups[run.baseline.group]
    return [_compare(arms, base) for arms in groups.values() if arms[0].role == "named"]


def _made_by(arms: Sequence[Comparison]) -> str:
    low, high = (pick(c.mechanism or 0.0 for c in arms) for pick in (min, max))
    share = f"{high:.0%}" if f"{low:.0%}" == f"{high:.0%}" else f"{low:.0%} to {high:.0%}"
    return f", but {share} of that gain is made by the mechanism: it remains on shuffled text"


def _compare(arms: Sequence[Arm], base: Sequence[Arm]) -> Comparison:
    name = arms[0].group
    if reason := _collapse(arms[0], base[0]):
        return Comparison(name, "collapsed", False, f"{name} collapsed", (reason,))
    ours, theirs = mean(arms, KAPPA_EXCESS), mean(base, KAPPA_EXCESS)
    if ours is None or theirs is None:
        return Comparison(name, "unknown", False, f"{name} has no measured consistency", ())

    difference, error = ours - theirs, _error_of_difference(arms, base, KAPPA_EXCESS)
    limit = NOTICEABLE * abs(theirs) if error is None else STANDARD_ERRORS * error
    outcome = "same" if abs(difference) <= limit else "longer" if difference > 0 else "shorter"
    matched, cost = _match(arms, base)
    words = {
        "longer": f"{name} holds its features longer than the baseline",
        "same": f"{name} holds its features about as long as the baseline",
        "shorter": f"{name} holds its features less long than the baseline",
    }
    times = ours / theirs if theirs > 0 else None
    more = f", {times:.1f} times" if times is not None and outcome == "longer" else ""
    spread = (
        f"{len(arms)} and {len(base)} seeds, standard error of the difference {error:.3f}"
        if error is not None
        else f"one seed, so no interval; below {NOTICEABLE:.0%} of the baseline's value counts as no difference"
    )
    details = [f"Kappa excess at lag 1 is {ours:.3f} against {theirs:.3f} ({difference:+.3f}{more}; {spread}).", cost]
    details += [sentence for sentence in (_beyond_position(arms, base), _across_rates(arms[0], base[0])) if sentence]
    mechanism = None
    if outcome == "longer":
        mechanism, kept = made_by_itself(arms, base)
        details.append(kept)
    unmatched = ", but not at a matched cost" if outcome == "longer" else ", and not at a matched cost"
    tail = ", at matched sparsity and reconstruction" if matched else unmatched
    if mechanism is not None and mechanism > MOSTLY_MECHANISM:
        tail += f"; {mechanism:.0%} of the gain remains on shuffled text, made by its mechanism"
    return Comparison(name, outcome, matched, words[outcome] + tail, tuple(details), times, mechanism)


def made_by_itself(arms: Sequence[Arm], base: Sequence[Arm]) -> tuple[float | None, str]:
    """Which share of a gain in kappa excess remains on activations in shuffled order, and that in words.

    The share is None where it was not measured, and where there is no gain that it could be a share of.
    """
    ours, theirs, left, left_base = (mean(a, key) for key in (KAPPA_EXCESS, SHUFFLED_EXCESS) for a in (arms, base))
    if ours is not None and theirs is not None and ours <= theirs:
        return None, "There is no gain in kappa excess over the baseline."
    if ours is None or theirs is None or left is None or left_base is None:
        return None, "Part of the gain may be made by the mechanism: the control on shuffled text was not run for it."
    share = max(0.0, (left - left_base) / (ours - theirs))
    return share, (
        f"On the same activations in shuffled order it keeps a kappa excess of {left + 0.0:.3f}: {share:.0%} of the "
        "gain is made by its mechanism, the rest by the order of the text."
    )


def _collapse(arm: Arm, base: Arm) -> str | None:
    l0, base_l0, alive = arm.value("core.l0"), base.value("core.l0"), arm.value("core.frac_alive")
    if l0 is not None and base_l0 is not None and l0 < COLLAPSED_L0 * base_l0:
        return f"L0 fell to {l0:.1f} against the baseline's {base_l0:.1f}; its consistency says nothing."
    if alive is not None and 1 - alive > COLLAPSED_SILENT:
        return f"{1 - alive:.0%} of its latents never fire on held-out text; its consistency says nothing."
    return None


def _match(arms: Sequence[Arm], base: Sequence[Arm]) -> tuple[bool, str]:
    fvu, base_fvu, l0, base_l0 = (mean(a, key) for key in ("core.fvu", "core.l0") for a in (arms, base))
    if fvu is None or base_fvu is None or l0 is None or base_l0 is None:
        return False, "FVU or L0 is missing, so whether the comparison is fair is unknown."
    numbers = f"FVU {fvu:.3f} against {base_fvu:.3f}, L0 {l0:.1f} against {base_l0:.1f}"
    same_l0, same_fvu = abs(l0 / base_l0 - 1) <= SAME, fvu / base_fvu - 1 <= SAME
    if same_l0 and same_fvu:
        return True, f"The cost is matched: {numbers}."
    what = " and ".join(["reconstruction"] * (not same_fvu) + ["sparsity"] * (not same_l0))
    return False, f"The cost is not matched in {what}: {numbers}. Part of the difference may come from that."


def _beyond_position(arms: Sequence[Arm], base: Sequence[Arm]) -> str | None:
    ours, theirs = (mean(a, "consistency.kappa1_excess_cross") for a in (arms, base))
    if ours is None or theirs is None:
        return None
    return f"Over the null that keeps only position the excess is {ours:.3f} against {theirs:.3f}."


def _across_rates(arm: Arm, base: Arm) -> str | None:
    """In how many firing-rate bins the arm is ahead: a gain by firing more often shows in none of them."""
    ours, theirs = arm.rate_bins, base.rate_bins
    shared = [
        edges for edges in ours if edges in theirs and min(ours[edges][1], theirs[edges][1]) >= MIN_LATENTS_IN_BIN
    ]
    if not shared:
        return None
    ahead = sum(ours[edges][0] > theirs[edges][0] for edges in shared)
    bins = "firing-rate bin" if len(shared) == 1 else "firing-rate bins"
    return f"It is ahead in {ahead} of {len(shared)} {bins} with at least {MIN_LATENTS_IN_BIN} latents."


def _error_of_difference(arms: Sequence[Arm], base: Sequence[Arm], key: str) -> float | None:
    samples = [[value for arm in group if (value := arm.value(key)) is not None] for group in (arms, base)]
    if min(map(len, samples)) < 2:
        return None
    return math.hypot(*(standard_error(sample) for sample in samples))
