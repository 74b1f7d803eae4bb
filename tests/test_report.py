import base64
import gzip
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import vl_convert
from synthetic_latents import describe_latents
from synthetic_run import write_synthetic_run

from legato.common.errors import LegatoError, UsageError
from legato.report.figures.chart import significant
from legato.report.figures.matched import matched_comparison
from legato.report.figures.plot import Plot
from legato.report.figures.style import PAGE_COLOURS, arm_colours, arm_styles
from legato.report.figures.tradeoff import cost_scene, outside_in_words, pareto_front, sparsity_fidelity
from legato.report.page.latent_tables import Piece, pieces
from legato.report.page.tables import matched_tables, recipe_rows
from legato.report.registry import FIGURES, draw_figures, write_figures
from legato.report.run_page import report_html, write_report
from legato.report.runs.page import write_comparison
from legato.results.matched.compare import write_matched
from legato.results.matched.points import ALL, MEASURES
from legato.results.saved_run import SavedRun

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


def island(markup: str, name: str) -> str:
    """What the page unpacks from its data island of that name."""
    packed = re.search(rf'<script type="application/octet-stream" id="{name}">([^<]*)</script>', markup)
    return gzip.decompress(base64.b64decode(packed[1])).decode()


def test_a_full_run_gives_every_figure(full_run):
    assert [figure.name for figure in write_figures(full_run) if figure.plot] == list(FIGURES)
    written = sorted((full_run / "figures").iterdir())
    assert [path.stem for path in written] == sorted(FIGURES)
    for path in written:
        assert path.parent == full_run / "figures"
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert path.stat().st_size > 10_000


def test_every_chart_of_a_full_run_is_valid_vega_lite(full_run):
    run = SavedRun.open(full_run)
    for draw in FIGURES.values():
        for panel in draw(run).views[0].panels:
            panel.chart.to_dict(validate=True)


def test_the_page_needs_nothing_but_itself(full_run):
    page = Page(write_report(full_run).read_text())
    assert page.loads == []
    assert len(page.ids) == len(set(page.ids))
    assert re.search(
        r"window_variance: \d\.\d times the baseline's kappa excess at lag 1 \(0\.\d+ against 0\.\d+\)", page.text
    )
    assert page.text.count("is not in this report") == 1  # the feature browser, which has tests of its own
    assert all(figure.title in page.text for figure in draw_figures(SavedRun.open(full_run)) if figure.section)


