"""What a reader sees and does in report.html and in comparison.html, in a headless Chromium."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from chromium import NARROW, WIDE, check_fits, check_legible, chromium, opened
from playwright.sync_api import Page, expect
from synthetic_latents import describe_latents
from synthetic_run import write_synthetic_run

from legato.report.run_page import write_report
from legato.report.runs.page import write_comparison
from legato.results.saved_run import SavedRun

HOSTILE = "<img src=x onerror=alert(1)><script>document.title='run'<!--{{ 7*7 }}"
HOSTILE_END = "</script></title><script>document.title='run'</script>-->"


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    paths = {
        "run_1": write_synthetic_run(folder / "run_1", grid=True, sweep=True),
        "run_2": write_synthetic_run(folder / "run_2", named=("window_variance", "slowness"), seeds=3),
    }
    describe_latents(paths["run_1"], ("baseline", "window_variance", "contrastive"), token=" <b>bold</b>")
    for path in paths.values():
        write_report(path)
    return paths


@pytest.fixture(scope="module")
def pages(runs, tmp_path_factory) -> dict[str, Path]:
    return {"report": runs["run_1"] / "report.html", "comparison": compared(runs, tmp_path_factory.mktemp("figures"))}


def compared(runs: dict[str, Path], out: Path) -> Path:
    return write_comparison({label: SavedRun.open(path) for label, path in runs.items()}, out)["comparison"]


def edit_metrics(run: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    edit(metrics)
    (run / "metrics.json").write_text(json.dumps(metrics))


def edit_config(run: Path, **settings: Any) -> None:
    """Change settings by `stage__name`."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    for name, value in settings.items():
        stage, _, key = name.partition("__")
        config["config"][stage][key] = value
    (run / "config.yaml").write_text(yaml.safe_dump(config))


def column(table, number: int) -> list[str]:
    return table.locator(f"tbody tr > :nth-child({number + 1})").evaluate_all(
        "cells => cells.map(cell => cell.dataset.value || cell.innerText.trim())"
    )


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [WIDE, NARROW])
@pytest.mark.parametrize("name", ["report", "comparison"])
def test_the_page_is_legible_and_fits(browser, pages, name, width, dark):
    with opened(browser, pages[name], width=width, dark=dark) as page:
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        check_legible(page)
        check_fits(page)
        assert page.locator("h1").inner_text() in ("run_1", "run_1, run_2")


@pytest.mark.parametrize("name", ["report", "comparison"])
def test_every_link_of_the_navigation_leads_to_a_section_that_says_something(browser, pages, name):
    with opened(browser, pages[name]) as page:
        links = page.locator("nav a")
        assert links.count() >= 7
        for link in links.all():
            link.focus()
            page.keyboard.press("Enter")
            section = page.locator(link.get_attribute("href"))
            assert len(section.inner_text()) > 40
            page.wait_for_function(
                "e => Math.abs(e.getBoundingClientRect().top) < innerHeight", arg=section.element_handle()
            )


def draw_plots(page: Page) -> int:
    """Scroll to every interactive plot and wait until it is drawn; how many there are."""
    plots = page.locator(".plot")
    for plot in plots.all():
        plot.scroll_into_view_if_needed()
        expect(plot).to_have_class(re.compile("drawn"))
    return plots.count()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_every_plot_is_drawn_legibly(browser, pages, width, dark):
    with opened(browser, pages["report"], width=width, dark=dark) as page:
        assert draw_plots(page) >= 5
        assert page.locator(".plot .panels svg, .plot .panels canvas").count() >= 30
        check_legible(page)
        check_fits(page)


def test_arms_sort_by_mouse_and_by_keyboard(browser, pages):
    with opened(browser, pages["report"]) as page:
        table = page.locator("#arms table").first
        head = table.get_by_role("columnheader", name="FVU")
        head.get_by_role("button").click()
        ascending = [float(value) for value in column(table, 1)]
        assert ascending == sorted(ascending)
        assert len(set(ascending)) > 2
        assert head.get_attribute("aria-sort") == "ascending"
        head.get_by_role("button").focus()
        page.keyboard.press("Enter")
        assert [float(value) for value in column(table, 1)] == ascending[::-1]
        assert head.get_attribute("aria-sort") == "descending"


