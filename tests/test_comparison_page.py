"""What the page that compares runs says of them, without a browser."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from synthetic_run import write_synthetic_run

from legato.report.runs.recipes import recipes_of
from legato.results.matched.comparability import barriers, places, pooled, settings
from legato.results.saved_run import SavedRun


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> SavedRun:
    return SavedRun.open(write_synthetic_run(tmp_path_factory.mktemp("runs") / "run_1", named=("slowness",), seeds=3))


def changed(run: SavedRun, name: str, **stages: dict) -> SavedRun:
    """The run under another name, with other settings."""
    config = dict(run.config["config"])
    for stage, values in stages.items():
        config[stage] = {**config.get(stage, {}), **values}
    return replace(run, path=run.path.with_name(name), config={**run.config, "config": config})


def test_interval_over_seeds_is_students(run):
    (recipe, *_) = recipes_of({"run": run})
    for arm, value in zip(recipe.arms, (1.0, 2.0, 3.0), strict=True):
        arm.metrics["core"]["fvu"] = value
    low, high = recipe.interval("core.fvu")
    half = 4.302653 / math.sqrt(3)  # t of 2 degrees of freedom at .975, standard deviation 1
    assert (low, high) == pytest.approx((2 - half, 2 + half), rel=1e-6)


def test_interval_of_one_seed_is_the_saved_bootstrap(tmp_path):
    path = write_synthetic_run(tmp_path / "run_1", named=())
    metrics = json.loads((path / "metrics.json").read_text())
    metrics["baseline"]["consistency"]["interval95"] = {"kappa1_excess_within": [0.1, 0.2]}
    (path / "metrics.json").write_text(json.dumps(metrics))
    (recipe,) = recipes_of({"run": SavedRun.open(path)})
    assert recipe.interval("consistency.kappa1_excess_within") == (0.1, 0.2)
    assert recipe.interval("core.fvu") is None


def test_runs_share_a_place_only_where_model_layer_and_text_are_the_same(run):
    runs = {"a": run, "b": changed(run, "run_2"), "text": changed(run, "run_3", data={"context_length": 64})}
    runs["bare"] = replace(run, config={})
    assert places(runs) == [["a", "b"], ["text"], ["bare"]]
    told = barriers(runs)
    assert any("context_length a: 128, b: 128, text: 64" in line for line in told)
    assert any(line.startswith("bare saved no configuration") for line in told)
    assert barriers({"a": run, "b": changed(run, "run_2")}) == []


def test_loss_scores_on_other_contexts_are_told_of_runs_that_else_compare(run):
    few, many = (changed(run, f"run_{rows}", evaluation={"ce_rows": rows}) for rows in (12, 24))
    (line,) = barriers({"few": few, "many": many})
    assert "ce_rows few: 12, many: 24" in line
    elsewhere = changed(many, "run_3", model={"site": "mlp_out"})
    assert not any("ce_rows" in line for line in barriers({"few": few, "elsewhere": elsewhere}))


def test_runs_made_in_the_same_way_are_pooled_whatever_their_seeds(run):
    other_seeds = changed(run, "run_2", training={"seeds": [3, 4]})
    longer = changed(run, "run_3", training={"tokens": 9_000_000})
    groups = pooled({"a": run, "longer": longer, "b": other_seeds, "bare": replace(run, config={})})
    assert [list(group) for group in groups] == [["a", "b"], ["longer"], ["bare"]]


def test_settings_that_differ_stand_apart_from_those_shared(run):
    longer = changed(run, "run_2", training={"tokens": 9_000_000, "new": 1})
    differing, shared = settings({"a": run, "b": longer})
    assert differing == [("training.tokens", ["2400000", "9000000"]), ("training.new", ["not saved", "1"])]
    assert ("model.layer", "9") in shared  # as it was resolved
    assert ("found.d_in", "640") in shared


def test_settings_of_a_run_without_configuration_are_not_saved(run, tmp_path: Path):
    differing, shared = settings({"a": run, "bare": replace(run, config={})})
    assert shared == []
    assert all(values[1] == "not saved" for _, values in differing)
