"""What a run's numbers say in words, with what they do not say: notes.txt, the report's verdict, final_info.json.

Everything is read from the saved results. A difference counts as one only past stated limits, so that the words never
claim more than the numbers carry.
"""

import json
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from legato.cache import write_atomically
from legato.comparison_table import legend, tables
from legato.latent_notes import latents_in_words
from legato.results import Arm, SavedRun

KAPPA_EXCESS = "consistency.kappa1_excess_within"

# Arms count as comparable while L0 is this close to the baseline's and FVU not further above it (relative).
MATCHED_L0 = 0.05
MATCHED_FVU = 0.03
# With one seed there is no interval: a smaller relative difference in kappa excess is called no difference.
NOTICEABLE = 0.10
STANDARD_ERRORS = 2.0
MIN_LATENTS_IN_BIN = 20

FEW_TRAINING_TOKENS = 10_000_000
FEW_HELD_OUT_TOKENS = 50_000
MANY_SILENT = 0.05
MANY_DENSE = 0.01
POOR_FVU = 0.30
POOR_CE_SCORE = 0.80
COLLAPSED_L0 = 0.20  # of the baseline's
COLLAPSED_SILENT = 0.50


@dataclass(frozen=True)
class Column:
    """A quantity of the overview tables: its key in metrics.json, its heading, and how to write it."""

    key: str
    heading: str
    digits: int
    better: str = ""  # "lower" or "higher" where one of them is
    scale: float = 1.0

    def of(self, arm: Arm) -> float | None:
        value = arm.value(self.key)
        return None if value is None else self.scale * value

    def text(self, arm: Arm) -> str:
        return number(self.of(arm), self.digits)


COLUMNS = (
    Column("core.fvu", "FVU", 3, "lower"),
    Column("core.l0", "L0", 1),
    Column("core.ce_loss_score", "CE score", 3, "higher"),
    Column("core.frac_alive", "alive %", 1, "higher", scale=100),
    Column(KAPPA_EXCESS, "kappa excess", 3, "higher"),
    Column("consistency.kappa1_excess_cross", "beyond position", 3, "higher"),
    Column("consistency.ac1_excess_within", "AC excess", 3, "higher"),
    Column("consistency.half_life_median", "half-life", 1, "higher"),
)


@dataclass(frozen=True)
class Comparison:
    """A named arm against the baseline.

    outcome: "longer", "same", "shorter", "collapsed" or "unknown": how long its features hold by kappa excess at lag 1.
    matched: whether L0 and FVU are close enough to the baseline's for that to be a fair comparison.
    headline: the outcome in one clause. details: the numbers behind it and what limits them, a sentence each.
    """

    arm: str
    outcome: str
    matched: bool
    headline: str
    details: tuple[str, ...]


def compare(run: SavedRun) -> list[Comparison]:
    """Each named recipe against the baseline; empty where there is no baseline or nothing to compare with it."""
    if run.baseline is None:
        return []
    groups = seed_groups(run)
    base = groups[run.baseline.group]
    return [_compare(arms, base) for arms in groups.values() if arms[0].role == "named"]


def seed_groups(run: SavedRun) -> dict[str, list[Arm]]:
    """Arms by recipe, the seeds of each in the order they were saved."""
    groups: dict[str, list[Arm]] = {}
    for arm in run.arms:
        groups.setdefault(arm.group, []).append(arm)
    return groups


def _compare(arms: Sequence[Arm], base: Sequence[Arm]) -> Comparison:
    name = arms[0].group
    if reason := _collapse(arms[0], base[0]):
        return Comparison(name, "collapsed", False, f"{name} collapsed", (reason,))
    ours, theirs = _mean(arms, KAPPA_EXCESS), _mean(base, KAPPA_EXCESS)
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
    times = f", {ours / theirs:.1f} times" if theirs > 0 and outcome == "longer" else ""
    spread = (
        f"{len(arms)} and {len(base)} seeds, standard error of the difference {error:.3f}"
        if error is not None
        else f"one seed, so no interval; below {NOTICEABLE:.0%} of the baseline's value counts as no difference"
    )
    details = [f"Kappa excess at lag 1 is {ours:.3f} against {theirs:.3f} ({difference:+.3f}{times}; {spread}).", cost]
    details += [sentence for sentence in (_beyond_position(arms, base), _across_rates(arms[0], base[0])) if sentence]
    unmatched = ", but not at a matched cost" if outcome == "longer" else ", and not at a matched cost"
    tail = ", at matched sparsity and reconstruction" if matched else unmatched
    return Comparison(name, outcome, matched, words[outcome] + tail, tuple(details))


def _collapse(arm: Arm, base: Arm) -> str | None:
    l0, base_l0, alive = arm.value("core.l0"), base.value("core.l0"), arm.value("core.frac_alive")
    if l0 is not None and base_l0 is not None and l0 < COLLAPSED_L0 * base_l0:
        return f"L0 fell to {l0:.1f} against the baseline's {base_l0:.1f}; its consistency says nothing."
    if alive is not None and 1 - alive > COLLAPSED_SILENT:
        return f"{1 - alive:.0%} of its latents never fire on held-out text; its consistency says nothing."
    return None