def test_two_runs_stand_side_by_side(browser, runs, pages):
    with opened(browser, pages["comparison"]) as page:
        arms = page.locator("#arms table").first
        assert set(column(arms, 1)) == {"run_1", "run_2"}
        assert "window_variance, 3 seeds" in column(arms, 0)
        assert re.search(r"\d to 0\.\d", arms.inner_text()), "no interval over three seeds"
        differing = page.locator("#settings table").first.inner_text()
        assert "training.seeds" in differing
        assert "data.context_length" not in differing
        assert "compare directly" in page.locator("#overview").inner_text()
        matched = page.locator("#matched")
        assert "run_1 and run_2" in matched.inner_text()
        assert "slowness" in matched.locator("table").first.inner_text()
        for section in ("tradeoff", "consistency", "training"):
            assert page.locator(f"#{section} figure").count() >= 1
        assert draw_plots(page) == 4
        arms.get_by_role("button", name="run", exact=True).click()
        assert column(arms, 1) == sorted(column(arms, 1))
        links = [link.get_attribute("href") for link in page.get_by_role("link", name="report").all()]
        assert [(pages["comparison"].parent / link).resolve().parent.name for link in links] == ["run_1", "run_2"]
        assert all((pages["comparison"].parent / link).is_file() for link in links)


def test_runs_that_do_not_compare_are_said_not_to(browser, runs, tmp_path):
    other = shutil.copytree(runs["run_2"], tmp_path / "other")
    edit_config(other, model__model="another/model", data__dataset="another/text")
    bare = shutil.copytree(runs["run_2"], tmp_path / "bare")
    (bare / "config.yaml").unlink()
    with opened(browser, compared({**runs, "other": other, "bare": bare}, tmp_path / "figures")) as page:
        text = page.locator("#overview").inner_text()
        assert "run_1 and run_2 do; other and bare only against their own baseline" in text
        assert "The models differ (run_1: demo, run_2: demo, other: another/model)" in text
        assert "tokenizer" in text
        assert "dataset run_1: demo, run_2: demo, other: another/text" in text
        assert "bare saved no configuration" in text
        titles = page.locator(".matched > h3").all_inner_texts()
        assert titles == ["run_1 and run_2", "other", "bare"]


def test_hostile_names_are_shown_as_text(browser, tmp_path):
    run = write_synthetic_run(tmp_path / "run_1", named=("plain", "\u202ertl \u05d0\u05d1 \U0001f600"))

    def renamed(arm, name):
        training = arm["training"]
        return {**arm, "training": {**training, "recipe": {**training["recipe"], "method": name, "group": name}}}

    def rename(metrics):
        metrics[HOSTILE] = renamed(metrics.pop("plain"), HOSTILE)
        metrics["w" * 150] = renamed(metrics["baseline"], "w" * 150)

    edit_metrics(run, rename)
    edit_config(run, model__model=HOSTILE_END, data__dataset="\U0001f600" * 200, data__text_column="<!--<script>")
    for path in (write_report(run), compared({"a</script><b>": run, "b": run}, tmp_path / "figures")):
        with opened(browser, path, width=NARROW) as page:
            assert HOSTILE in page.locator("#arms").inner_text()
            draw_plots(page)
            page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
            assert HOSTILE_END in page.locator("body").inner_text()
            assert "<!--<script>" in page.locator("body").inner_text()
            assert page.locator("img").count() == 0
            check_fits(page)
            assert page.title() != "run"


def test_a_comparison_of_partial_runs_says_what_is_missing(browser, tmp_path):
    run = write_synthetic_run(tmp_path / "run_1", named=())

    def strip(metrics):
        for arm in metrics.values():
            del arm["consistency"]
            del arm["core"]["ce_loss_score"]

    edit_metrics(run, strip)
    shutil.rmtree(run / "features")
    (run / "log.jsonl").unlink()
    (run / "config.yaml").unlink()
    with opened(browser, compared({"one": run, "two": run}, tmp_path / "figures")) as page:
        text = page.locator("main").inner_text()
        for missing in (
            "no run has both FVU and kappa excess",
            "no run has AC excess or kappa excess over lags",
            "no run has a training log",
        ):
            assert missing in text
        assert "one is not in this comparison: it holds nothing but the baseline" in text
        assert "one and two saved no configuration" in text
