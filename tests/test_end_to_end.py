"""The whole command on a small random model: what it leaves, that it repeats itself, that it splits and drops."""

import csv
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
from small_experiment import without_pages

import legato.training.bank
from legato import SparseAutoencoder
from legato.common import distributed
from legato.common.errors import LegatoError
from legato.experiment.arms import planned_arms
from legato.experiment.config import ExperimentConfig
from legato.training.bank import planned, split_to_fit
from legato.training.trainer import SAETrainer

FOLDERS = {"saes", "eval_results", "features", "arrays", "figures"}
FILES = {"config.yaml", "log.jsonl", "metrics.json", "final_info.json", "notes.txt", "report.html", "ablation.csv"}
STAGES = ["model", "text", "activations", "training", "evaluation"]
# The named window_variance_w2_c0.15 begins like the grid's window_variance_w2_c0.1, and is compared like any named arm.
GRID = (
    *("--temporal=hysteresis,tsae,window_variance", "--window=2", "--coefficient=0.15"),
    *("--ablation", "--grid=2,4x0.1,0.5", "--sweep_k=6"),
)
NAMED = {"baseline", "baseline_k6", "hysteresis", "tsae", "window_variance_w2_c0.15"}
GRID_ARMS = {f"window_variance_w{w}_c{c}" for w in (2, 4) for c in ("0.1", "0.5")}


def without_times(metrics):
    for arm in metrics.values():
        del arm["training"]["wall_seconds"]
    return metrics


def test_a_run_leaves_everything_behind_and_repeats_to_the_last_digit(small, monkeypatch):
    assert small.run(*GRID) == 0
    run = small.out_dir
    assert {path.name for path in run.iterdir()} >= FOLDERS | FILES
    said = small.capture.readouterr().out
    assert re.search(r"^expected on this machine, about .*training 9 SAEs \d.*, evaluation \d", said, re.MULTILINE)
    assert said.index("expected on this machine") < said.index("harvest: ")
    assert list(json.loads((run / "timings.json").read_text())) == STAGES
    assert re.search(r"The stages took: model \d.*, evaluation \d", " ".join((run / "notes.txt").read_text().split()))
    metrics = json.loads((run / "metrics.json").read_text())
    assert set(metrics) == NAMED | GRID_ARMS
    for name, groups in metrics.items():
        assert groups["training"]["training_steps"] > 0
        assert SparseAutoencoder.load(run / "saes" / name).d_sae == 64
        assert (run / "features" / f"{name}.parquet").is_file()
        assert (run / "eval_results" / f"legato_{run.name}_{name}_eval_results.json").is_file()
        assert ("position_shuffled" in groups["consistency"]) == (name not in GRID_ARMS)
        assert ("redundancy" in groups) == ("offset" in groups) == (name not in GRID_ARMS)
        assert (run / "redundancy" / f"{name}.parquet").is_file() == (name not in GRID_ARMS)
    with (run / "ablation.csv").open() as table:
        assert {row["arm"] for row in csv.DictReader(table)} == set(metrics)

    small.out_dir = run.with_name("again")
    without_pages(monkeypatch)
    assert small.run(*GRID) == 0
    again = json.loads((small.out_dir / "metrics.json").read_text())
    assert without_times(again) == without_times(metrics)


@pytest.mark.usefixtures("no_pages")
def test_a_failing_member_is_reported_and_the_exit_code_says_so(small):
    # A coefficient this large makes the first steps diverge or the penalised latents collapse.
    assert small.run("--ablation", "--grid=2x1e30") == 1
    shown = small.capture.readouterr()
    assert "1 arms failed (window_variance_w2_c1e+30)" in shown.err
    assert set(json.loads((small.out_dir / "metrics.json").read_text())) == {"baseline"}
    reason = json.loads((small.out_dir / "failed" / "window_variance_w2_c1e+30" / "reason.json").read_text())
    assert "window_variance_w2_c1e+30" in reason["reason"]


def test_an_sae_that_fires_nowhere_is_reported_and_the_others_are_judged(small, monkeypatch):
    finish = SAETrainer.finish_on_first

    def silent(trainer, *rest):
        sae = finish(trainer, *rest)
        return replace(sae, b_enc=sae.b_enc - 1e6) if trainer.arm.name == "matryoshka" else sae

    monkeypatch.setattr(SAETrainer, "finish_on_first", silent)
    assert small.run("--temporal=matryoshka,hysteresis", "--controls=ema,hysteresis") == 1
    assert "1 arms failed (matryoshka)" in small.capture.readouterr().err
    metrics = json.loads((small.out_dir / "metrics.json").read_text())
    assert list(metrics) == ["baseline", "hysteresis", "baseline_ema", "baseline_hysteresis"]
    assert sorted(path.name for path in (small.out_dir / "saes").iterdir()) == ["baseline", "hysteresis"]
    reason = json.loads((small.out_dir / "failed" / "matryoshka" / "reason.json").read_text())
    assert "no latent fires" in reason["reason"]


def test_a_pass_whose_members_all_fail_does_not_stop_the_next(small, monkeypatch):
    without_pages(monkeypatch)

    def two_passes(bank, *_args, **_options):
        return [[arm for arm in bank if arm.name != "baseline"], [arm for arm in bank if arm.name == "baseline"]]

    monkeypatch.setattr(legato.training.bank, "split_to_fit", two_passes)
    assert small.run("--ablation", "--grid=2x1e30") == 1
    assert "1 arms failed (window_variance_w2_c1e+30)" in small.capture.readouterr().err
    assert set(json.loads((small.out_dir / "metrics.json").read_text())) == {"baseline"}


def test_a_bank_that_does_not_fit_is_trained_in_several_passes(monkeypatch):
    bank = [one.sae for one in planned_arms(ExperimentConfig.from_options("demo-long", {}), d_in=640)]
    assert len(bank) == 18
    assert len(split_to_fit(bank, 640, 2048)) == 1
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=600 * 2**20))
    passes = split_to_fit(bank, 640, 2048)
    assert len(passes) > 1
    assert [arm for members in passes for arm in members] == bank
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**20))
    with pytest.raises(LegatoError, match="lower --d_sae or free memory"):
        split_to_fit(bank, 640, 2048)


@pytest.mark.parametrize(("free_mib", "sharded"), [(600, False), (120, True)])
def test_latents_are_divided_over_the_ranks_where_an_sae_fits_no_other_way(free_mib, sharded, monkeypatch):
    bank = [one.sae for one in planned_arms(ExperimentConfig.from_options("demo-long", {}), d_in=640)][:1]
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free_mib * 2**20))
    assert planned(bank, 640, 2048, shard_latents=False) == [(bank, sharded)]
    assert planned(bank, 640, 2048, shard_latents=True) == [(bank, True)]
    monkeypatch.setattr(distributed, "world_size", lambda: 1)
    if sharded:
        with pytest.raises(LegatoError, match="lower --d_sae or free memory"):
            planned(bank, 640, 2048, shard_latents=False)
