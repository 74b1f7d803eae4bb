"""Roles, methods and groups of arms in older runs, which did not save them."""

import json
from collections.abc import Mapping
from typing import Any

_BUDGET = ("k", "seed")
_IDENTITY = ("role", "method", "group", "in_grid")


def older_identities(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return {arm: {role, method, group}}: arms of one recipe are a method, arms of one recipe and k a group.

    A method or group has the name of its arm with the shortest name. That arm's k is the method's; arms at another k
    are its sweep. The method of the arm called `baseline` is the baseline. Arms that differ only in window and
    coefficient are the ablation where there are at least two of both.
    """
    shared = {name: _shared(arm) for name, arm in metrics.items()}
    budget = {name: _part(arm, "recipe").get("k") for name, arm in metrics.items()}
    method = {name: _shortest(other for other in metrics if shared[other] == shared[name]) for name in metrics}
    grid = _ablation(metrics)
    found = {}
    for name, main in method.items():
        group = _shortest(other for other, of in method.items() if of == main and budget[other] == budget[name])
        role = "named"
        if budget[name] != budget[main]:
            role = "sweep"
        elif main == "baseline":
            role = "baseline"
        elif name in grid:
            role = "grid"
        found[name] = {"role": role, "method": main, "group": group}
    return found


def _shortest(names: Any) -> str:
    return min(names, key=len)


def _part(arm: Mapping[str, Any], name: str) -> dict[str, Any]:
    training = arm.get("training")
    part = training.get(name) if isinstance(training, Mapping) else None
    return dict(part) if isinstance(part, Mapping) else {}


def _shared(arm: Mapping[str, Any]) -> str:
    """Write an arm's recipe without budget and seed as text; a unique text where it has none."""
    recipe, post_hoc = _part(arm, "recipe"), _part(arm, "post_hoc")
    if not recipe:
        return f"no recipe {id(arm)}"
    sparsity = recipe.get("sparsity")
    recipe["sparsity"] = {k: v for k, v in sparsity.items() if k != "k"} if isinstance(sparsity, Mapping) else sparsity
    recipe = {key: value for key, value in recipe.items() if key not in (*_BUDGET, *_IDENTITY)}
    post_hoc.pop("of", None)
    return json.dumps([recipe, post_hoc], sort_keys=True, default=str)


def _ablation(metrics: Mapping[str, Mapping[str, Any]]) -> set[str]:
    recipes = {name: _part(arm, "recipe") for name, arm in metrics.items()}
    points = {
        name: (recipe["window"], recipe["coefficient"])
        for name, recipe in recipes.items()
        if recipe.get("term") == "window_variance" and recipe.get("window") and recipe.get("coefficient") is not None
    }
    windows, coefficients = ({point[axis] for point in points.values()} for axis in (0, 1))
    return set(points) if len(windows) > 1 and len(coefficients) > 1 else set()