def _match(arms: Sequence[Arm], base: Sequence[Arm]) -> tuple[bool, str]:
    fvu, base_fvu, l0, base_l0 = (_mean(a, key) for key in ("core.fvu", "core.l0") for a in (arms, base))
    if fvu is None or base_fvu is None or l0 is None or base_l0 is None:
        return False, "FVU or L0 is missing, so whether the comparison is fair is unknown."
    numbers = f"FVU {fvu:.3f} against {base_fvu:.3f}, L0 {l0:.1f} against {base_l0:.1f}"
    same_l0, same_fvu = abs(l0 / base_l0 - 1) <= MATCHED_L0, fvu / base_fvu - 1 <= MATCHED_FVU
    if same_l0 and same_fvu:
        return True, f"The cost is matched: {numbers}."
    what = " and ".join(["reconstruction"] * (not same_fvu) + ["sparsity"] * (not same_l0))
    return False, f"The cost is not matched in {what}: {numbers}. Part of the difference may come from that."


def _beyond_position(arms: Sequence[Arm], base: Sequence[Arm]) -> str | None:
    ours, theirs = (_mean(a, "consistency.kappa1_excess_cross") for a in (arms, base))
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


def _flag(run: SavedRun, test: Any) -> list[str]:
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


def _made_by_itself(arm: Arm, baseline: Arm | None) -> str:
    """How much of an arm's gain is still there when its activations come in shuffled order."""
    shuffled = arm.value("consistency.position_shuffled.kappa1_excess_within")
    before = baseline.value("consistency.position_shuffled.kappa1_excess_within") if baseline else None
    measured = arm.value("consistency.kappa1_excess_within")
    if shuffled is None or before is None or measured is None:
        return f"Part of a gain of {arm.name} may be made by its mechanism; the shuffled control was not run for it."
    shuffled, before = round(shuffled, 3) + 0.0, round(before, 3) + 0.0  # no -0.000
    return (
        f"On the same activations in shuffled order, {arm.name} keeps a kappa excess of {shuffled:.3f} (the baseline "
        f"{before:.3f}), against {measured:.3f} in the order of the text: that much its mechanism makes by itself."
    )


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
        limits += [_made_by_itself(arm, run.baseline) for arm in run.highlighted if arm is not run.baseline]
    if not any(arm.role == "sweep" for arm in run.arms):
        limits.append("There is no sweep of the baseline over sparsity, so a cost in FVU cannot be priced in L0.")
    return limits


def headline(run: SavedRun) -> str:
    """The comparison in one sentence."""
    found = compare(run)
    if run.baseline is None:
        return "There is no baseline in this run, so nothing is compared."
    if not found:
        return "There is only the baseline, so nothing is compared."
    fair = [c for c in found if c.outcome == "longer" and c.matched]
    paid = [c for c in found if c.outcome == "longer" and not c.matched]
    if fair:
        verb = "holds its" if len(fair) == 1 else "hold their"
        names = _joined([c.arm for c in fair])
        return f"{names} {verb} features longer than the baseline at matched sparsity and reconstruction."
    if paid:
        verb = "holds its" if len(paid) == 1 else "hold their"
        return f"{_joined([c.arm for c in paid])} {verb} features longer than the baseline, but not at a matched cost."
    if all(c.outcome in ("collapsed", "unknown") for c in found):
        return "No temporal arm can be compared: each collapsed or was not measured."
    return "No temporal arm holds its features longer than the baseline."


def ablation_in_words(run: SavedRun) -> list[str]:
    """What the window x coefficient ablation says, a sentence each; empty where there is none."""
    members = [arm for arm in run.arms if arm.role == "grid" and arm.value(KAPPA_EXCESS) is not None]
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
            and (arm.value("core.fvu") or math.inf) <= (1 + MATCHED_FVU) * fvu
        ]
        sentences.append(
            f"{len(free)} of {len(members)} exceed the baseline's kappa excess by more than {NOTICEABLE:.0%} while "
            f"FVU stays within {MATCHED_FVU:.0%} of the baseline's."
        )
    return sentences


def _values(arms: Sequence[Arm], name: str) -> str:
    return ", ".join(f"{value:g}" for value in sorted({getattr(arm, name) for arm in arms} - {None}))


