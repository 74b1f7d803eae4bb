"""What a person sees who mistypes the experiment's command: one line, exit code 2 or 1, and no run folder."""

import itertools
import json
import os
from pathlib import Path

import huggingface_hub
import pytest
from small_experiment import experiment_main, zero_parameters

from legato.cli import main
from legato.common.errors import UsageError
from legato.data.language_model import LanguageModel
from legato.experiment.command import Experiment
from legato.experiment.config import ExperimentConfig
from legato.experiment.inputs import read_text


@pytest.mark.parametrize(
    ("flags", "what", "to_do"),
    [
        (["--widnow=8"], "No such option", "--window"),
        (["surplus"], "unexpected extra argument (surplus)", "--help"),
        (["--preset=gtp2"], "preset 'gtp2' is unknown", "choose one of demo, "),
        (["--k=many"], "--k many must be a valid integer", ""),
        (["--k=65"], "--k 65 exceeds --d_sae 64", "lower k or widen the SAE"),
        (["--seeds=1,1"], "--seeds 1,1 must be different values", "at least one"),
        (["--tokens=0"], "--tokens 0 must be greater than or equal to 1", ""),
        (["--lr=0"], "--lr 0 must be greater than", "0"),
        (["--lr=nan"], "--lr nan must be a finite number", ""),
        (["--coefficient=nan"], "--coefficient nan must be a finite number", ""),
        (["--temporal=slow"], "--temporal slow is unknown", "choose one of "),
        (["--grid=2,4"], "--grid 2,4 is not WINDOWSxCOEFFICIENTS", "such as 2,8,32x0.1,1"),
        (["--held_out=1"], "--held_out 1 must be less than", "1"),
        (["--site=resid"], "unknown site 'resid'", "give resid_post"),
        (["--layer=-1"], "--layer -1 must be greater than or equal to 0", ""),
        (["--layer=4"], "layer 4", "0 to 3"),
        (["--context_length=65"], "--context_length 65 is longer than", "(64)"),
        (["--batch_rows=1000"], "fewer than one batch of 1000", "give more text or lower --batch_rows"),
        (["--model=../models/none"], "there is no folder or file ../models/none", ""),
        (["--model=many/parts/name"], "there is no folder or file many/parts/name", ""),
        (["--dataset=missing.jsonl"], "no such file or folder: missing.jsonl", ""),
        (["--dataset=/nowhere/at/all"], "no such file or folder: /nowhere/at/all", ""),
    ],
)
def test_a_mistaken_flag(small, flags, what, to_do):
    shown = small.error(*flags)
    assert what in shown
    assert to_do in shown
    assert not small.out_dir.exists()


def test_a_missing_out_dir_flag(small, capsys):
    assert experiment_main()([]) == 2
    assert capsys.readouterr().err == "error: Missing option '--out_dir': see experiment.py --help\n"


def test_a_folder_that_is_no_model(small):
    assert "holds no config.json" in small.error(f"--model={small.corpus}")
    assert not small.out_dir.exists()


@pytest.mark.parametrize("content", [None, "", " \n\n", "one lone document"])
def test_a_corpus_without_text_to_hold_out(small, tmp_path, content):
    corpus = tmp_path / "empty"
    corpus.mkdir()
    if content is not None:
        (corpus / "a.txt").write_text(content)
    shown = small.error(f"--dataset={corpus}")
    assert ("single distinct text" if content and content.strip() else "no ") in shown
    assert not small.out_dir.exists()


def test_a_corpus_without_the_text_column(small, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"body": "w3 w4"}) + "\n")
    assert "has no 'text' (it has: body): name the text column" in small.error(f"--dataset={path}")


@pytest.mark.parametrize("flag", ["--model=somebody/a-model", "--dataset=somebody/a-dataset"])
def test_a_hub_name_without_network(small, monkeypatch, flag):
    def unreachable(*_args, **_options):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    shown = small.error(flag, code=2 if "model" in flag else 1)
    assert "hub" in shown
    assert "Name or service not known" in shown
    assert not small.out_dir.exists()


def test_a_hub_stream_is_read_only_as_far_as_it_is_needed(small, monkeypatch):
    def endless(dataset):
        return ({"text": f"w{3 + n % 90} " * 60} for n in itertools.count())

    monkeypatch.setattr("legato.data.documents.hub_records", endless)
    options = {"dataset": "somebody/endless", "corpus_tokens": 3000, "context_length": 16, "eval_rows": 8}
    text = read_text(ExperimentConfig.from_options("demo", options), LanguageModel.load(str(small.model)))
    assert text.train.n_valid == 3000
    assert text.held_out.n_valid == 8 * 16


