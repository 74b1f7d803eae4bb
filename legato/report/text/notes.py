"""What a run's numbers say in words, with what they do not say: notes.txt.

Everything is read from the saved results; verdict.py judges each method against the baseline.
"""

import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

from legato.common.files import write_atomically
from legato.report.text.arm_table import number, results_table
from legato.report.text.latents import latents_in_words
from legato.report.text.matched_tables import legend, tables
from legato.report.text.summary import answers
from legato.report.text.verdict import KAPPA_EXCESS, NOTICEABLE, SHUFFLED_EXCESS, compare, headline
from legato.results.saved_run import Arm, SavedRun, joined, mean, seed_groups
from legato.results.tolerances import SAME

FEW_TRAINING_TOKENS = 10_000_000
FEW_HELD_OUT_TOKENS = 50_000
MANY_SILENT = 0.05
MANY_DENSE = 0.01
POOR_FVU = 0.30
POOR_CE_SCORE = 0.80


def warnings(run: SavedRun) -> list[str]:
    """What a reader must know before believing any number: few tokens, silent or dense latents, poor fits."""
    found = []
    trained = [tokens for arm in run.trained if (tokens := arm.value("training.tokens")) is not None]
    if trained and min(trained) < FEW_TRAINING_TOKENS:
        found.append(
            f"Few training tokens: {count(min(trained))} per SAE. Published SAEs see hundreds of millions or more, so "
            "these latents are not settled."
        )
    judged = [tokens for arm in run.arms if (tokens := arm.value("core.tokens")) is not None]
    if judged and min(judged) < FEW_HELD_OUT_TOKENS:
        found.append(f"Few held-out tokens: {count(min(judged))}. Rare latents are judged on a handful of firings.")
    for text, flagged in (
        (f"more than {MANY_SILENT:.0%} of the latents never fire on held-out text", _flag(run, _many_silent)),
        (f"more than {MANY_DENSE:.0%} of the latents are dense (fire on over 10 % of tokens)", _flag(run, _many_dense)),
        (f"FVU above {POOR_FVU:.2f} on held-out text", _flag(run, _poor_fvu)),
        (f"CE loss score below {POOR_CE_SCORE:.2f}", _flag(run, _poor_ce)),
    ):
        if flagged:
            found.append(f"{text[0].upper()}{text[1:]}: {_listed(flagged, len(run.trained))}.")
    return found


def _flag(run: SavedRun, test: Callable[[SavedRun, Arm], bool]) -> list[str]:
    return [arm.name for arm in run.trained if test(run, arm)]


def _many_silent(run: SavedRun, arm: Arm) -> bool:
    alive = arm.value("core.frac_alive")
    return alive is not None and 1 - alive > MANY_SILENT


def _many_dense(run: SavedRun, arm: Arm) -> bool:
    dense, width = arm.value("core.dense"), run.setting("training", "d_sae")
    return dense is not None and isinstance(width, int) and dense > MANY_DENSE * width


def _poor_fvu(run: SavedRun, arm: Arm) -> bool:
    fvu = arm.value("core.fvu")
    return fvu is not None and fvu > POOR_FVU


def _poor_ce(run: SavedRun, arm: Arm) -> bool:
    score = arm.value("core.ce_loss_score")
    return score is not None and score < POOR_CE_SCORE


def _listed(names: Sequence[str], total: int) -> str:
    if len(names) == total > 1:
        return "both arms" if total == 2 else f"all {total} arms"
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _made_by_itself(run: SavedRun) -> list[str]:
    """How much of each gain is still there when the activations come in shuffled order, as far as that was measured."""
    groups = seed_groups(run)
    kept, none, unknown = [], [], []
    for found in compare(run):
        ours, left = (mean(groups[found.arm], key) for key in (KAPPA_EXCESS, SHUFFLED_EXCESS))
        if found.outcome != "longer" or ours is None:
            continue
        if found.mechanism is None or left is None:
            unknown.append(found.arm)
        elif left < NOTICEABLE * ours:
            none.append(found.arm)
        else:
            kept.append(f"{found.arm} {left:.3f} of {ours:.3f}")
    left_over = [f"for {joined(kept)}"] if kept else []
    left_over += [f"next to nothing for {joined(none)}"] if none else []
    told = []
    if left_over:
        told.append(
            "Part of a gain is made by the mechanism itself: on the same activations in shuffled order, the kappa "
            f"excess that remains is {'; '.join(left_over)}."
        )
    if unknown:
        told.append(
            f"Part of the gain of {joined(unknown)} may be made by the mechanism: the shuffled control was not run."
        )
    return told


def scope(run: SavedRun) -> list[str]:
    """What the comparison does not say, whatever its numbers."""
    model, layer, dataset = run.setting("model", "model"), run.setting("model", "layer"), run.setting("data", "dataset")
    where = f"model {model}, layer {layer}, text {dataset}" if model is not None else "one model, one layer, one text"
    limits = [f"Everything here holds for {where}; other layers and models may differ."]
    if all(len(arms) == 1 for arms in seed_groups(run).values()):
        limits.append(
            "Each recipe ran with one seed. Another seed moves these numbers by an amount this run cannot tell."
        )
    if compare(run):
        limits.append("Latents that hold longer are not thereby more meaningful.")
        limits += _made_by_itself(run)
    if not any(arm.role == "sweep" for arm in run.arms):
        limits.append("There is no sweep of the baseline over sparsity, so a cost in FVU cannot be priced in L0.")
    return limits


