"""Charts: every point and every label within the picture, for whatever numbers."""

import math
import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskdm_server.report.page.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    MOST_POINTS,
    RIGHT,
    TOP,
    WIDTH,
    Axis,
    Series,
    line_chart,
    nice_step,
    picture_of,
    thinned,
)
from maskdm_server.report.page.units import compact, duration, figure, moment, percent

NUMBERS = st.floats(-1e9, 1e9, allow_nan=False, width=32)
POINTS = st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=30).map(sorted)


def drawn(chart: str) -> ET.Element:
    return ET.fromstring(f"<chart>{chart}</chart>")


def polylines(chart: ET.Element) -> list[list[tuple[float, float]]]:
    found = []
    for line in chart.findall("./svg/g/polyline"):
        places = [place.split(",") for place in line.attrib["points"].split()]
        found.append([(float(x), float(y)) for x, y in places])
    return found


@given(POINTS, st.booleans(), st.booleans())
def test_every_point_and_label_is_within_the_picture(
    points: list[tuple[float, float]], log: bool, from_zero: bool
) -> None:
    chart = drawn(line_chart("t", [Series("a", points)], x="x", y="y", log=log, from_zero=from_zero, whole=False))
    for line in polylines(chart):
        assert len(line) == len(points)
        assert all(LEFT - 0.1 <= x <= RIGHT + 0.1 and TOP - 0.1 <= y <= BOTTOM + 0.1 for x, y in line)
        assert [x for x, _ in line] == sorted(x for x, _ in line)
    for text in chart.iter("text"):
        assert 0 <= float(text.attrib["x"]) <= WIDTH
        assert 0 <= float(text.attrib["y"]) <= HEIGHT


def test_a_line_runs_from_corner_to_corner_of_its_data() -> None:
    chart = drawn(line_chart("t", [Series("a", [(1, 0.0), (2, 50.0), (3, 100.0)])], x="round", y="y", from_zero=True))
    ((first, middle, last),) = polylines(chart)
    assert (first[0], last[0]) == (LEFT, RIGHT)
    assert middle == pytest.approx(((LEFT + RIGHT) / 2, (first[1] + last[1]) / 2), abs=0.1)
    assert first[1] == BOTTOM
    assert last[1] > TOP  # some room


def test_on_a_logarithmic_axis_equal_ratios_are_equally_far_apart() -> None:
    axis = Axis(0.01, 1.0, 200, 0, log=True)
    assert [axis.place(value) for value in (0.01, 0.1, 1.0)] == pytest.approx([200, 100, 0])
    assert [label for _, label in axis.ticks()] == ["0.01", "0.02", "0.05", "0.1", "0.2", "0.5", "1"]


def test_values_that_are_not_above_zero_have_no_logarithmic_axis() -> None:
    chart = line_chart("t", [Series("a", [(1, 0.0), (2, 10.0)])], x="x", y="y", log=True)
    ((first, last),) = polylines(drawn(chart))
    assert first[1] > last[1]


@given(st.floats(1e-12, 1e12))
def test_a_nice_step_is_round_and_little_longer_than_asked(least: float) -> None:
    step = nice_step(least)
    assert least * (1 - 1e-6) <= step <= 2.5 * least
    mantissa = step / 10.0 ** math.floor(math.log10(step) + 1e-9)
    assert min(abs(mantissa - nice) for nice in (1, 2, 2.5, 5, 10)) < 1e-6


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.booleans())
def test_labels_differ_and_are_where_they_say(low: float, span: float, whole: bool) -> None:
    ticks = Axis(low, low + span, 0, 100, whole=whole).ticks()
    assert all(low - 1e-6 * span <= value <= low + span * (1 + 1e-6) for value, _ in ticks)
    assert len(ticks) <= 7
    if whole:
        assert all(float(value).is_integer() for value, _ in ticks)
    if abs(low) < 100 * span:
        assert len({label for _, label in ticks}) == len(ticks)


