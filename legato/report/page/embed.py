"""Content of a page, compressed inside it: its data and the plotting library. It asks nothing of a network."""

import base64
import gzip
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import vl_convert
from markupsafe import Markup

from legato.report.figures.drawn import Figure
from legato.report.figures.style import PAGE_COLOURS, PAGE_CONFIG


def island(name: str, content: str) -> Markup:
    """An inert <script> of that id that holds the text, gzip in base64; `legato.unpack(name)` in plots.js reads it."""
    packed = base64.b64encode(gzip.compress(content.encode(), mtime=0)).decode()
    return Markup('<script type="application/octet-stream" id="{}">{}</script>').format(name, Markup(packed))


def json_island(name: str, content: Any) -> Markup:
    """An island of JSON. Raises ValueError for NaN, which JSON cannot hold."""
    return island(name, json.dumps(content, allow_nan=False, separators=(",", ":"), ensure_ascii=False))


def plot_islands(figures: Sequence[Figure]) -> list[Markup]:
    """The plots by name with the colours that become the page's, and what draws them; nothing where there are none."""
    content = {figure.name: figure.plot.content() for figure in figures if figure.plot is not None}
    if not content:
        return []
    colours = {colour: f"--{name}" for colour, name in PAGE_COLOURS.items()}
    return [json_island("plot-data", {"config": PAGE_CONFIG, "colours": colours, "plots": content}), _library()]


@lru_cache(maxsize=1)
def _library() -> Markup:
    """Vega, Vega-Lite and Vega-Embed: 0.9 MB, 0.4 MB packed, run only once a plot comes near the window."""
    bundle = vl_convert.javascript_bundle()  # type: ignore[call-arg]  # its stub asks for what is optional
    return island("vega-js", bundle)


def script(name: str) -> Markup:
    """A script of this folder, as it stands in a page."""
    return Markup((Path(__file__).parent / name).read_text(encoding="utf-8"))
