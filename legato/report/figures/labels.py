"""Places for the names beside the points of a chart, so that they cover as little as possible."""

from collections.abc import Sequence
from dataclasses import dataclass

import altair as alt
import numpy as np

from legato.report.figures.chart import words
from legato.report.figures.plot import Rows

SIZE = 11  # pixels
# From the point: right, up, and how the text is aligned there.
_OFFSETS = (
    (9, 0, "left"),
    (6, 11, "left"),
    (6, -11, "left"),
    (-9, 0, "right"),
    (-6, 11, "right"),
    (-6, -11, "right"),
    (0, 14, "center"),
    (0, -14, "center"),
)
_SHARE_LEFT = {"left": 0.0, "center": 0.5, "right": 1.0}

Point = tuple[float, float]


@dataclass(frozen=True)
class PointLabel:
    point: Point
    text: str
    colour: str
    required: bool = True


def label_points(
    labels: Sequence[PointLabel],
    limits: tuple[Point, Point],
    size: tuple[float, float],
    *,
    lines: Sequence[Point] = (),
    faint: Sequence[Point] = (),
) -> list[alt.Chart]:
    """Text beside each point where it covers least; the first listed choose first.

    A label that would cover another label, a labelled point or a line is left out unless it is `required`; one without
    text only keeps its point free. limits: of x and of y; size: of the panel in pixels.
    lines: points along drawn lines; faint: points that may be covered where nothing else is left.
    """
    low, high = np.array(limits).T

    def pixels(points: Sequence[Point]) -> np.ndarray:
        return (np.reshape(list(points), (-1, 2)) - low) / (high - low) * size

    def around(points: Sequence[Point], radius: float) -> list[np.ndarray]:
        return [np.array([x - radius, y - radius, x + radius, y + radius]) for x, y in pixels(points)]

    taken = around([label.point for label in labels], 5)
    strokes, dots = around(lines, 1.5), around(faint, 3)
    placed: dict[tuple[float, float, str], list[dict[str, object]]] = {}
    for label in labels:
        if not label.text:
            continue
        [(x, y)] = pixels([label.point])
        width, height = 0.6 * len(label.text) * SIZE, 1.15 * SIZE
        boxes = []
        for dx, dy, align in _OFFSETS:
            left, middle = x + dx - _SHARE_LEFT[align] * width, y + dy
            boxes.append(np.array([left, middle - height / 2, left + width, middle + height / 2]))
        costs = [
            1000 * bool((box[:2] < 0).any() or (box[2:] > size).any())
            + 100 * _overlaps(box, taken)
            + 10 * _overlaps(box, strokes)
            + _overlaps(box, dots)
            for box in boxes
        ]
        best = costs.index(min(costs))
        if costs[best] >= 10 and not label.required:
            continue
        taken.append(boxes[best])
        row = {"x": label.point[0], "y": label.point[1], "text": label.text, "colour": label.colour}
        placed.setdefault(_OFFSETS[best], []).append(row)
    return [
        words(
            Rows(values=rows),
            align=align,
            baseline="middle",
            dx=dx,
            dy=-dy,
            fontSize=SIZE,
            style="label",
        ).encode(x="x:Q", y="y:Q", color=alt.Color("colour:N", scale=None))
        for (dx, dy, align), rows in placed.items()
    ]


def _overlaps(box: np.ndarray, others: Sequence[np.ndarray]) -> int:
    if not others:
        return 0
    boxes = np.array(others)
    return int(((boxes[:, :2] < box[2:]) & (boxes[:, 2:] > box[:2])).all(1).sum())
