"""Pages in a headless Chromium, for the tests of what a reader sees and does.

The system's Chromium is driven (CHROMIUM in the environment names another). Without one these tests are skipped, with
LEGATO_NEEDS_CHROMIUM in the environment they fail.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
WIDE, NARROW = 1400, 420

# Every visible piece of text with its WCAG 2 contrast to what lies behind it. A canvas turns any CSS colour into RGB.
_CONTRASTS = """
() => {
  const context = Object.assign(document.createElement("canvas"), {width: 1, height: 1})
    .getContext("2d", {willReadFrequently: true});
  const rgba = colour => {
    context.clearRect(0, 0, 1, 1);
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data];
  };
  const over = (top, below) => below.slice(0, 3).map((value, i) => (top[3] * top[i] + (255 - top[3]) * value) / 255);
  const behind = element => {
    const layers = [];
    for (let node = element; node; node = node.parentElement) layers.push(rgba(getComputedStyle(node).backgroundColor));
    const canvas = matchMedia("(prefers-color-scheme: dark)").matches ? [18, 18, 18] : [255, 255, 255];
    return layers.reverse().reduce((below, layer) => over(layer, below), canvas);
  };
  const luminance = colour => colour
    .map(value => value / 255).map(value => value <= .04045 ? value / 12.92 : ((value + .055) / 1.055) ** 2.4)
    .reduce((sum, value, i) => sum + value * [.2126, .7152, .0722][i], 0);
  const found = [];
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement, text = texts.currentNode.textContent.trim();
    if (!text || element.closest("script, style, template")) continue;
    if (!element.checkVisibility({visibilityProperty: true})) continue;
    const style = getComputedStyle(element), svg = element instanceof SVGElement;
    const below = behind(element), ink = over(rgba(svg ? style.fill : style.color), below);
    const [dark, light] = [luminance(below), luminance(ink)].sort((a, b) => a - b);
    found.push({text, svg, contrast: (light + .05) / (dark + .05)});
  }
  return found;
}
"""

_SIDEWAYS = """
() => {
  const root = document.documentElement;
  if (root.scrollWidth <= root.clientWidth) return [];
  const boxed = e => e && (getComputedStyle(e).overflowX !== "visible" || boxed(e.parentElement));
  const wide = e => !boxed(e) && (e.getBoundingClientRect().right > root.clientWidth + 1
    || e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display !== "inline");
  const found = [...document.querySelectorAll("body *")].filter(wide);
  const innermost = found.filter(e => !found.some(other => other !== e && e.contains(other)));
  return [`${root.scrollWidth - root.clientWidth} px`,
    ...innermost.map(e => `${e.tagName} ${e.id} ${e.getAttribute("class")}: ${e.textContent.trim().slice(0, 40)}`)];
}
"""


def chromium_path() -> str:
    """The Chromium to drive; skips the test, or fails it where LEGATO_NEEDS_CHROMIUM is set, if there is none."""
    for name in (os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome"):
        if name and (found := shutil.which(name)):
            return found
    reason = "no Chromium here: install the package `chromium`, or name the program in CHROMIUM"
    if os.environ.get("LEGATO_NEEDS_CHROMIUM"):
        pytest.fail(reason)
    pytest.skip(reason)


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser with an empty profile of its own."""
    path = chromium_path()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@contextmanager
def opened(browser: Browser, path: Path, *, width: int = WIDE, dark: bool = False) -> Iterator[Page]:
    """A page opened from disk, as a double click does.

    Fails at the end if the page wrote a warning or an error to the console, raised, opened a dialog or a second page,
    or asked for anything but itself.
    """
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light", reduced_motion="reduce"
    )
    context.set_default_timeout(15_000)
    page = context.new_page()
    address, problems = path.resolve().as_uri(), []
    page.on("console", lambda m: m.type in ("error", "warning") and problems.append(f"console {m.type}: {m.text}"))
    page.on("pageerror", lambda error: problems.append(f"error: {error}"))
    page.on("websocket", lambda socket: problems.append(f"web socket: {socket.url}"))
    page.on("dialog", lambda dialog: (problems.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    context.on("page", lambda other: problems.append(f"another page: {other.url}"))
    context.on("request", lambda request: _foreign(request.url, address) and problems.append(f"asks for {request.url}"))
    page.goto(address)
    try:
        yield page
    finally:
        context.close()
    assert not problems, problems


def _foreign(url: str, address: str) -> bool:
    return not url.startswith((address, "data:", "blob:"))


def check_legible(page: Page, *, text: float = 4.5, labels: float = 3.0) -> None:
    """Visible text has the contrast that WCAG AA asks of body text; labels: what is asked of text in SVG figures."""
    poor = [
        f"{found['contrast']:.2f}: {found['text'][:60]}"
        for found in page.evaluate(_CONTRASTS)
        if found["contrast"] < (labels if found["svg"] else text)
    ]
    assert not poor, "\n".join(poor)


def check_fits(page: Page) -> None:
    """The page does not scroll sideways; what scrolls inside a box of its own may."""
    found = page.evaluate(_SIDEWAYS)
    assert not found, "\n".join(found)