def test_what_is_not_finite_is_left_out_and_nothing_is_drawn_of_nothing() -> None:
    chart = line_chart("t", [Series("a", [(1, math.nan), (2, 5.0), (3, math.inf)])], x="x", y="y")
    assert [len(line) for line in polylines(drawn(chart))] == [1]
    assert line_chart("t", [Series("a", []), Series("b", [(1, math.nan)])], x="x", y="y") == ""


def test_many_points_become_means_in_their_order() -> None:
    points = [(float(i), float(i % 2)) for i in range(10 * MOST_POINTS)]
    few = thinned(points)
    assert len(few) == MOST_POINTS
    assert few[0] == (4.5, 0.5)
    assert few == sorted(few)
    assert thinned(points[:MOST_POINTS]) == points[:MOST_POINTS]


def test_several_lines_have_a_legend_marks_of_their_own_and_a_description() -> None:
    lines = [Series("before <b>", [(1, 2.0), (2, 1.0)]), Series("after", [(1, 1.5), (2, 0.5)], colour=3)]
    chart = drawn(line_chart("Loss", lines, x="round", y="loss"))
    assert [span[0].tail for span in chart.findall("./div/span")] == ["before <b>", "after"]
    (main,) = chart.findall("./svg")
    assert main.attrib["role"] == "img"
    assert main.attrib["aria-label"] == (
        "Loss: before <b> from 2.000 at round 1.000 to 1.000 at round 2.000; "
        "after from 1.500 at round 1.000 to 0.5000 at round 2.000"
    )
    first, second = (group.attrib["class"] for group in main.findall("./g"))
    assert (first, second) == ("line d0 s0", "line d1 s3")
    assert len(chart.findall("./svg/g/circle")) == 2
    assert "<b>" not in re.sub(r'"[^"]*"', "", ET.tostring(main, encoding="unicode"))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((0.04, "0.0 s"), (9.94, "9.9 s"), (42, "42 s"), (60, "1 min"), (200, "3 min 20 s")),
        *((7500, "2 h 5 min"), (273600, "3 d 4 h")),
    ],
)
def test_durations_have_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "step", "text"),
    [(0.04, 0.01, "0.04"), (0.5, 0.25, "0.50"), (0.25, 0.25, "0.25"), (1500, 500, "1.5K"), (2e6, 1e6, "2M"),
     (-3.0, 1.0, "−3"), (0.0, 0.02, "0.00"), (2e-5, 1e-5, "2e−5"), (100.0, 50.0, "100")],
)  # fmt: skip
def test_labels_are_short(value: float, step: float, text: str) -> None:
    assert compact(value, step) == text


def test_numbers_as_people_read_them() -> None:
    assert (figure(0.0411), figure(None), figure(123456.0), figure(0.0)) == ("0.04110", "–", "1.235e+05", "0")
    assert percent(-0.15) == "−15.0 %"
    assert (moment(0.0), moment(1e300), moment(math.nan)) == ("1970-01-01 00:00:00", "–", "–")


def test_what_is_counted_has_whole_labels() -> None:
    chart = drawn(line_chart("t", [Series("a", [(1, 0.0), (2, 2.0)])], x="x", y="sites", counts=True, from_zero=True))
    labels = [text.text for text in chart.iter("text") if text.attrib.get("text-anchor") == "end"]
    assert labels == ["0", "1", "2"]


def test_a_chart_as_a_file_of_its_own_is_whole_and_names_its_lines() -> None:
    lines = [Series("masked & shared", [(1.0, 3.0), (2.0, 1.0)]), Series("scratch", [(1.0, 4.0), (2.0, 2.0)])]
    written = picture_of(line_chart("Distance", lines, x="images", y="FD"), [line.name for line in lines])
    root = ET.fromstring(written)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert {"masked & shared", "scratch", "FD"} <= {element.text for element in root.iter()}
    assert "prefers-color-scheme: dark" in written
