"""The command `legato` as a person meets it: what it prints and writes, one line and an exit code where it fails."""

import json
import subprocess
import sys
from importlib import import_module

import pytest
from synthetic_run import write_synthetic_run

from legato.cli import COMMANDS, main
from legato.common.errors import UsageError


@pytest.fixture
def run(tmp_path):
    return write_synthetic_run(tmp_path / "run_1", named=("contrastive",), sweep=True, seeds=2)


def error(capsys, *arguments, code=2):
    """The one line on stderr of a call that must fail with `code`."""
    assert main([str(argument) for argument in arguments]) == code
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert "Traceback" not in shown.err
    return shown.err


def test_compare_prints_the_tables_and_writes_the_numbers(run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    assert main(["compare", str(run)]) == 0
    shown = capsys.readouterr().out
    for text in ("At the baseline's L0", "At the baseline's FVU", "Targets", "contrastive", "2 seeds"):
        assert text in shown
    assert str(run / "matched.json") in shown
    matched = json.loads((run / "matched.json").read_text())
    assert matched["methods"]["contrastive"]["at_l0"]["matched"]
    metrics = json.loads((run / "metrics.json").read_text())
    kappa = [metrics[name]["consistency"]["kappa1_excess_within"] for name in ("contrastive", "contrastive_seed1")]
    assert matched["methods"]["contrastive"]["as_trained"]["kappa1_excess_within"]["mean"] == pytest.approx(
        sum(kappa) / 2
    )


def test_compare_of_several_runs_writes_only_where_it_is_told(run, capsys, tmp_path):
    other = write_synthetic_run(tmp_path / "run_2", named=("window_variance",), seeds=2)
    assert main(["compare", str(run), str(other)]) == 0
    shown = capsys.readouterr().out
    assert "contrastive" in shown
    assert "window_variance" in shown
    assert not list(tmp_path.rglob("matched.json"))
    assert main(["compare", str(run), str(other), "--out", str(tmp_path / "both.json")]) == 0
    assert set(json.loads((tmp_path / "both.json").read_text())["methods"]) == {"contrastive", "window_variance"}


def test_report_builds_everything_of_a_run_again(run, capsys, tmp_path, monkeypatch):
    def write_page(run, _):
        path = run.path / "report.html"
        path.write_text("")
        return path

    monkeypatch.setattr("legato.report.build.write_figures", lambda run: None)  # slow, and tested on their own
    monkeypatch.setattr("legato.report.build.write_report", write_page)
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    for name in ("ablation.csv", "matched.json", "notes.txt", "final_info.json", "report.html"):
        assert (run / name).is_file()
    assert "At the baseline's sparsity and reconstruction" in (run / "notes.txt").read_text()

    labels: list[str] = []
    written = lambda runs, out: labels.extend(runs) or {"a": out / "a.png"}  # noqa: E731
    monkeypatch.setattr("legato.report.commands.write_comparison", written)
    other = write_synthetic_run(tmp_path / "b" / "run_1", named=("contrastive",))
    assert main(["report", str(run), str(other), "--out", "somewhere"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "somewhere/a.png"
    assert labels == [str(run), str(other)]  # two of one name keep their paths


def test_mistakes(run, tmp_path, capsys):
    assert "see legato --help" in error(capsys)
    assert "No such command 'comapre'" in error(capsys, "comapre")
    assert "Missing argument 'RUN...': see legato compare --help" in error(capsys, "compare")
    assert "No such option" in error(capsys, "compare", run, "--outt=x")
    assert "is not a finished run: it has no metrics.json" in error(capsys, "compare", tmp_path / "nowhere")
    assert "cannot be written" in error(capsys, "compare", run, "--out", tmp_path / "no" / "folder" / "x.json")
    alone = write_synthetic_run(tmp_path / "alone", named=())
    assert "there is nothing to compare but the baseline" in error(capsys, "compare", alone)
    (run / "metrics.json").write_text("{")
    assert "is damaged" in error(capsys, "report", run, code=1)


def test_debug_shows_where_it_happened(tmp_path):
    with pytest.raises(UsageError, match="is not a finished run"):
        main(["--debug", "compare", str(tmp_path)])


@pytest.mark.parametrize("name", sorted(COMMANDS.keys() - {"run"}))
def test_what_a_command_does_is_said_as_in_its_docstring(name):
    module, record, text = COMMANDS[name]
    assert getattr(import_module(f"legato.{module}"), record).__doc__.splitlines()[0] == text


def test_help_needs_no_slow_library():
    """Importing torch alone takes seconds."""
    code = (
        "import sys; from legato.cli import main; main(['--help']); assert not {'torch', 'numba'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    code = (
        "import legato.experiment.command, sys; assert not {'transformers', 'sklearn', 'altair'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
def test_help(command, capsys):
    assert main([*command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"Usage: {' '.join(['legato', *command])} " in shown
    assert "\x1b" not in shown
