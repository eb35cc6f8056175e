"""Small charts: where things are drawn, and that nothing is drawn outside."""

from __future__ import annotations

import itertools
import math
import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sda_core.report.model import Chart, Curve, Score
from sda_core.report.plots import held_share, ladder_chart, line_chart, long_tail_chart, share_bar, swatch, tick_label, ticks

numbers = st.floats(-1e6, 1e6, allow_nan=False).map(lambda value: round(value, 6))


@settings(deadline=None, max_examples=50)
@given(numbers, numbers)
def test_ticks_span_the_range_with_few_round_numbers(first: float, second: float) -> None:
    low, high = sorted((first, second))
    found = ticks(low, high)
    slack = 1e-8 * max(high - low, abs(low), abs(high))  # of rounding; far below a pixel
    assert found[0] <= low + slack
    assert found[-1] >= high - slack
    assert 2 <= len(found) <= 8
    steps = [after - before for before, after in itertools.pairwise(found)]
    mantissa = steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-9)
    assert min(abs(mantissa - round_number) for round_number in (1, 2, 5, 10)) < 1e-3
    labels = [tick_label(value, found) for value in found]
    if steps[0] > 1e-6:
        assert len(set(labels)) == len(labels)


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [(0, 1, ["0.0", "0.5", "1.0"]), (0.012, 0.0485, ["0.01", "0.02", "0.03", "0.04", "0.05"]), (0, 1000, ["0", "500", "1,000"])],
)
def test_tick_labels_by_hand(low: float, high: float, labels: list[str]) -> None:
    found = ticks(low, high)
    assert [tick_label(value, found) for value in found] == labels


def coordinates(svg: str) -> list[tuple[float, float]]:
    """All points of an SVG, after a check that it is well-formed."""
    points: list[tuple[float, float]] = []
    for node in ElementTree.fromstring(svg).iter():
        for x, y in (("x", "y"), ("x1", "y1"), ("x2", "y2"), ("cx", "cy")):
            if x in node.attrib and y in node.attrib:
                points.append((float(node.attrib[x]), float(node.attrib[y])))
        for pair in node.attrib.get("points", "").split():
            across, down = pair.split(",")
            points.append((float(across), float(down)))
    return points


def inside(svg: str) -> bool:
    width, height = (float(v) for v in re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg).groups())  # type: ignore[union-attr]
    return all(-1e-9 <= x <= width and -1e-9 <= y <= height for x, y in coordinates(svg))


curves = st.lists(st.lists(st.tuples(st.integers(0, 500).map(float), numbers), min_size=1, max_size=8), min_size=1, max_size=10)


@settings(deadline=None, max_examples=50)
@given(curves, st.booleans())
def test_lines_stay_inside_and_hold_every_point(values: list[list[tuple[float, float]]], lower_is_better: bool) -> None:
    lines = tuple(Curve(f"v{n}", tuple(sorted(points))) for n, points in enumerate(values))
    svg = str(line_chart(Chart("t", "epoch", "y", lower_is_better, lines), {f"v{n}": n for n in range(len(values))}))
    assert inside(svg)
    drawn = [node.attrib["points"].split() for node in ElementTree.fromstring(svg).iter() if node.tag == "polyline"]
    assert [len(line) for line in drawn] == [len(curve.points) for curve in lines]
    assert "nan" not in svg


def test_line_goes_up_when_the_numbers_do_and_marks_the_best() -> None:
    chart = Chart("t", "epoch", "y", False, (Curve("a", ((1.0, 0.1), (2.0, 0.3), (3.0, 0.2))),))
    root = ElementTree.fromstring(str(line_chart(chart, {"a": 0})))
    line = next(node for node in root.iter() if node.tag == "polyline")
    points = [tuple(float(v) for v in pair.split(",")) for pair in line.attrib["points"].split()]
    assert points[0][0] < points[1][0] < points[2][0]
    assert points[0][1] > points[2][1] > points[1][1]  # y grows downwards
    mark = next(node for node in root.iter() if node.tag == "circle")
    assert (float(mark.attrib["cx"]), float(mark.attrib["cy"])) == points[1]
    lowest = ElementTree.fromstring(str(line_chart(Chart("t", "epoch", "y", True, chart.curves), {"a": 0})))
    mark = next(node for node in lowest.iter() if node.tag == "circle")
    assert (float(mark.attrib["cx"]), float(mark.attrib["cy"])) == points[0]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 0.2)), min_size=1, max_size=9), st.booleans())
