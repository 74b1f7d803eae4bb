import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import matplotlib as mpl
import pytest
from synthetic_latents import describe_latents
from synthetic_run import write_synthetic_run

from legato.comparison import write_matched
from legato.errors import LegatoError, UsageError
from legato.report.ablation_figures import pareto_front
from legato.report.comparison import write_comparison
from legato.report.figures import FIGURES, write_figures
from legato.report.html import report_html, write_report
from legato.report.style import arm_colours, arm_styles
from legato.results import SavedRun

ROOT = Path(__file__).resolve().parents[1]
ALWAYS = {"training_curves", "fvu_l0", "kappa_over_lag", "ac_over_lag", "kappa_by_firing_rate", "fvu_kappa"}


@pytest.fixture(scope="module")
def full_run(tmp_path_factory) -> Path:
    run = write_synthetic_run(tmp_path_factory.mktemp("runs") / "run_1", grid=True, sweep=True)
    describe_latents(run, ("baseline", "window_variance", "contrastive"))
    write_matched(run)
    return run


@pytest.fixture
def small_run(tmp_path) -> Path:
    return write_synthetic_run(tmp_path / "run_1")


def edit_metrics(run: Path, edit) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    edit(metrics)
    (run / "metrics.json").write_text(json.dumps(metrics))


