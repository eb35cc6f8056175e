"""Small charts as inline SVG without scripts, fonts or time stamps, so equal data gives equal bytes.

* Colours are classes (``s0`` .. ``s7``) that the page's style sheet sets for light, dark and print; a line also has its own
  dash pattern and marker, so that colour is never the only difference.
* A chart is 360 units wide, and the page arranges charts side by side, so that text is readable on a phone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from sda_core.report.model import Chart, Score

NUM_COLOURS = 8

_WIDTH = 360
_TINY = 1e-300  # below it, values (nearly) underflow and have no usable logarithm
_NARROW = 1e-9  # a span below this share of its values counts as one value: labels have at most twelve digits
_DASHES = ("", "6 3", "2 3", "8 3 2 3", "12 4", "4 2", "1 3", "10 3 3 3")


def _n(value: float) -> str:
    """A coordinate: two decimals at most, no trailing zeros, no minus zero."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text in ("-0", "") else text


def ticks(low: float, high: float, number: int = 4) -> list[float]:
    """About ``number`` round values, spaced by 1, 2 or 5 times a power of ten, from ``low`` to ``high``."""
    if not high - low > max(_TINY, _NARROW * max(abs(low), abs(high))):
        margin = abs(low) * 0.1 if abs(low) > _TINY else 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / number
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def tick_label(value: float, values: Sequence[float]) -> str:
    """The text of a tick; all ticks of an axis have the same number of decimals."""
    step = min((b - a for a, b in itertools.pairwise(values)), default=1.0)
    decimals = max(0, min(6, -math.floor(math.log10(step) + 1e-9)))
    return f"{value:,.{decimals}f}"


def _marker(shape: int, x: float, y: float, classes: str) -> str:
    match shape % 4:
        case 0:
            return f'<circle class="{classes}" cx="{_n(x)}" cy="{_n(y)}" r="4.2"/>'
        case 1:
            return f'<rect class="{classes}" x="{_n(x - 3.8)}" y="{_n(y - 3.8)}" width="7.6" height="7.6"/>'
        case 2:
            points = f"{_n(x)},{_n(y - 5.2)} {_n(x + 5)},{_n(y + 3.6)} {_n(x - 5)},{_n(y + 3.6)}"
            return f'<polygon class="{classes}" points="{points}"/>'
        case _:
            points = f"{_n(x)},{_n(y - 5.4)} {_n(x + 5.4)},{_n(y)} {_n(x)},{_n(y + 5.4)} {_n(x - 5.4)},{_n(y)}"
            return f'<polygon class="{classes}" points="{points}"/>'


def _svg(height: float, name: str, parts: Sequence[str]) -> Markup:
    head = f'<svg class="chart" viewBox="0 0 {_WIDTH} {_n(height)}" role="img" aria-label="{escape(name)}">'
    return Markup(head + "".join(parts) + "</svg>")  # noqa: S704 (every text in parts was escaped where it was put in)


def swatch(colour: int) -> Markup:
    """The line and marker of a series, for a legend."""
    shown, dash = colour % NUM_COLOURS, _DASHES[colour % NUM_COLOURS]
    return Markup(  # noqa: S704 (numbers only)
        f'<svg class="swatch" viewBox="0 0 28 12" aria-hidden="true">'
        f'<line class="line s{shown}" x1="1" y1="6" x2="27" y2="6" stroke-dasharray="{dash}"/>'
        f"{_marker(colour, 14, 6, f'mark s{shown}')}</svg>"
    )