@example([(0.0, 5e-324)], True)
@example([(1.0, 1e-12)], True)
def test_ladders_stay_inside_and_in_order(values: list[tuple[float, float]], with_intervals: bool) -> None:
    rows = [
        (f"variant_{n}", Score(v, v - w if with_intervals else None, v + w if with_intervals else None))
        for n, (v, w) in enumerate(values)
    ]
    svg = str(ladder_chart("t", rows, {label: n for n, (label, _) in enumerate(rows)}))
    assert inside(svg)
    labels = [node for node in ElementTree.fromstring(svg).iter() if node.attrib.get("class") == "label"]
    assert [node.text for node in labels] == [label for label, _ in rows]
    heights = [float(node.attrib["y"]) for node in labels]
    assert heights == sorted(heights)


def test_labels_are_escaped() -> None:
    svg = str(ladder_chart("<t>", [('<a> & "b"', Score(0.1, None, None))], {'<a> & "b"': 0}))
    assert "<a>" not in svg
    coordinates(svg)  # well-formed


def test_epochs_have_no_halves() -> None:
    def x_labels(*points: tuple[float, float]) -> list[str | None]:
        svg = str(line_chart(Chart("t", "epoch", "y", False, (Curve("a", points),)), {"a": 0}))
        floor = [n for n in ElementTree.fromstring(svg).iter() if n.tag == "text" and n.attrib["y"] == "200"]
        return [node.text for node in floor]

    assert x_labels((1.0, 0.1), (3.0, 0.2)) == ["1", "2", "3"]
    assert x_labels((1.0, 0.1)) == ["1"]
    assert x_labels((0.5, 0.1), (1.5, 0.2)) == ["0.5", "1.0", "1.5"]


def test_held_share_between_points() -> None:
    points = ((0.0, 0.0), (0.1, 0.5), (1.0, 1.0))
    assert [held_share(points, share) for share in (0.0, 0.05, 0.1, 0.55, 1.0)] == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0])
    assert held_share(points, 1.5) == 1.0


def test_long_tail_is_drawn_from_corner_to_corner_above_the_even_line() -> None:
    svg = str(long_tail_chart("<t>", ((0.0, 0.0), (0.2, 0.7), (1.0, 1.0))))
    assert inside(svg)
    assert "20 % of the items hold 70 %" in svg
    even, curve = [
        [tuple(float(v) for v in pair.split(",")) for pair in node.attrib["points"].split()]
        for node in ElementTree.fromstring(svg).iter()
        if node.tag == "polyline"
    ]
    assert (curve[0], curve[-1]) == (even[0], even[-1])
    (left, bottom), (right, top) = even
    assert curve[1] == pytest.approx((left + 0.2 * (right - left), bottom + 0.7 * (top - bottom)), abs=0.01)


def test_bar_and_swatch_are_well_formed() -> None:
    for share, width in ((-1, "0"), (0.5, "50"), (7, "100")):
        assert f'class="fill" width="{width}"' in share_bar(share)
        assert "gone" not in share_bar(share)
    assert 'class="gone" x="50" width="25"' in share_bar(0.5, 0.25)
    assert 'class="gone" x="50" width="0.6"' in share_bar(0.5, 1e-9)  # one row of many is still seen
    assert 'class="gone" x="99.9" width="0.1"' in share_bar(0.999, 0.5)
    for colour in range(20):
        coordinates(str(swatch(colour)))
