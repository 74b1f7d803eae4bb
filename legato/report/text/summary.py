"""What a reader asks of a run first, each answered in a sentence or two from the saved results.

Did it train, is it as good as the baseline, do its features hold, what are they like. The answers speak of the
baseline and of the first method that was asked for; the other methods stand in the tables.
"""

from collections.abc import Sequence

from legato.report.text.verdict import KAPPA_EXCESS, SHUFFLED_EXCESS, Comparison, compare
from legato.results.saved_run import Arm, SavedRun, joined, mean, seed_groups
from legato.results.tolerances import SAME

KINDS_TOLD = 3

_COSTS = (("core.fvu", "FVU", -1), ("core.ce_loss_score", "CE score", 1), ("core.frac_alive", "alive latents", 1))


def answers(run: SavedRun) -> list[tuple[str, str]]:
    """(question, answer) pairs; a question whose numbers the run did not save is left out."""
    groups = seed_groups(run)
    base = groups[run.baseline.group] if run.baseline else groups[run.arms[0].group]
    found = next(iter(compare(run)), None)
    arms = groups[found.arm] if found else []
    told = [("Did it train?" if _was_trained(run) else "What was judged?", _trained(run, base))]
    if found:
        told.append((f"Is {found.arm} as good as the baseline?", _cost(arms, base)))
        told.append(("Do its features hold longer?", _hold(run, found, arms, base)))
    told.append(("What are its features like?", _kinds(arms[:1], base[:1])))
    return [(question, answer) for question, answer in told if answer]


def _was_trained(run: SavedRun) -> bool:
    return any(arm.value("training.training_steps") is not None for arm in run.trained)


def _trained(run: SavedRun, base: Sequence[Arm]) -> str:
    folder = run.path / "failed"
    failed = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    count = len(run.trained)
    if not _was_trained(run):
        told = f"{count} saved SAE{'s' * (count > 1)}, on held-out text."
    elif failed:
        told = f"Not all of it: {joined(failed)} failed (failed/ has the reason); {count} SAEs did."
    else:
        told = f"Yes, {'all ' * (count > 1)}{count} SAE{'s' * (count > 1)}: no loss or metric went out of bounds."
    fvu, score, alive = (mean(base, key) for key, *_ in _COSTS)
    parts = [f"leaves {fvu:.1%} of the variance unexplained"] if fvu is not None else []
    parts += [f"recovers {score:.1%} of the language model's loss"] if score is not None else []
    parts += [f"uses {alive:.1%} of its latents"] if alive is not None else []
    return (
        f"{told} The {'baseline' if run.baseline else f'first, {base[0].group},'} {joined(parts)}." if parts else told
    )


def _cost(arms: Sequence[Arm], base: Sequence[Arm]) -> str:
    """What it costs beside the baseline at the L0 it has, relative."""
    worse, told = [], []
    for key, name, better in _COSTS:
        ours, theirs = mean(arms, key), mean(base, key)
        if ours is None or not theirs:
            continue
        change = ours / theirs - 1
        told.append(f"{name} {change:+.1%}")
        worse += [name] if better * change < -SAME else []
    if not told:
        return ""
    l0 = [value for side in (arms, base) if (value := mean(side, "core.l0")) is not None]
    at = f", with {l0[0]:.1f} active latents a token against {l0[1]:.1f}" if len(l0) == 2 else ""
    return f"{f'Not in {joined(worse)}' if worse else 'Yes'}: {', '.join(told)}{at}."


def _hold(run: SavedRun, found: Comparison, arms: Sequence[Arm], base: Sequence[Arm]) -> str:
    if found.outcome == "collapsed":
        return f"Not comparable: {found.details[0]}"
    ours, theirs, left = mean(arms, KAPPA_EXCESS), mean(base, KAPPA_EXCESS), mean(arms, SHUFFLED_EXCESS)
    if ours is None or theirs is None:
        return ""
    numbers = f"kappa excess {ours:.3f} against {theirs:.3f}"
    if found.outcome != "longer":
        return " ".join([f"{'No' if found.outcome == 'same' else 'No, less long'}: {numbers}.", *_targets(run, found)])
    told = [f"{'Yes, but mostly by its mechanism' if found.mostly_mechanism else 'Yes'}: {numbers}"]
    told[0] += f", {found.times:.1f} times." if found.times is not None else "."
    if left is None or found.mechanism is None:
        told.append("How much of that its mechanism makes by itself was not measured.")
    else:
        told.append(
            f"On shuffled text it keeps {abs(left):.3f}, so its mechanism makes {found.mechanism:.0%} of the gain by "
            "itself, the order of the text the rest."
        )
    return " ".join([*told, *_targets(run, found)])


def _targets(run: SavedRun, found: Comparison) -> list[str]:
    """How many of the targets the method meets, and which it misses."""
    rows = ((run.matched or {}).get("methods", {}).get(found.arm) or {}).get("verdict") or []
    known = [row for row in rows if row["met"] is not None]
    if not known:
        return []
    missed = [f"{row['criterion']} {row['bound']}" for row in known if not row["met"]]
    which = f"; missed: {', '.join(missed)}" if missed else ""
    return [f"It meets {len(known) - len(missed)} of {len(rows)} targets at the baseline's L0{which}."]


def _kinds(arms: Sequence[Arm], base: Sequence[Arm]) -> str:
    shares = {arm.name: found for arm in (*arms, *base) if (found := _shares(arm))}
    if not shares:
        return ""
    told = [f"{name} {', '.join(found)}" for name, found in shares.items()]
    return (
        f"Most common kinds of latents: {'; '.join(told)}. Whether they mean anything, no number says: look at some in "
        "the feature browser (report.html, Features)."
    )


def _shares(arm: Arm) -> list[str]:
    """The commonest kinds of latents by the rule for single latents, with their share."""
    section = arm.metrics.get("specialisation") or {}
    kinds = section.get("by_latent") or {}
    ranked = sorted(kinds, key=lambda kind: -kinds[kind]["share_of_latents"])
    return [f"{kinds[kind]['share_of_latents']:.0%} {kind}" for kind in ranked[:KINDS_TOLD] if kinds[kind]["latents"]]