@dataclass(frozen=True)
class _Axes:
    """The axes of a line chart: coordinates, grid, ticks and name of the x axis."""

    x_low: float
    x_high: float
    x_ticks: Sequence[float]
    y_ticks: Sequence[float]
    x_label: str
    unit: str = ""  # after each tick

    left, right, top, bottom, height = 48.0, 18.0, 10.0, 36.0, 220.0

    def place(self, x: float, y: float) -> tuple[float, float]:
        """The coordinates of a point."""
        across = (x - self.x_low) / ((self.x_high - self.x_low) or 1.0)
        up = (y - self.y_ticks[0]) / (self.y_ticks[-1] - self.y_ticks[0])
        return (
            self.left + across * (_WIDTH - self.left - self.right),
            self.height - self.bottom - up * (self.height - self.top - self.bottom),
        )

    def draw(self) -> list[str]:
        """The elements in the background of the lines."""
        left, end, floor = self.left, _WIDTH - self.right, self.height - self.bottom
        parts: list[str] = []
        for tick in self.y_ticks:
            y, text = self.place(self.x_low, tick)[1], tick_label(tick, self.y_ticks) + self.unit
            parts.append(f'<line class="grid" x1="{_n(left)}" y1="{_n(y)}" x2="{_n(end)}" y2="{_n(y)}"/>')
            parts.append(f'<text x="{_n(left - 6)}" y="{_n(y + 4)}" text-anchor="end">{text}</text>')
        for tick in self.x_ticks:
            x, text = self.place(tick, self.y_ticks[0])[0], tick_label(tick, self.x_ticks) + self.unit
            parts.append(f'<text x="{_n(x)}" y="{_n(floor + 16)}" text-anchor="middle">{text}</text>')
        middle = (left + end) / 2
        parts.append(f'<text x="{_n(middle)}" y="{_n(self.height - 4)}" text-anchor="middle">{escape(self.x_label)}</text>')
        return parts


