"""The feature browser in report.html, in a headless Chromium: a real small run on a hostile text, and a large one."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from chromium import NARROW, WIDE, check_fits, check_legible, chromium, opened
from hostile_run import HOSTILE, write_hostile_run
from playwright.sync_api import Page, expect
from synthetic_latents import describe_latents
from synthetic_run import write_synthetic_run

from legato.evaluation.latents.examples import OtherSAE, ShownText, write_strips, write_text
from legato.report.run_page import write_report
from legato.sae.kernels.pairs import PairsByLatent

MOST_BYTES, MOST_SECONDS = 15_000_000, 20.0  # it opens in under 3 s; a busy machine gets more
BIG = 16_384


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_hostile_run(tmp_path_factory.mktemp("hostile"), "--eval_rows=40")


@pytest.fixture(scope="module")
def browser(run):  # after the run, whose training must not share a process with Playwright's event loop
    with chromium() as browser:
        yield browser


def latents(page: Page) -> list[int]:
    """The latents in sight, in the order of the table."""
    return page.locator("#feature-table [data-latent]").evaluate_all(
        "rows => rows.sort((a, b) => a.ariaRowIndex - b.ariaRowIndex).map(row => +row.dataset.latent)"
    )


def ready(page: Page) -> Page:
    page.wait_for_selector("#feature-browser[data-ready]")
    return page


def tokens(page: Page) -> list[str]:
    return page.locator(".strip .tok bdi").all_text_contents()


def test_passages_stand_there_before_anything_is_asked(run, browser):
    with opened(browser, run / "report.html") as page:
        ready(page)
        expect(page.locator("#feature-table [data-latent]").first).to_be_visible()
        assert len(tokens(page)) > 20
        shades = page.locator(".strip .tok").evaluate_all("all => all.map(one => +one.style.getPropertyValue('--a'))")
        assert max(shades) > 0.5


def test_hostile_tokens_are_shown_as_text_in_every_latent(run, browser):
    shown = set(pq.read_table(run / "strips" / "tokens.parquet")["text"].to_pylist())
    expected = {word for word in HOSTILE if word in shown}
    assert len(expected) > 15
    seen: set[str] = set()
    with opened(browser, run / "report.html") as page:
        ready(page)
        for latent in range(0, 64, 3):
            page.evaluate("hash => { location.hash = hash; }", f"#latent/legato/{latent}")
            page.wait_for_selector(f'#latent-panel[data-open="legato/{latent}"]')
            seen |= set(tokens(page))
        assert expected - seen == set()
        assert page.locator("#feature-browser img, #feature-browser [onload], #feature-browser [onerror]").count() == 0
        for word in HOSTILE:
            page.locator("#feature-search").fill(word)
            expect(page.locator("#feature-count")).to_contain_text("of 64 latents")


def test_a_word_a_number_and_a_condition_find_latents(run, browser):
    density_F = pq.read_table(run / "features" / "legato.parquet")["density"].to_numpy()
    with opened(browser, run / "report.html") as page:
        ready(page).locator('[data-arm="legato"]').click()
        search, count = page.locator("#feature-search"), page.locator("#feature-count")
        search.fill("density>0.05")
        expect(count).to_contain_text(f"{np.sum(density_F > 0.05)} of 64 latents")
        assert all(density_F[latent] > 0.05 for latent in latents(page))
        search.fill("<script>alert(1)</script>")
        expect(count).to_contain_text("is in the text")
        page.locator("#feature-table [data-latent]").first.click()
        expect(page.locator("#latent-panel")).to_have_attribute("data-open", f"legato/{latents(page)[0]}")
        assert "<script>alert(1)</script>" in tokens(page)
        search.fill("17")
        expect(page.locator("#feature-table [data-latent]").first).to_have_attribute("data-latent", "17")
        search.fill("no-such-word-anywhere")
        expect(count).to_contain_text("0 of 64 latents")
        search.fill("nonsense>3")
        expect(count).to_contain_text("is no condition on a column")


def test_a_column_sorts_both_ways(run, browser):
    density_F = pq.read_table(run / "features" / "legato.parquet")["density"].to_numpy()
    with opened(browser, run / "report.html") as page:
        ready(page).locator('[data-arm="legato"]').click()
        column = page.locator('#feature-table [data-column="density"]')
        ways = []
        for _ in range(2):
            column.click()
            ways.append(column.locator("..").get_attribute("aria-sort"))
            values = density_F[latents(page)] * (1 if ways[-1] == "ascending" else -1)
            assert (np.diff(values) >= 0).all()
            assert np.ptp(values) > 0
        assert sorted(ways) == ["ascending", "descending"]


def test_the_keyboard_reaches_everything(run, browser):
    with opened(browser, run / "report.html") as page:
        panel, table = ready(page).locator("#latent-panel"), page.locator("#feature-table")
        page.keyboard.press("/")
        expect(page.locator("#feature-search")).to_be_focused()
        page.keyboard.type("density>0")
        page.keyboard.press("ArrowDown")
        expect(table).to_be_focused()
        page.keyboard.press("ArrowDown")
        page.keyboard.press("Enter")
        arm, second = panel.get_attribute("data-open").split("/")
        assert int(second) == latents(page)[1]
        page.keyboard.press("j")
        expect(panel).to_have_attribute("data-open", f"{arm}/{latents(page)[2]}")
        page.keyboard.press("k")
        expect(panel).to_have_attribute("data-open", f"{arm}/{second}")
        page.keyboard.press("Escape")
        expect(panel).not_to_have_attribute("data-open", f"{arm}/{second}")
        page.go_back()
        expect(panel).to_have_attribute("data-open", f"{arm}/{second}")


def test_a_token_says_what_it_is(run, browser):
    with opened(browser, run / "report.html") as page:
        ready(page).goto(page.url + "#latent/legato/4")
        token = page.locator("#latent-panel .strip .tok").nth(2)
        token.scroll_into_view_if_needed()
        token.hover()
        note = page.locator("#token-note")
        expect(note).to_be_visible()
        expect(note).to_contain_text(token.locator("bdi").text_content())


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_an_open_latent_is_legible_and_fits(run, browser, width, dark):
    with opened(browser, run / "report.html", width=width, dark=dark) as page:
        ready(page)
        check_legible(page)
        check_fits(page)
        page.evaluate("location.hash = '#latent/legato/4'")
        page.wait_for_selector('#latent-panel[data-open="legato/4"] .strip')
        check_legible(page)
        check_fits(page)


def test_a_link_to_a_latent_opens_it(run, browser, tmp_path):
    with opened(browser, run / "report.html") as page:
        page.goto(page.url + "#latent/baseline/3")
        page.reload()
        ready(page)
        expect(page.locator("#latent-title")).to_contain_text("baseline 3")
        page.goto(page.url.partition("#")[0] + "#latent/nobody/99999")
        page.reload()
        ready(page)


def test_partial_runs_say_what_is_missing_and_keep_the_rest(run, browser, tmp_path):
    for absent, said in (
        ("strips", "passages"),
        ("redundancy", "redundancy"),
        ("features", "features"),
        ("arrays", "arrays"),
    ):
        partial = shutil.copytree(run, tmp_path / absent)
        shutil.rmtree(partial / absent)
        (partial / "checksums.json").unlink()
        with opened(browser, write_report(partial)) as page:
            gaps = page.locator(".absent").all_inner_texts()
            assert any("is not in this report" in gap and said in gap for gap in gaps), (absent, gaps)
            assert page.locator("#arms tbody tr").count() == 2
            assert (page.locator("#feature-browser[data-ready]").count() == 1) == (absent in ("redundancy", "arrays"))


def test_one_arm_without_consistency_or_loss_score_is_still_a_page(run, browser, tmp_path):
    bare = shutil.copytree(run, tmp_path / "bare")
    metrics = json.loads((bare / "metrics.json").read_text())
    only = {key: metrics["baseline"][key] for key in ("core", "training")}
    for name in [name for name in only["core"] if name.startswith("ce_")]:
        del only["core"][name]
    (bare / "metrics.json").write_text(json.dumps({"baseline": only}))
    (bare / "matched.json").unlink()
    (bare / "checksums.json").unlink()
    with opened(browser, write_report(bare)) as page:
        ready(page)
        assert "There is only the baseline" in page.locator("#overview").inner_text()
        assert page.locator("#arms tbody tr").count() == 1
        assert len(tokens(page)) > 0 or page.locator("#feature-table [data-latent]").count() > 0


def test_sixteen_thousand_latents_open_fast_in_a_page_that_can_be_mailed(browser, tmp_path):
    page_path = write_report(write_big_run(tmp_path / "run_1"))
    assert page_path.stat().st_size < MOST_BYTES
    with opened(browser, page_path) as page:
        ready(page)
        seconds = page.evaluate("performance.now()") / 1000
        print(f"{page_path.stat().st_size / 1e6:.1f} MB, ready after {seconds:.1f} s")
        assert seconds < MOST_SECONDS
        assert page.locator("#feature-table [data-latent]").count() < 100, "rows out of sight are drawn"
        page.locator("#feature-search").fill("word77")
        expect(page.locator("#feature-count")).to_contain_text("is in the text")
        page.locator("#feature-table [data-latent]").first.click()
        expect(page.locator("#latent-panel .strip").first).to_be_visible()


def write_big_run(path: Path, rows: int = 280, length: int = 128, k: int = 32) -> Path:
    run = write_synthetic_run(path, named=("legato",), latents=BIG)
    describe_latents(run, ("baseline", "legato"))
    rng = np.random.default_rng(0)
    text = ShownText(
        rng.integers(0, 9000, (rows, length)), np.arange(rows)[:, None].repeat(length, 1), np.ones((rows, length), bool)
    )
    write_text(run / "strips" / "tokens.parquet", text, lambda ids: [f" word{number}" for number in ids])
    W_dec = {
        arm: torch.randn(BIG, 16, generator=torch.Generator().manual_seed(i))
        for i, arm in enumerate(("baseline", "legato"))
    }
    share_F = rng.lognormal(0, 1.2, BIG)
    count_F = np.minimum(1 + k * rows * length * share_F / share_F.sum(), 0.2 * rows * length).astype(int)
    for arm, other in (("baseline", "legato"), ("legato", "baseline")):
        tokens_P = np.concatenate([np.sort(rng.choice(rows * length, count, replace=False)) for count in count_F])
        values_P = rng.exponential(1, tokens_P.size).astype(np.float32)
        order = PairsByLatent(np.cumsum([0, *count_F]), tokens_P.astype(np.int32), values_P, np.arange(tokens_P.size))
        others = {other: OtherSAE(W_dec[other], count_F > 0)}
        write_strips(run / "strips" / f"{arm}.parquet", order, text, W_dec[arm], others=others)
    return run