def test_an_out_dir_with_other_things_in_it(small):
    small.out_dir.mkdir()
    (small.out_dir / "thesis.txt").write_text("years of work")
    assert "is not empty and holds no run" in small.error()
    assert [path.name for path in small.out_dir.iterdir()] == ["thesis.txt"]


def test_an_out_dir_that_is_a_file(small):
    small.out_dir.write_text("not a folder")
    assert "cannot be used" in small.error()
    assert small.out_dir.read_text() == "not a folder"
    assert "cannot be" in small.error(f"--out_dir={small.out_dir}/run_2")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc")
def test_an_out_dir_where_nobody_can_write(small):
    assert "--out_dir /proc/run_1 cannot be written" in small.error("--out_dir=/proc/run_1")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_out_dir_without_write_permission(small):
    small.out_dir.parent.joinpath("locked").mkdir(mode=0o500)
    assert "cannot be written" in small.error(f"--out_dir={small.out_dir.parent}/locked/run_1")


def test_a_run_is_finished_once_and_never_overwritten(small, capsys):
    assert small.run("--temporal=hysteresis") == 0
    assert small.results() == [
        "metrics.json",
        "final_info.json",
        "notes.txt",
        "report.html",
        "saes",
        "eval_results",
        "features",
    ]
    metrics = (small.out_dir / "metrics.json").read_bytes()
    assert list(json.loads(metrics)) == ["baseline", "hysteresis"]
    capsys.readouterr()
    assert "holds a finished run: choose a new folder" in small.error("--temporal=hysteresis")
    (small.out_dir / "final_info.json").unlink()  # as a run leaves it that was cut off at the end
    shown = small.error("--temporal=hysteresis", "--k=5")
    assert "holds a run with training.k 4 instead of 5: use its options or a new folder" in shown
    assert (small.out_dir / "metrics.json").read_bytes() == metrics
    # The same command goes on. Nothing of the first attempt may pass for a result of the second.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("legato.training.step.Parameters.initial", zero_parameters)
        small.error("--temporal=hysteresis", code=1)
    assert small.results() == []


@pytest.mark.usefixtures("no_pages")
def test_activations_that_are_not_kept_train_the_same_sae(small):
    assert small.run() == 0
    kept = (small.out_dir / "saes" / "baseline" / "sae_weights.safetensors").read_bytes()
    cache = Path(os.environ["LEGATO_CACHE"])
    before = {path for path in cache.rglob("*") if path.is_file()}
    small.out_dir = small.out_dir.with_name("run_2")
    assert small.run("--no-store", "--corpus_tokens=600") == 0  # another set of tokens to train on
    small.out_dir = small.out_dir.with_name("run_3")
    assert small.run("--no-store") == 0
    assert (small.out_dir / "saes" / "baseline" / "sae_weights.safetensors").read_bytes() == kept
    assert {path for path in cache.rglob("*") if path.is_file()} == before  # nothing was stored for run_2


def test_debug_shows_where_it_happened(small):
    with pytest.raises(UsageError, match="no such file"):
        small.run("--dataset=missing.jsonl", "--debug")


def test_help_names_the_presets_and_every_stage(small, capsys):
    assert small.run("--help") == 0
    shown = capsys.readouterr().out
    for word in ("--out_dir", "--model", "--dataset", "--grid", "gemma-2-2b", "window16"):
        assert word in shown


@pytest.mark.usefixtures("no_pages")
def test_legato_run_is_the_same_command(small, capsys):
    assert small.run() == 0
    weights = (small.out_dir / "saes" / "baseline" / "sae_weights.safetensors").read_bytes()
    assert main(["run", *small.flags(f"--out_dir={small.out_dir}_2")]) == 0
    again = small.out_dir.with_name(f"{small.out_dir.name}_2")
    assert (again / "saes" / "baseline" / "sae_weights.safetensors").read_bytes() == weights
    capsys.readouterr()
    assert main(["run", "--widnow=8"]) == 2
    assert capsys.readouterr().err.endswith(": see legato run --help\n")


def test_flags_go_before_the_preset_and_the_preset_before_the_defaults():
    asked = Experiment.of(
        out_dir="a", preset="smoke", k="8", seeds="0,2", tokens="20_000_000", temporal="", store=False
    )
    training = asked.config.training
    assert (training.k, training.d_sae, training.lr, training.tokens) == (8, 1024, 5e-3, 20_000_000)
    assert (training.seeds, asked.config.arms.temporal, asked.config.data.store) == ((0, 2), (), False)
    assert asked.config.to_dict()["training"]["seeds"] == [0, 2]
    assert (asked.options.out_dir, asked.options.checkpoint_minutes) == ("a", 5.0)
