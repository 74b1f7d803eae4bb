"""final_info.json: means and standard errors over the seeds of each recipe, in the shape AI-Scientist reads."""

from pathlib import Path
from typing import Any

import numpy as np

from legato.results.run_dir import leaves, write_json
from legato.results.saved_run import SavedRun, is_number, seed_groups, standard_error


def final_info(run: SavedRun) -> dict[str, Any]:
    """Build final_info.json as AI-Scientist reads it: per recipe `means`, `stderrs`, `final_info_dict` over its seeds.

    Keys are the dotted keys of metrics.json (`core.fvu`). A standard error is sd / sqrt(n) over n >= 2 seeds; with one
    seed `stderrs` is empty and `note` says so.
    """
    info: dict[str, Any] = {}
    for group, arms in seed_groups(run).items():
        per_seed = [
            {key: value for key, value in leaves(arm.metrics) if is_number(value) and ".recipe." not in key}
            for arm in arms
        ]
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


def write_final_info(run: SavedRun | str | Path) -> Path:
    """Write final_info.json in a run folder from its metrics.json; return its path."""
    run = SavedRun.of(run)
    path = run.path / "final_info.json"
    write_json(path, final_info(run))
    return path