def notes(run: SavedRun) -> str:
    """The text of notes.txt: what was run, the results per arm, what the comparison says and does not say."""
    sections = [
        ("What was run", _paragraph(described(run))),
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


def raw_stream_sentence(run: SavedRun) -> str | None:
    """The AC excess of the language model's own activations, which that of the codes is to be seen against."""
    raw = run.arms[0].series("consistency.raw_stream.ac.excess_within")
    return None if raw is None else f"AC excess of the activations themselves, mean over dimensions: {raw[0]:.3f}."


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
    tokens, seconds = (_mean(run.arms, key) for key in ("training.tokens", "training.wall_seconds"))
    if tokens is not None:
        epochs = _mean(run.arms, "training.epochs")
        passes = "" if epochs is None or epochs <= 1 else f" ({epochs:.1f} passes over the text)"
        time = "" if seconds is None else f", {seconds:.0f} s of training each"
        who = "One SAE" if len(run.trained) == 1 else f"{len(run.trained)} SAEs on the same activation batches"
        sentences.append(f"{who}: {count(tokens)} training tokens{passes}{time}.")
    environment = run.config.get("environment")
    if isinstance(environment, dict):
        version = (environment.get("versions") or {}).get("legato-sae")
        sentences.append(f"Legato {version}, commit {environment.get('commit')}, {environment.get('processor')}.")
    return sentences


def results_table(run: SavedRun) -> str:
    """A plain-text table, a row per arm, with a legend below it."""
    rows = [["arm", *(column.heading for column in COLUMNS)]]
    rows += [[arm.name, *(column.text(arm) for column in COLUMNS)] for arm in run.arms]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    raw = raw_stream_sentence(run)
    legend = (
        "kappa excess, AC excess: lag 1, over the null that shuffles tokens inside a document. beyond position:\n"
        "kappa over the null that keeps only position. half-life: median over latents, in tokens. alive: fires on\n"
        "the held-out text at all."
    )
    return "\n".join([*lines, "", legend, *([raw] if raw else [])])


def matched_tables(run: SavedRun) -> str:
    """The matched comparison with its legend; empty where none was saved."""
    if run.matched is None:
        return ""
    shown = [table.without(("kappa", "AC")) for table in tables(run.matched)]
    text = [f"{table.title}:\n{table.text()}" for table in shown]
    return "\n\n".join([*text, _list(legend(run.matched))])


def write_notes(run_dir: str | Path) -> Path:
    """Write notes.txt in a run folder from its saved results; return its path."""
    run = SavedRun.open(run_dir)
    path = run.path / "notes.txt"
    write_atomically(path, notes(run).encode())
    return path


def final_info(run: SavedRun) -> dict[str, Any]:
    """final_info.json in the AI-Scientist shape: per recipe `means`, `stderrs` and `final_info_dict` over its seeds.

    Keys are the dotted keys of metrics.json (`core.fvu`). A standard error is sd / sqrt(n) over n >= 2 seeds; with one
    seed `stderrs` is empty and `note` says so.
    """
    info: dict[str, Any] = {}
    for group, arms in seed_groups(run).items():
        per_seed = [dict(_scalars(arm.metrics)) for arm in arms]
        keys = [key for key in per_seed[0] if all(key in values for values in per_seed)]
        values = {key: [seed[key] for seed in per_seed] for key in keys}
        info[group] = {
            "means": {key: float(np.mean(v)) for key, v in values.items()},
            "stderrs": {key: standard_error(v) for key, v in values.items()} if len(arms) > 1 else {},
            "final_info_dict": values,
            "seeds": [arm.seed for arm in arms],
        }
        if len(arms) == 1:
            info[group]["note"] = "one seed: there is no standard error"
    return info


def write_final_info(run_dir: str | Path) -> Path:
    """Write final_info.json in a run folder from its metrics.json; return its path."""
    run = SavedRun.open(run_dir)
    path = run.path / "final_info.json"
    write_atomically(path, (json.dumps(final_info(run), indent=1, allow_nan=False) + "\n").encode())
    return path


def _scalars(node: Any, prefix: str = "") -> list[tuple[str, float]]:
    """Every finite number below the sections of an arm's metrics, by dotted key; lists and the recipe are left out."""
    found = []
    for key, value in node.items():
        if isinstance(value, dict) and key != "recipe":
            found += _scalars(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            found.append((prefix + key, value))
    return found


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean, sd with n - 1 over sqrt(n), of at least two values."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))


def _mean(arms: Sequence[Arm], key: str) -> float | None:
    values = [value for arm in arms if (value := arm.value(key)) is not None]
    return float(np.mean(values)) if values else None


def _error_of_difference(arms: Sequence[Arm], base: Sequence[Arm], key: str) -> float | None:
    samples = [[value for arm in group if (value := arm.value(key)) is not None] for group in (arms, base)]
    if min(map(len, samples)) < 2:
        return None
    return math.hypot(*(standard_error(sample) for sample in samples))


def _joined(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + f" and {names[-1]}"


def number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def count(tokens: float) -> str:
    """A token count as people write it: 2.4M, 60k, 800."""
    if tokens >= 1e6:
        return f"{tokens / 1e6:.3g}M"
    return f"{tokens / 1e3:.3g}k" if tokens >= 1e3 else f"{tokens:.0f}"