def _path(axes: _Axes, points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{_n(x)},{_n(y)}" for x, y in (axes.place(*point) for point in points))


def line_chart(chart: Chart, colours: Mapping[str, int]) -> Markup:
    """Lines over a common x axis, with a mark at each curve's best point.

    Args:
        chart: at least one curve with at least one point.
        colours: number of each curve's colour, by label.
    """
    xs = [x for curve in chart.curves for x, _ in curve.points]
    ys = [y for curve in chart.curves for _, y in curve.points]
    whole = all(x == int(x) for x in xs)  # epochs and steps are whole numbers
    x_ticks = [tick for tick in ticks(min(xs), max(xs)) if min(xs) <= tick <= max(xs) and (tick == int(tick) or not whole)]
    axes = _Axes(min(xs), max(xs), x_ticks, ticks(min(ys), max(ys)), chart.x_label)
    parts = axes.draw()
    for curve in chart.curves:
        colour = colours[curve.label]
        shown, dash = colour % NUM_COLOURS, _DASHES[colour % NUM_COLOURS]
        points = _path(axes, curve.points)
        parts.append(f'<polyline class="line s{shown}" points="{points}" stroke-dasharray="{dash}"/>')
        choose = min if chart.lower_is_better else max
        best = choose(curve.points, key=lambda point: point[1])
        parts.append(_marker(colour, *axes.place(*best), f"mark s{shown}"))
    return _svg(axes.height, f"{chart.title}: {chart.y_label} by {chart.x_label}", parts)


def held_share(points: Sequence[tuple[float, float]], share: float) -> float:
    """The y of a curve at ``share``, by linear interpolation.

    Args:
        points: points in order of x, from 0 to 1.
        share: the x value, 0..1.
    """
    for (x, y), (next_x, next_y) in itertools.pairwise(points):
        if share <= next_x:
            return y + (next_y - y) * (share - x) / (next_x - x)
    return points[-1][1]


def long_tail_chart(title: str, points: Sequence[tuple[float, float]]) -> Markup:
    """Share of the interactions by share of the items, most popular first, with the diagonal of equal popularity.

    Args:
        title: description for screen readers.
        points: points from (0, 0) to (1, 1), in order of x.
    """
    whole = (0.0, 20.0, 40.0, 60.0, 80.0, 100.0)
    axes = _Axes(0.0, 100.0, whole, whole, "of the items, most popular first", "\u00a0%")
    parts = axes.draw()
    parts.append(f'<polyline class="line even" points="{_path(axes, ((0.0, 0.0), (100.0, 100.0)))}"/>')
    x, y = axes.place(98.0, 14.0)  # below the diagonal, and inside the chart
    parts.append(f'<text x="{_n(x)}" y="{_n(y)}" text-anchor="end">dashed: if all items were equally popular</text>')
    parts.append(f'<polyline class="line s1" points="{_path(axes, [(100 * x, 100 * y) for x, y in points])}"/>')
    spoken: list[str] = []
    for share in (0.01, 0.1, 0.2, 0.5):
        held = held_share(points, share)
        parts.append(_marker(0, *axes.place(100 * share, 100 * held), "mark s1"))
        spoken.append(f"{100 * share:g} % of the items hold {100 * held:.0f} %")
    return _svg(axes.height, f"{title}: {', '.join(spoken)}", parts)


def ladder_chart(title: str, rows: Sequence[tuple[str, Score]], colours: Mapping[str, int]) -> Markup:
    """A point with its 95 % interval for each variant, one below the other, on a common axis.

    Args:
        title: description for screen readers.
        rows: label and score, from top to bottom; at least one.
        colours: number of each row's colour, by label.
    """
    longest = max(len(label) for label, _ in rows)
    left, right, top, step, bottom = min(140.0, 16.0 + 6.6 * longest), 24.0, 8.0, 30.0, 26.0
    height = top + step * len(rows) + bottom
    ends = [end for _, score in rows for end in (score.value, score.low, score.high) if end is not None]
    axis = ticks(min(ends), max(ends))
    low, span = axis[0], axis[-1] - axis[0]

    def place(value: float) -> float:
        return left + (value - low) / span * (_WIDTH - left - right)

    parts: list[str] = []
    for tick in axis:
        x = place(tick)
        parts.append(f'<line class="grid" x1="{_n(x)}" y1="{_n(top)}" x2="{_n(x)}" y2="{_n(height - bottom)}"/>')
        parts.append(f'<text x="{_n(x)}" y="{_n(height - 8)}" text-anchor="middle">{tick_label(tick, axis)}</text>')
    for number, (label, score) in enumerate(rows):
        y, colour = top + step * (number + 0.5), colours[label]
        shown = colour % NUM_COLOURS
        parts.append(f'<text class="label" x="{_n(left - 10)}" y="{_n(y + 4)}" text-anchor="end">{escape(label)}</text>')
        if score.low is not None and score.high is not None:
            begin, end = place(score.low), place(score.high)
            parts.append(f'<line class="line s{shown}" x1="{_n(begin)}" y1="{_n(y)}" x2="{_n(end)}" y2="{_n(y)}"/>')
            for x in (begin, end):
                parts.append(f'<line class="line s{shown}" x1="{_n(x)}" y1="{_n(y - 4)}" x2="{_n(x)}" y2="{_n(y + 4)}"/>')
        parts.append(_marker(colour, place(score.value), y, f"mark s{shown}"))
    spoken = ", ".join(f"{label} {score.value:.4f}" for label, score in rows)
    return _svg(height, f"{title}: {spoken}", parts)


def vector_map(title: str, points: Sequence[tuple[float, float]], pairs: Sequence[tuple[int, int]], num_images: int) -> Markup:
    """Items as points, with highlighted pairs, connected by a line and numbered.

    Args:
        title: description for screen readers.
        points: coordinates, 0..1.
        pairs: indices in ``points``.
        num_images: number of pairs with similar images, which come first; the others have similar texts.
    """
    margin, height = 14.0, 300.0

    def place(point: tuple[float, float]) -> tuple[float, float]:
        return margin + point[0] * (_WIDTH - 2 * margin), margin + point[1] * (height - 2 * margin)

    special = {place for pair in pairs for place in pair}
    parts = [
        f'<circle class="dust" cx="{_n(x)}" cy="{_n(y)}" r="1.8"/>'
        for number, (x, y) in enumerate(map(place, points))
        if number not in special
    ]
    for number, pair in enumerate(pairs):
        colour = 1 if number < num_images else 2
        (x1, y1), (x2, y2) = (place(points[end]) for end in pair)
        dash = _DASHES[colour if number >= num_images else 0]
        parts.append(
            f'<line class="line s{colour}" x1="{_n(x1)}" y1="{_n(y1)}" x2="{_n(x2)}" y2="{_n(y2)}" stroke-dasharray="{dash}"/>'
        )
        for x, y in ((x1, y1), (x2, y2)):
            parts.append(_marker(colour - 1, x, y, f"mark s{colour}"))
            anchor, shift = ("end", -7.0) if x > _WIDTH - 30 else ("start", 7.0)
            parts.append(f'<text class="label" x="{_n(x + shift)}" y="{_n(y + 4)}" text-anchor="{anchor}">{number + 1}</text>')
    return _svg(height, title, parts)


def heat_map(title: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[float]]], column_label: str) -> Markup:
    """A heat map of numbers 0..1, written into the cells if there is room.

    Args:
        title: description for screen readers.
        columns: names of the columns.
        rows: label, and one number per column.
        column_label: label of the columns.
    """
    left, top, step, bottom = 76.0, 4.0, 24.0, 34.0
    width, height = (_WIDTH - left - 6.0) / max(1, len(columns)), top + step * len(rows) + bottom
    every = max(1, math.ceil(len(columns) / 14))
    parts: list[str] = []
    for number, (label, values) in enumerate(rows):
        y = top + step * number
        parts.append(f'<text class="label" x="{_n(left - 6)}" y="{_n(y + 16)}" text-anchor="end">{escape(label)}</text>')
        for column, value in enumerate(values):
            x = left + width * column
            box = f'x="{_n(x)}" y="{_n(y)}" width="{_n(max(width - 1.5, 0.5))}" height="{_n(step - 1.5)}"'
            parts.append(f'<rect class="trough" {box}/><rect class="heat" {box} fill-opacity="{min(1.0, max(0.0, value)):.3f}"/>')
            if width >= 30:  # a plate in the background keeps the number readable on every shade
                middle = x + (width - 1.5) / 2
                parts.append(f'<rect class="plate" x="{_n(middle - 15)}" y="{_n(y + 4)}" width="30" height="14.5" rx="2"/>')
                parts.append(f'<text class="label" x="{_n(middle)}" y="{_n(y + 15.5)}" text-anchor="middle">{value:.2f}</text>')
    for column in range(0, len(columns), every):
        x = left + width * (column + 0.5)
        parts.append(f'<text x="{_n(x)}" y="{_n(height - 20)}" text-anchor="middle">{escape(columns[column])}</text>')
    parts.append(
        f'<text x="{_n(left + (_WIDTH - left) / 2)}" y="{_n(height - 5)}" text-anchor="middle">{escape(column_label)}</text>'
    )
    return _svg(height, title, parts)


def share_bar(share: float, lost: float = 0.0) -> Markup:
    """A bar filled to ``share`` (0..1), followed by a part ``lost`` (0..1) marked as dropped."""
    filled = 100 * min(1.0, max(0.0, share))
    gone = min(100 - filled, 100 * max(0.0, lost))
    parts = [f'<rect class="trough" width="100" height="6"/><rect class="fill" width="{_n(filled)}" height="6"/>']
    if gone > 0.0:
        gone = min(max(gone, 0.6), 100 - filled)  # keep a few rows of a million visible as a line
        parts.append(f'<rect class="gone" x="{_n(filled)}" width="{_n(gone)}" height="6"/>')
    return Markup(  # noqa: S704 (numbers only)
        f'<svg class="bar" viewBox="0 0 100 6" preserveAspectRatio="none" aria-hidden="true">{"".join(parts)}</svg>'
    )
