"""Figures by name: what a page says of each (figures.yaml), what draws it, and what came of that."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from legato.report.figures.plot import MissingResult, Plot, drawing


@dataclass(frozen=True)
class Figure:
    """name: of its PNG file. section: of the page, empty where another figure there shows the same.

    plot: None where the saved results do not allow it; missing: what they lack.
    """

    name: str
    plot: Plot | None
    missing: str = ""
    section: str = ""
    title: str = ""
    caption: str = ""


def draw(draws: Mapping[str, Callable[..., Plot]], told: Path, *given: Any) -> list[Figure]:
    """Draw the figures from what is given. told: the YAML file that says section, title and caption of each by name."""
    words = yaml.safe_load(told.read_text(encoding="utf-8"))
    figures = []
    for name, drawn in draws.items():
        plot, missing = None, ""
        with drawing():
            try:
                plot = drawn(*given)
            except MissingResult as lack:
                missing = str(lack)
        figures.append(Figure(name, plot, missing, **(words[name] or {})))
    return figures


def write_pngs(figures: Sequence[Figure], folder: Path) -> dict[str, Path]:
    """Write `<name>.png` for every figure that could be drawn; return the paths by name."""
    folder.mkdir(parents=True, exist_ok=True)
    written = {figure.name: folder / f"{figure.name}.png" for figure in figures if figure.plot is not None}
    for figure in figures:
        if figure.plot is not None:
            written[figure.name].write_bytes(figure.plot.png())
    return written