def test_the_plots_follow_the_pages_colours(full_run):
    data = json.loads(island(report_html(SavedRun.open(full_run)), "plot-data"))
    assert data["colours"] == {colour: f"--{name}" for colour, name in PAGE_COLOURS.items()}
    used = set(re.findall(r'"(#[0-9a-f]{6})"', json.dumps(data["plots"])))
    assert {*arm_colours()[:3]} <= used
    assert used <= set(data["colours"]), "a colour that would not change with the scheme"


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
    title = next(lacking.title for lacking in draw_figures(SavedRun.open(small_run)) if lacking.name == figure)
    assert f"{title} is not in this report" in page.text
    assert reason in page.text
    assert re.search(
        r"window_variance: \d\.\d times the baseline's kappa excess at lag 1 \(0\.\d+ against 0\.\d+\)", page.text
    )


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
    assert {figure.name for figure in write_figures(small_run) if figure.plot} == {
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
    assert {figure.name for figure in write_figures(small_run) if figure.plot} >= ALWAYS


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
    assert len({(s.colour, s.dash, s.marker) for s in styles.values()}) == len(run.arms)


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
    code = "import sys, legato.report.text.notes; assert not {'altair', 'vl_convert'} & {*sys.modules}, 1"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_page_holds_its_plots_and_what_draws_them(full_run):
    run = SavedRun.open(full_run)
    markup = report_html(run)
    plots = json.loads(island(markup, "plot-data"))["plots"]
    assert set(plots) == set(FIGURES) - {"ac_over_lag"}
    assert set(re.findall(r'data-plot="([^"]*)"', markup)) == set(plots)
    assert "vegaEmbed" in island(markup, "vega-js")
    drawn = {figure.name: figure.plot for figure in draw_figures(run)}
    assert [view.label for view in drawn["kind_map"].views] == ["baseline", "window_variance", "contrastive"]
    steps = plots["redundancy_map"]["views"][0]["panels"][0]["charts"]
    assert len(steps) == len(drawn["redundancy_map"].steps) == 5


def values_of(plot: Plot) -> list[dict]:
    """Every row of data in a plot's first panel."""
    return [row for rows in plot.views[0].panels[0].chart.to_dict()["datasets"].values() for row in rows]


def test_a_plot_shows_the_saved_numbers_under_the_pointer(full_run):
    run = SavedRun.open(full_run)
    shown = {row["arm"]: row for row in values_of(sparsity_fidelity(run)) if "arm" in row}
    for arm in run.highlighted:
        assert shown[arm.name]["x"] == pytest.approx(arm.value("core.l0"), rel=1e-4)
        assert shown[arm.name]["y"] == pytest.approx(arm.value("core.fvu"), rel=1e-4)
    svg = vl_convert.vegalite_to_svg(sparsity_fidelity(run).views[0].panels[0].chart.to_dict())
    assert f"FVU: {run.baseline.value('core.fvu'):.3f}" in svg


def test_a_run_of_16k_latents_stays_small(tmp_path):
    run = write_synthetic_run(tmp_path / "run_1", latents=16384, named=("window_variance",))
    describe_latents(run, ("baseline", "window_variance"))
    assert len(report_html(SavedRun.open(run))) < 6e6


def test_tables_carry_intervals_and_targets(full_run):
    run = SavedRun.open(full_run)
    rows, further = recipe_rows(run)
    assert [row.arm for row in rows] == ["baseline", "window_variance", "contrastive"]
    assert len(further) == 17
    low, high = run.arm("contrastive").series("consistency.interval95.kappa1_excess_within")
    assert f"{low:.3f} to {high:.3f}" in [cell.difference for cell in rows[2].cells]
    targets = matched_tables(run)[0]
    assert len(targets.columns) == 7
    assert {row.arm for row in targets.rows} == {"window_variance", "contrastive"}
    assert targets.rows[0].cells[0].difference == "\u2717 missed"


def test_seeds_of_a_recipe_are_one_row_with_their_spread(tmp_path):
    rows, further = recipe_rows(SavedRun.open(write_synthetic_run(tmp_path / "run_1", seeds=3)))
    assert len(rows) == 3
    assert len(further) == 9
    assert rows[1].cells[4].difference.startswith("\u00b1")


def test_contexts_of_a_pair_are_cut_at_their_marks():
    assert pieces("17: of the[ United]\u2081[ States]\u2082 of[[]\u2081\u2082 [1]") == [
        Piece("of the"),
        Piece(" United", "a"),
        Piece(" States", "b"),
        Piece(" of"),
        Piece("[", "ab"),
        Piece(" [1]"),
    ]


def test_a_failed_arm_is_named_beside_the_view(full_run, tmp_path):
    run_dir = write_synthetic_run(tmp_path / "run_1")
    edit_metrics(run_dir, lambda metrics: metrics["contrastive"]["core"].update(fvu=0.9))
    run = SavedRun.open(run_dir)
    found = cost_scene(run)
    assert set(found.inside) == {"baseline", "window_variance"}
    assert found.limits[0][1] < 0.3
    assert found.outside["contrastive"][0] > found.limits[0][1]
    assert "contrastive (FVU 0.90" in outside_in_words(run, found, ("FVU", "kappa excess"), (2, 2))
    assert "contrastive (FVU 0.90" in Page(report_html(run)).text


def test_numbers_as_plots_take_them():
    assert significant([0.0123456, float("nan"), 1234.5]) == [0.0123, None, 1230.0]
    assert significant(["a", "b"]) == ["a", "b"]


@pytest.mark.parametrize(
    ("absent", "title"),
    [
        ("redundancy", "Who fires with whom, and when"),
        ("features", "Map of latents"),
        ("matched.json", "Ratios to the baseline where the cost is equal"),
    ],
)
def test_a_run_without_one_part_says_so(full_run, tmp_path, absent, title):
    run = tmp_path / "run_1"
    shutil.copytree(full_run, run)
    path = run / absent
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = Page(report_html(SavedRun.open(run)))
    assert f"{title} is not in this report" in page.text


def test_hostile_tokens_are_shown_as_text(tmp_path):
    token = "<script>alert(1)</script>\u202e\U0001f600"
    run = write_synthetic_run(tmp_path / "run_1")
    harmless = Page(report_html(SavedRun.open(describe_latents(run, ("baseline",)))))
    other = write_synthetic_run(tmp_path / "run_2")
    page = Page(report_html(SavedRun.open(describe_latents(other, ("baseline",), token=token))))
    assert page.open_tags.count("script") == harmless.open_tags.count("script")
    assert page.text.count("<script>alert(1)</script>") >= 2


def test_where_arms_crowd_a_legend_names_them_and_says_what_every_dot_is(tmp_path):
    names = ("a_arm", "b_arm", "c_arm", "d_arm", "e_arm")
    plot = sparsity_fidelity(SavedRun.open(write_synthetic_run(tmp_path / "run_1", named=names, seeds=2)))
    assert [key.label for key in plot.keys] == ["baseline", *names, "small: another seed"]
    assert not {row.get("text") for row in values_of(plot)} & set(names)

    plot = sparsity_fidelity(SavedRun.open(write_synthetic_run(tmp_path / "run_2", grid=True)))
    assert [key.label for key in plot.keys][-1] == "15 ablation members"
    assert {"baseline", "contrastive"} <= {row.get("text") for row in values_of(plot)}


def test_ratios_far_apart_have_ticks_apart_and_an_arrow_below_the_floor(tmp_path):
    def method(ratio):
        entry = {"ratio": ratio, "interval95_documents": None, "interval95_seeds": None}
        populations = {ALL: {measure: entry for measure in MEASURES[:2]}}
        return {"at_l0": {"matched": True, "populations": populations}, "at_fvu": {"matched": False}}

    run = SavedRun.open(write_synthetic_run(tmp_path / "run_1"))
    ratios = {"persistent": 65.0, "slowness": 0.8, "frozen_decoder": 0.04}
    run.__dict__["matched"] = {"methods": {name: method(ratio) for name, ratio in ratios.items()}}
    layers = matched_comparison(run).views[0].panels[0].chart.to_dict()["layer"]
    ticks = [layer["encoding"]["x"]["axis"]["values"] for layer in layers if "axis" in layer["encoding"].get("x", {})]
    assert ticks[0] == [1, 3, 10, 30]
    assert [layer["mark"].get("shape") for layer in layers].count("triangle-left") == 1
