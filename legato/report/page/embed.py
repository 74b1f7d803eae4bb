"""What a page carries inside itself, compressed: its data and the plotting library. It asks nothing of a network."""

import base64
import gzip
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from markupsafe import Markup
from plotly.offline import get_plotlyjs


def island(name: str, content: str) -> Markup:
    """An inert <script> of that id that holds the text, gzip in base64; `legato.unpack(name)` in plots.js reads it."""
    packed = base64.b64encode(gzip.compress(content.encode(), mtime=0)).decode()
    return Markup('<script type="application/octet-stream" id="{}">{}</script>').format(name, Markup(packed))


def json_island(name: str, content: Any) -> Markup:
    """An island of JSON. Raises ValueError for NaN, which JSON cannot hold."""
    return island(name, json.dumps(content, allow_nan=False, separators=(",", ":"), ensure_ascii=False))


@lru_cache(maxsize=1)
def plotly_island() -> Markup:
    """plotly.js as the plotly package ships it: 4.8 MB, 2 MB packed, run only once a plot comes near the window."""
    return island("plotly-js", get_plotlyjs())


def script(name: str) -> Markup:
    """A script of report/plots, as it stands in a page."""
    return Markup((Path(__file__).parents[1] / "plots" / name).read_text(encoding="utf-8"))