class Page(HTMLParser):
    """What a browser would find: visible text, element ids, addresses it would load."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.text, self.ids, self.loads, self.open_tags = "", [], [], []
        self.feed(markup)
        self.close()
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attrs):
        self.open_tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href", "data") and not value.startswith(("#", "data:")):
                self.loads.append(value)

    def handle_data(self, data):
        if self.open_tags[-1:] not in (["script"], ["style"]):
            self.text += data + " "


def test_a_full_run_gives_every_figure(full_run):
    written = write_figures(full_run)
    assert list(written) == [spec.name for spec in FIGURES]
    for path in written.values():
        assert path.parent == full_run / "figures"
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert path.stat().st_size > 10_000


def test_figures_leave_matplotlib_as_it_was(small_run):
    before = dict(mpl.rcParams)
    write_figures(small_run)
    assert dict(mpl.rcParams) == before


def test_the_page_needs_nothing_but_itself(full_run):
    page = Page(write_report(full_run).read_text())
    assert page.loads == []
    assert len(page.ids) == len(set(page.ids))
    assert "window_variance holds its features longer" in page.text
    assert "is not in this report" not in page.text
    assert all(spec.title in page.text for spec in FIGURES if spec.on_page)


def test_the_figures_follow_the_pages_colours(full_run):
    figures = re.findall(r"<svg style=.*?</svg>", report_html(SavedRun.open(full_run)), flags=re.DOTALL)
    assert len(figures) == sum(spec.on_page and spec.plot is None for spec in FIGURES)
    for colour in arm_colours():
        assert not any(colour in figure for figure in figures)


@pytest.mark.parametrize(
    ("absent", "figure", "reason"),
    [
        ("log.jsonl", "training_curves", "log.jsonl"),
        ("arrays", "position_matrix", "arrays/"),
        ("features", "kappa_excess_distribution", "features/"),
    ],
)
def test_what_was_not_saved_is_named_and_nothing_else_is_lost(small_run, absent, figure, reason):
    path = small_run / absent
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = Page(report_html(SavedRun.open(small_run)))
    spec = next(spec for spec in FIGURES if spec.name == figure)
    assert f"{spec.title} is not in this report" in page.text
    assert reason in page.text
    assert "window_variance holds" in page.text


def test_one_arm_without_consistency_or_loss_score_still_gives_a_report(small_run):
    def strip(metrics):
        for arm in list(metrics):
            if arm != "baseline":
                del metrics[arm]
        del metrics["baseline"]["consistency"]
        for key in ("ce_loss_score", "ce_loss_with_sae"):
            del metrics["baseline"]["core"][key]

    edit_metrics(small_run, strip)
    (small_run / "config.yaml").unlink()
    assert set(write_figures(small_run)) == {
        "training_curves",
        "fvu_l0",
        "kappa_excess_distribution",
        "position_matrix",
    }
    text = Page(report_html(SavedRun.open(small_run))).text
    assert "There is only the baseline" in text
    assert "Not measured for every arm: CE score" in text
    assert "No configuration (config.yaml) was saved" in text


def test_short_contexts_leave_gaps_at_long_lags(small_run):
    def shorten(metrics):
        for arm in metrics.values():
            for series in arm["consistency"]["kappa"].values():
                series[-2:] = [None, None]
            arm["consistency"]["kappa_excess_within"][-2:] = [None, None]

    edit_metrics(small_run, shorten)
    assert set(write_figures(small_run)) >= ALWAYS


def test_hostile_names_are_shown_as_text(tmp_path):
    name = "<script>alert($x_1$)<"
    run = write_synthetic_run(tmp_path / "run_1", named=("plain",))
    harmless = Page(report_html(SavedRun.open(run)))

    def rename(metrics):
        metrics[name] = metrics.pop("plain")

    edit_metrics(run, rename)
    (run / "config.yaml").write_text("config: {model: {model: '<img src=x>'}}\n")
    page = Page(report_html(SavedRun.open(run)))
    assert page.open_tags.count("script") == harmless.open_tags.count("script")
    assert "img" not in page.open_tags
    assert name in page.text
    assert "<img src=x>" in page.text


def test_pareto_front_by_hand():
    points = {"a": (0.2, 0.1), "b": (0.3, 0.05), "c": (0.25, 0.3), "d": (0.4, 0.3), "e": (0.2, 0.08), "f": (0.5, 0.4)}
    assert pareto_front(points) == ["a", "c", "f"]  # b and d are beaten by a and c, e by a at the same cost


def test_the_baseline_has_the_first_style_wherever_it_stands(small_run):
    run = SavedRun.open(small_run)
    styles = arm_styles(reversed(run.arms))
    assert styles["baseline"].colour == arm_colours()[0]
    assert len({(s.colour, s.line, s.marker) for s in styles.values()}) == len(run.arms)


def test_with_many_arms_only_baseline_and_named_ones_stand_out(full_run):
    run = SavedRun.open(full_run)
    assert [arm.name for arm in run.highlighted] == ["baseline", "window_variance", "contrastive"]
    assert len(run.background) == 17


def test_runs_are_compared(tmp_path):
    write_synthetic_run(tmp_path / "run_0")
    write_synthetic_run(tmp_path / "run_1", seeds=2)
    (tmp_path / "run_2").mkdir()
    shutil.copy(ROOT / "plot.py", tmp_path)
    done = subprocess.run(
        [sys.executable, "-W", "error", "plot.py"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "run_2 has no metrics.json yet" in done.stdout
    assert len(list((tmp_path / "figures").glob("compare_*.png"))) == 5


def test_plot_without_runs_says_what_to_do(tmp_path):
    shutil.copy(ROOT / "plot.py", tmp_path)
    done = subprocess.run(
        [sys.executable, "plot.py"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: no finished run_* folder")
    assert len(done.stderr.splitlines()) == 1


def test_a_run_without_consistency_is_left_out_of_that_figure(tmp_path):
    run = write_synthetic_run(tmp_path / "run_0")

    def strip(metrics):
        for arm in metrics.values():
            del arm["consistency"]

    edit_metrics(run, strip)
    written = write_comparison({"only": SavedRun.open(run)}, tmp_path / "figures")
    assert set(written) == {"compare_overview", "compare_training", "comparison"}


def test_damaged_folders_give_one_clear_error(small_run, tmp_path):
    with pytest.raises(UsageError, match=r"no metrics\.json"):
        write_report(tmp_path / "absent")
    (small_run / "arrays" / "baseline.npz").write_bytes(b"torn")
    with pytest.raises(LegatoError, match="damaged"):
        write_report(small_run)


def test_nothing_else_needs_the_report():
    code = "import sys, legato.notes; assert not {'matplotlib', 'legato.report'} & {*sys.modules}, 1"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
