"""metrics.json of a run as it is read back: what its readers rely on is looked at once."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from legato.common.errors import LegatoError
from legato.common.safe_read import read_json

_LEVELS = 20  # a run writes 6
_LARGEST = 2**63  # beyond it a number is no count of anything, and no column holds it


class _Section(BaseModel):
    """Entries that readers rely on; others may stand beside them."""

    model_config = ConfigDict(strict=True, extra="allow")


class _Recipe(_Section):
    role: str | None = None
    method: str | None = None
    group: str | None = None
    term: str | None = None


class _Training(_Section):
    recipe: _Recipe | None = None


class _RateBin(_Section):
    __pydantic_extra__: dict[str, float | None]
    bin: list[float] = Field(min_length=2, max_length=2)
    latents: int
    interval95: Any = None


class _Consistency(_Section):
    by_rate_bin: list[_RateBin] | None = None


class _Arm(_Section):
    __pydantic_extra__: dict[str, dict[str, Any] | None]
    training: _Training | None = None
    consistency: _Consistency | None = None


_ARMS = TypeAdapter(dict[str, _Arm])


def read_metrics(path: Path) -> dict[str, dict[str, Any]]:
    """Sections by arm. Raises LegatoError, naming the file, where it is not what a run writes."""
    metrics = read_json(path)
    if not isinstance(metrics, dict) or not metrics or not all(isinstance(arm, dict) for arm in metrics.values()):
        raise LegatoError(f"{path} holds no arm; run the evaluation again")
    if paths := [name for name in metrics if not name or name.startswith(".") or set(name) & set("/\\\0")]:
        raise LegatoError(f"{path} names an arm {paths[0]!r}, which is a path: rename it")
    try:
        _ARMS.validate_python(metrics)
        large = next((each for each in _numbers(metrics) if abs(each[1]) > _LARGEST), None)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        place, value = ".".join(map(str, fault["loc"])), repr(fault["input"])[:80]
        said = f": {fault['msg']}".replace(": Input should be", ", not")
        raise LegatoError(f"{path} is damaged: {place} is {value}{said}") from error
    except RecursionError as error:
        raise LegatoError(f"{path} is damaged: it is nested too deeply") from error
    if large:
        raise LegatoError(f"{path} is damaged: {large[0]} is {str(large[1])[:20]}...")
    return metrics


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
