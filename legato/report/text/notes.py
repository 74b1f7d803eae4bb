"""Write notes.txt: what a run's numbers say in words, with what they do not say.

Everything is read from the saved results; verdict.py judges each method against the baseline.
"""

import math
from pathlib import Path

from legato.common.files import write_atomically
from legato.common.progress import duration
from legato.report.text.arm_table import results_table
from legato.report.text.latents import latents_in_words, redundancy_lines
from legato.report.text.matched_tables import legend, tables
from legato.report.text.summary import answers
from legato.report.text.verdict import KAPPA_EXCESS, NOTICEABLE, compare, headline
from legato.report.text.words import paragraphs, render
from legato.results.saved_run import SavedRun, mean, seed_groups
from legato.results.tolerances import SAME

FEW_TRAINING_TOKENS = 10_000_000
FEW_HELD_OUT_TOKENS = 50_000
LIMITS = {"silent": 0.05, "dense": 0.01, "fvu": 0.30, "ce": 0.80}  # silent, dense: shares of the latents


def write_notes(run: SavedRun | str | Path) -> Path:
    """Write notes.txt in a run folder from its saved results; return its path."""
    run = SavedRun.of(run)
    path = run.path / "notes.txt"
    write_atomically(path, notes(run).encode())
    return path


def notes(run: SavedRun) -> str:
    """The text of notes.txt: what was run, the results per arm, what the comparison says and does not say."""
    return render(
        "notes",
        name=run.name,
        described=described(run),
        answers=answers(run),
        results=results_table(run),
        tables=[table.without(("kappa", "AC")) for table in tables(run.matched)] if run.matched else [],
        legend=legend(run.matched) if run.matched else [],
        comparisons=compare(run),
        headline=headline(run),
        ablation=ablation_in_words(run),
        latents=latents_in_words(run),
        redundancy=redundancy_lines({arm.name: arm.metrics for arm in run.highlighted}),
        scope=scope(run),
        warnings=warnings(run),
    )


def warnings(run: SavedRun) -> list[str]:
    """Warn of what makes the numbers weak: few tokens, silent or dense latents, poor fits."""
    trained = [tokens for arm in run.trained if (tokens := arm.value("training.tokens")) is not None]
    judged = [tokens for arm in run.arms if (tokens := arm.value("core.tokens")) is not None]
    width = run.setting("training", "d_sae")
    beyond = {
        "silent": ("core.frac_alive", lambda alive: 1 - alive > LIMITS["silent"]),
        "dense": ("core.dense", lambda dense: isinstance(width, int) and dense > LIMITS["dense"] * width),
        "fvu": ("core.fvu", lambda fvu: fvu > LIMITS["fvu"]),
        "ce": ("core.ce_loss_score", lambda score: score < LIMITS["ce"]),
    }
    return paragraphs(
        "warnings",
        few_training_tokens=min((tokens for tokens in trained if tokens < FEW_TRAINING_TOKENS), default=None),
        few_held_out_tokens=min((tokens for tokens in judged if tokens < FEW_HELD_OUT_TOKENS), default=None),
        limits=LIMITS,
        flagged={
            name: [arm.name for arm in run.trained if (value := arm.value(key)) is not None and test(value)]
            for name, (key, test) in beyond.items()
        },
        saes=len(run.trained),
    )


def scope(run: SavedRun) -> list[str]:
    """Say what the comparison does not show, for any numbers."""
    found = compare(run)
    gains = [c for c in found if c.outcome == "higher"]
    known = [c for c in gains if c.mechanism is not None]
    kept = [c for c in known if (c.shuffled_excess or 0.0) >= NOTICEABLE * (c.excess or 0.0)]
    return paragraphs(
        "scope",
        model=run.setting("model", "model"),
        layer=run.setting("model", "layer"),
        dataset=run.setting("data", "dataset"),
        one_seed=all(len(arms) == 1 for arms in seed_groups(run).values()),
        compared=bool(found),
        kept=kept,
        gone=[c.arm for c in known if c not in kept],
        unknown=[c.arm for c in gains if c.mechanism is None],
        swept=any(arm.role == "sweep" for arm in run.arms),
    )


def ablation_in_words(run: SavedRun) -> list[str]:
    """Put the window x coefficient ablation in words, a sentence each; empty where there is none."""
    members = [(value, arm) for arm in run.arms if arm.in_grid and (value := arm.value(KAPPA_EXCESS)) is not None]
    if not members or run.baseline is None:
        return []
    excess, fvu = (run.baseline.value(key) for key in (KAPPA_EXCESS, "core.fvu"))
    best_excess, best = max(members, key=lambda member: member[0])
    free = None
    if excess is not None and fvu is not None:
        gaining = [arm for value, arm in members if value > (1 + NOTICEABLE) * excess]
        free = sum((arm.value("core.fvu") or math.inf) <= (1 + SAME) * fvu for arm in gaining)
    return paragraphs(
        "ablation",
        members=len(members),
        windows=sorted({arm.window for _, arm in members} - {None}),
        coefficients=sorted({arm.coefficient for _, arm in members} - {None}),
        best=best.name,
        best_excess=best_excess,
        best_fvu=best.value("core.fvu"),
        excess=excess,
        fvu=fvu,
        free=free,
        noticeable=NOTICEABLE,
        same=SAME,
    )


def described(run: SavedRun) -> list[str]:
    """Describe the run, a sentence each, as far as the saved configuration tells."""
    return paragraphs(
        "described",
        saved=bool(run.config),
        get=run.setting,
        saes=len(run.trained),
        tokens=mean(run.arms, "training.tokens"),
        epochs=mean(run.arms, "training.epochs"),
        seconds=mean(run.arms, "training.wall_seconds"),
        environment=run.config.get("environment"),
        stages={name: duration(seconds) for name, seconds in run.timings.items()},
    )