def ablation_in_words(run: SavedRun) -> list[str]:
    """What the window x coefficient ablation says, a sentence each; empty where there is none."""
    members = [arm for arm in run.arms if arm.in_grid and arm.value(KAPPA_EXCESS) is not None]
    if not members or run.baseline is None:
        return []
    excess, fvu = (run.baseline.value(key) for key in (KAPPA_EXCESS, "core.fvu"))
    best = max(members, key=lambda arm: arm.value(KAPPA_EXCESS) or -math.inf)
    sentences = [
        f"{len(members)} members over windows {_values(members, 'window')} and coefficients "
        f"{_values(members, 'coefficient')}.",
        f"The largest kappa excess is {best.value(KAPPA_EXCESS):.3f} ({best.name}, FVU "
        f"{number(best.value('core.fvu'), 3)}); the baseline has {number(excess, 3)} at FVU {number(fvu, 3)}.",
    ]
    if excess is not None and fvu is not None:
        free = [
            arm
            for arm in members
            if (arm.value(KAPPA_EXCESS) or 0) > (1 + NOTICEABLE) * excess
            and (arm.value("core.fvu") or math.inf) <= (1 + SAME) * fvu
        ]
        sentences.append(
            f"{len(free)} of {len(members)} exceed the baseline's kappa excess by more than {NOTICEABLE:.0%} while "
            f"FVU stays within {SAME:.0%} of the baseline's."
        )
    return sentences


def _values(arms: Sequence[Arm], name: str) -> str:
    return ", ".join(f"{value:g}" for value in sorted({getattr(arm, name) for arm in arms} - {None}))


def notes(run: SavedRun) -> str:
    """The text of notes.txt: what was run, the results per arm, what the comparison says and does not say."""
    sections = [
        ("What was run", _paragraph(described(run))),
        ("In short", _list([f"{question} {answer}" for question, answer in answers(run)])),
        ("Results on held-out text", results_table(run)),
        ("At the baseline's sparsity and reconstruction", matched_tables(run)),
        ("What the comparison says", "\n\n".join(_comparisons(run))),
        ("What the ablation says", _paragraph(ablation_in_words(run))),
        ("What the latents are like", latents_in_words(run)),
        ("What it does not say", _list(scope(run))),
        ("Warnings", _list(warnings(run))),
    ]
    title = f"Legato run {run.name}"
    body = [f"{heading}\n{'-' * len(heading)}\n{text}" for heading, text in sections if text]
    return f"{title}\n{'=' * len(title)}\n\n" + "\n\n".join(body) + "\n"


def _paragraph(sentences: Sequence[str]) -> str:
    return textwrap.fill(" ".join(sentences), 100, break_long_words=False, break_on_hyphens=False)


def _list(sentences: Sequence[str]) -> str:
    return "\n".join(textwrap.fill(s, 100, initial_indent="- ", subsequent_indent="  ") for s in sentences)


def _comparisons(run: SavedRun) -> list[str]:
    paragraphs = [_paragraph([f"{found.headline}.", *found.details]) for found in compare(run)]
    return paragraphs if len(paragraphs) == 1 else [_paragraph([headline(run)]), *paragraphs]


def described(run: SavedRun) -> list[str]:
    """What was run, a sentence each, as far as the saved configuration tells."""
    get = run.setting
    sentences = [] if run.config else ["No configuration was saved with this run."]
    if get("model", "model") is not None:
        sentences.append(
            f"Language model {get('model', 'model')}, read at layer {get('model', 'layer')} ({get('model', 'site')}); "
            f"text {get('data', 'dataset')} in contexts of {get('data', 'context_length')} tokens."
        )
    if get("training", "d_sae") is not None:
        sentences.append(f"SAEs with {get('training', 'd_sae')} latents, k = {get('training', 'k')}.")
    tokens, seconds = (mean(run.arms, key) for key in ("training.tokens", "training.wall_seconds"))
    if tokens is not None:
        epochs = mean(run.arms, "training.epochs")
        passes = "" if epochs is None or epochs <= 1 else f" ({epochs:.1f} passes over the text)"
        time = "" if seconds is None else f", {seconds:.0f} s of training each"
        who = "One SAE" if len(run.trained) == 1 else f"{len(run.trained)} SAEs on the same activation batches"
        sentences.append(f"{who}: {count(tokens)} training tokens{passes}{time}.")
    environment = run.config.get("environment")
    if isinstance(environment, dict):
        version = (environment.get("versions") or {}).get("legato-sae")
        sentences.append(f"Legato {version}, commit {environment.get('commit')}, {environment.get('processor')}.")
    return sentences


def matched_tables(run: SavedRun) -> str:
    """The matched comparison with its legend; empty where none was saved."""
    if run.matched is None:
        return ""
    shown = [table.without(("kappa", "AC")) for table in tables(run.matched)]
    text = [f"{table.title}:\n{table.text()}" for table in shown]
    return "\n\n".join([*text, _list(legend(run.matched))])


def write_notes(run: SavedRun | str | Path) -> Path:
    """Write notes.txt in a run folder from its saved results; return its path."""
    run = SavedRun.of(run)
    path = run.path / "notes.txt"
    write_atomically(path, notes(run).encode())
    return path


def count(tokens: float) -> str:
    """A token count as people write it: 2.4M, 60k, 800."""
    if tokens >= 1e6:
        return f"{tokens / 1e6:.3g}M"
    return f"{tokens / 1e3:.3g}k" if tokens >= 1e3 else f"{tokens:.0f}"
