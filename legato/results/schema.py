"""metrics.json of a run as it is read back: what its readers rely on is looked at once."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from legato.common.errors import LegatoError
from legato.common.safe_read import read_json

_LEVELS = 20  # a run writes 6
_LARGEST = 2**63  # beyond it a number is no count of anything, and no column holds it


def read_metrics(path: Path) -> dict[str, dict[str, Any]]:
    """Sections by arm. Raises LegatoError, naming the file, where it is not what a run writes."""
    metrics = read_json(path)
    if not isinstance(metrics, dict) or not metrics or not all(isinstance(arm, dict) for arm in metrics.values()):
        raise LegatoError(f"{path} holds no arm; run the evaluation again")
    if paths := [name for name in metrics if not name or name.startswith(".") or set(name) & set("/\\\0")]:
        raise LegatoError(f"{path} names an arm {paths[0]!r}, which is a path: rename it")
    try:
        faults = [f"{name} has {fault}" for name, arm in metrics.items() for fault in _faults(arm)]
    except RecursionError as error:
        raise LegatoError(f"{path} is damaged: it is nested too deeply") from error
    if faults:
        raise LegatoError(f"{path} is damaged: {faults[0]}")
    return metrics


def _faults(arm: dict[str, Any]) -> Iterator[str]:
    for section, content in arm.items():
        if not isinstance(content, dict | None):
            yield f"a section {section!r} that is none"
            return
    for key, number in _numbers(arm):
        if abs(number) > _LARGEST:
            yield f"{str(number)[:20]}... for {key}"
    recipe: Any = (arm.get("training") or {}).get("recipe")
    if not isinstance(recipe, dict | None):
        yield "a recipe that is none"
        recipe = None
    if strange := [
        key for key in ("role", "method", "group", "term") if not isinstance((recipe or {}).get(key), str | None)
    ]:
        yield f"a recipe whose {strange[0]} is no word"
    bins = (arm.get("consistency") or {}).get("by_rate_bin")
    if not isinstance(bins, list | None) or not all(_is_bin(row) for row in bins or ()):
        yield "a by_rate_bin that holds no bins of firing rates"


def _is_bin(row: Any) -> bool:
    if not isinstance(row, dict):
        return False
    edges = row.get("bin")
    others = [value for key, value in row.items() if key not in ("bin", "interval95")]
    return (
        isinstance(edges, list)
        and len(edges) == 2
        and all(isinstance(edge, int | float) for edge in edges)
        and all(isinstance(value, int | float | None) for value in others)
        and isinstance(row.get("latents"), int)
    )


def _numbers(tree: Any, key: str = "", levels: int = _LEVELS) -> Iterator[tuple[str, int]]:
    """Whole numbers with their dotted keys."""
    if not levels:
        raise RecursionError
    if isinstance(tree, dict):
        for name, entry in tree.items():
            yield from _numbers(entry, f"{key}.{name}".lstrip("."), levels - 1)
    elif isinstance(tree, list):
        for entry in tree:
            yield from _numbers(entry, key, levels - 1)
    elif isinstance(tree, int):
        yield key, tree
