"""Comparability of runs, and their differences, from the configurations they saved."""

from collections.abc import Mapping
from typing import Any

from legato.results.matched.points import unequal_ce, what_sets_apart
from legato.results.run_dir import leaves
from legato.results.saved_run import SavedRun, joined

NOT_SAVED = "not saved"

# Settings that fix the activations of an SAE and the text it was judged on, and the reasons why they must be equal.
_PLACE = ("model", "layer", "site")
_TEXT = ("dataset", "text_column", "held_out", "context_length", "bos", "held_out_tokens")
_WHY_PLACE = {
    "model": "Another model has other activations, and may have another tokenizer: FVU, L0 and CE score are on another "
    "scale, and a lag of one token is another stretch of text.",
    **{name: f"Another {name} has other activations, which hold more or less by themselves." for name in _PLACE[1:]},
}
_WHY_TEXT = "How long features hold depends on the text, and rare latents on how much of it there is."


def places(runs: Mapping[str, SavedRun]) -> list[list[str]]:
    """Group the labels of the runs that read the same activations and were judged on the same text.

    A run without a saved configuration stands alone: its activations are not known.
    """
    found: dict[tuple[str, ...], list[str]] = {}
    for label, run in runs.items():
        key = tuple(str(_setting(run, name)) for name in (*_PLACE, *_TEXT))
        found.setdefault(key if run.config else (label,), []).append(label)
    return list(found.values())


def barriers(runs: Mapping[str, SavedRun]) -> list[str]:
    """Say why the numbers of these runs do not compare, a sentence or two each; empty where they compare."""
    found = []
    if unknown := [label for label, run in runs.items() if not run.config]:
        told = joined(unknown)
        found.append(f"{told} saved no configuration (config.yaml), so what it read and was judged on is unknown.")
    known = {label: run for label, run in runs.items() if run.config}
    for name in _PLACE:
        if differ := _differ(known, name):
            found.append(f"The {name}s differ ({differ}). {_WHY_PLACE[name]}")
    texts = [f"{name} {differ}" for name in _TEXT if (differ := _differ(known, name))]
    if texts:
        found.append(f"They were judged on other text ({'; '.join(texts)}). {_WHY_TEXT}")
    for labels in places(known):
        together = {label: runs[label] for label in labels}
        if unequal_ce(list(together.values())):
            rows = _differ(together, "ce_rows")
            found.append(f"CE scores were measured on different contexts (ce_rows {rows}), so they do not compare.")
    return found


def settings(runs: Mapping[str, SavedRun]) -> tuple[list[tuple[str, list[str]]], list[tuple[str, str]]]:
    """Return (settings with a value per run where they differ, settings that all runs share)."""
    each = [used(run) for run in runs.values()]
    names = list(dict.fromkeys(name for values in each for name in values))
    rows = [(name, [values.get(name, NOT_SAVED) for values in each]) for name in names]
    differ = [(name, values) for name, values in rows if len(set(values)) > 1]
    return differ, [(name, values[0]) for name, values in rows if len(set(values)) == 1]


def used(run: SavedRun) -> dict[str, str]:
    """Return the settings a run used by `stage.name`, with its findings (`found.d_in`) and its environment."""
    resolved = dict(run.config.get("resolved") or {})
    values: dict[str, str] = {}
    for name, value in flat(run.config.get("config") or {}):
        key = name.rpartition(".")[2]
        values[name] = _text(resolved.pop(key)) if resolved.get(key) is not None else value
    values |= {f"found.{name}": value for name, value in flat(resolved)}
    return values | dict(flat(run.config.get("environment") or {}))


def pooled(runs: Mapping[str, SavedRun]) -> list[dict[str, SavedRun]]:
    """Group the runs whose seeds and methods may stand in one matched comparison; a group may be one run."""
    groups: list[dict[str, SavedRun]] = []
    for label, run in runs.items():
        for group in groups:
            others = list(group.values())
            if run.config and others[0].config and not what_sets_apart([*others, run]):
                group[label] = run
                break
        else:
            groups.append({label: run})
    return groups


def flat(node: Mapping[str, Any]) -> list[tuple[str, str]]:
    """List the leaves of nested settings as text, by dotted name."""
    return [(name, _text(value)) for name, value in leaves(node)]


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _setting(run: SavedRun, name: str) -> Any:
    found = [run.setting(stage, name) for stage in ("model", "data", "evaluation")]
    return next((value for value in found if value is not None), None)


def _differ(runs: Mapping[str, SavedRun], name: str) -> str:
    """Write `run_1: 9, run_2: 12` where a setting is not the same in all runs; else return an empty text."""
    values = {label: _setting(run, name) for label, run in runs.items()}
    if len(set(map(repr, values.values()))) < 2:
        return ""
    return ", ".join(f"{label}: {NOT_SAVED if value is None else value}" for label, value in values.items())
