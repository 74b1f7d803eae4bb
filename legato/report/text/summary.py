"""Answer what a reader asks of a run first, each in a sentence or two from the saved results.

Did it train, is it as good as the baseline, do its features hold, what are they like. The answers speak of the
baseline and of the first method that was asked for; the other methods stand in the tables.
"""

from legato.report.text.verdict import compare
from legato.report.text.words import paragraphs
from legato.results.saved_run import Arm, SavedRun, mean, seed_groups
from legato.results.tolerances import SAME

KINDS_TOLD = 3

_COSTS = (("core.fvu", "FVU", -1), ("core.ce_loss_score", "CE score", 1), ("core.frac_alive", "alive latents", 1))


def answers(run: SavedRun) -> list[tuple[str, str]]:
    """(question, answer) pairs; a question whose numbers the run did not save is left out."""
    groups = seed_groups(run)
    base = groups[run.baseline.group] if run.baseline else groups[run.arms[0].group]
    found = next(iter(compare(run)), None)
    arms = groups[found.arm] if found else []
    failed = run.path / "failed"
    # What it costs beside the baseline at the L0 it has, relative.
    both = [(name, better, mean(arms, key), mean(base, key)) for key, name, better in _COSTS]
    costs = [(name, better, ours / theirs - 1) for name, better, ours, theirs in both if ours is not None and theirs]
    l0 = [value for side in (arms, base) if (value := mean(side, "core.l0")) is not None]
    rows = ((run.matched or {}).get("methods", {}).get(found.arm if found else "") or {}).get("verdict") or []
    known = [row for row in rows if row["met"] is not None]
    told = paragraphs(
        "summary",
        was_trained=any(arm.value("training.training_steps") is not None for arm in run.trained),
        failed=sorted(path.name for path in failed.iterdir()) if failed.is_dir() else [],
        saes=len(run.trained),
        has_baseline=run.baseline is not None,
        base={"name": base[0].group}
        | {name: mean(base, key) for name, (key, *_) in zip(("fvu", "score", "alive"), _COSTS, strict=True)},
        found=found,
        changes=[(name, change) for name, _, change in costs],
        worse=[name for name, better, change in costs if better * change < -SAME],
        l0=l0 if len(l0) == 2 else None,
        all_targets=len(rows),
        targets=len(known),
        missed=[f"{row['criterion']} {row['bound']}" for row in known if not row["met"]],
        kinds={arm.name: shares for arm in (*arms[:1], *base[:1]) if (shares := _shares(arm))},
    )
    return list(zip(told[::2], told[1::2], strict=True))


def _shares(arm: Arm) -> list[tuple[str, float]]:
    """The commonest kinds of latents by the rule for single latents, with their share."""
    kinds = (arm.metrics.get("specialisation") or {}).get("by_latent") or {}
    ranked = sorted(kinds, key=lambda kind: -kinds[kind]["share_of_latents"])
    return [(kind, kinds[kind]["share_of_latents"]) for kind in ranked[:KINDS_TOLD] if kinds[kind]["latents"]]
