"""The whole command on a small random model: what it leaves, that it repeats itself, that it splits and drops."""

import csv
import json
from types import SimpleNamespace

import psutil
import pytest

from legato import SparseAutoencoder
from legato.config import ExperimentConfig
from legato.errors import LegatoError
from legato.experiment import split_to_fit
from legato.recipes import arms

FOLDERS = {"saes", "eval_results", "features", "arrays", "figures"}
FILES = {"config.yaml", "log.jsonl", "metrics.json", "final_info.json", "notes.txt", "report.html", "ablation.csv"}
GRID = ("--temporal=hysteresis,tsae", "--ablation", "--grid=2,4x0.1,0.5", "--sweep_k=6")
GRID_ARMS = {f"window_variance_w{w}_c{c}" for w in (2, 4) for c in ("0.1", "0.5")}


def without_times(metrics):
    for arm in metrics.values():
        del arm["training"]["wall_seconds"]
    return metrics


def test_a_run_leaves_everything_behind_and_repeats_to_the_last_digit(small):
    assert small.run(*GRID) == 0
    run = small.out_dir
    assert {path.name for path in run.iterdir()} >= FOLDERS | FILES
    metrics = json.loads((run / "metrics.json").read_text())
    assert set(metrics) == {"baseline", "baseline_k6", "hysteresis", "tsae"} | GRID_ARMS
    for name, groups in metrics.items():
        assert groups["training"]["training_steps"] > 0
        assert SparseAutoencoder.load(run / "saes" / name).d_sae == 64
        assert (run / "features" / f"{name}.parquet").is_file()
        assert (run / "eval_results" / f"legato_{run.name}_{name}_eval_results.json").is_file()
        assert ("position_shuffled" in groups["consistency"]) == (name not in GRID_ARMS)
    with (run / "ablation.csv").open() as table:
        assert {row["arm"] for row in csv.DictReader(table)} == set(metrics)

    small.out_dir = run.with_name("again")
    assert small.run(*GRID) == 0
    again = json.loads((small.out_dir / "metrics.json").read_text())
    assert without_times(again) == without_times(metrics)


def test_a_failing_member_is_reported_and_the_exit_code_says_so(small):
    # A coefficient this large makes the first steps diverge or the penalised latents collapse.
    assert small.run("--ablation", "--grid=2x1e30") == 1
    shown = small.capture.readouterr()
    assert "1 arms failed (window_variance_w2_c1e+30)" in shown.err
    assert set(json.loads((small.out_dir / "metrics.json").read_text())) == {"baseline"}
    reason = json.loads((small.out_dir / "failed" / "window_variance_w2_c1e+30" / "reason.json").read_text())
    assert "window_variance_w2_c1e+30" in reason["reason"]


def test_a_bank_that_does_not_fit_is_trained_in_several_passes(monkeypatch):
    bank = arms(ExperimentConfig.from_options("demo", {}), d_in=640)
    assert len(bank) == 18
    assert len(split_to_fit(bank, 640, 2048)) == 1
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=600 * 2**20))
    passes = split_to_fit(bank, 640, 2048)
    assert len(passes) > 1
    assert [arm for members in passes for arm in members] == bank
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**20))
    with pytest.raises(LegatoError, match="lower --d_sae or free memory"):
        split_to_fit(bank, 640, 2048)
