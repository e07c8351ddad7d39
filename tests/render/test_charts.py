# SPDX-License-Identifier: GPL-2.0-or-later
"""Charts and tables: what they show, where a line ends, and that text stays text."""

from __future__ import annotations

import math

from ksmd_ctl.render.charts import COLOURS, HEIGHT, WIDTH, Axis, Curve, Mark, chart, document, drawing, table
from tests.render.elements import Elements

AXIS = Axis(0.0, 100.0, ("begin", "middle", "end"), 10.0)
BAD = "<script>alert(1)</script>\"'&"


def shown(*curves: Curve, times: tuple[float, ...], marks: tuple[Mark, ...] = ()) -> Elements:
    found = Elements(chart("x", curves, times, marks, AXIS, str))
    assert found.open == []
    return found


def test_a_line_goes_from_point_to_point() -> None:
    (line,) = shown(Curve("a", (0.0, 2.0, 1.0)), times=(90.0, 95.0, 100.0)).classed("line")
    assert line["d"] == f"M648.0 120.0h0L684.0 0.0L{WIDTH:.1f} {HEIGHT / 2:.1f}"


def test_a_line_is_interrupted_where_nothing_is_known_or_for_long_there_was_no_point() -> None:
    (line,) = shown(Curve("a", (1.0, math.nan, 3.0, 4.0, 5.0)), times=(0.0, 5.0, 9.0, 12.0, 30.0)).classed("line")
    assert [one for one in str(line["d"]) if one in "ML"] == ["M", "M", "L", "M"]


def test_what_is_before_the_axis_begins_is_left_out() -> None:
    drawn = drawing([Curve("a", (1.0, 2.0))], (-5.0, 5.0), [Mark(-1.0, "early"), Mark(50.0, "now")], AXIS)
    assert drawn.svg.count("M36.0 ") == 1
    assert "early" not in drawn.svg
    assert (drawn.low, drawn.high) == (0.0, 2.0)


def test_a_chart_without_values_says_so() -> None:
    found = shown(Curve("a", (math.nan,)), times=(0.0,))
    assert "not known on this host" in found.text
    assert found.classed("line") == []


def test_zero_all_the_time_has_a_line() -> None:
    assert len(shown(Curve("a", (0.0, 0.0)), times=(0.0, 1.0)).classed("line")) == 1


def test_zero_all_the_time_has_no_other_value_in_its_scale() -> None:
    show = "{:g} bytes".format
    zero = Elements(chart("x", [Curve("a", (0.0, 0.0))], (0.0, 1.0), (), AXIS, show))
    assert "0 bytes" in zero.text
    assert "1 bytes" not in zero.text
    below = Elements(chart("x", [Curve("a", (-5.0, -5.0))], (0.0, 1.0), (), AXIS, show))
    assert "0 bytes" in below.text
    assert "-5 bytes" in below.text


def test_lines_are_told_apart() -> None:
    curves = [Curve(str(index), (1.0,), dashed=index == 1) for index in range(COLOURS + 1)]
    looks = [line["class"] for line in shown(*curves, times=(0.0,)).classed("line")]
    assert len(set(looks)) == COLOURS + 1
    assert [look for look in looks if "dashed" in str(look)] == ["line c1 dashed", "line c0 dashed"]


def test_text_is_only_text() -> None:
    found = Elements(
        chart(BAD, [Curve(BAD, (1.0,)), Curve("b", (2.0,))], (0.0,), [Mark(1.0, BAD)], AXIS, str)
        + table(BAD, (BAD,), [(BAD,)])
        + document(BAD, "")
    )
    assert found.open == []
    assert not {"script"} & {tag for tag, _ in found.tags}
    assert found.text.count(BAD) >= 6


def test_a_table_without_rows_is_none() -> None:
    assert table("x", ("a",), []) == ""


def test_the_columns_of_numbers_and_the_rows_that_warn() -> None:
    found = Elements(table("x", ("a", "b"), [("1", "2"), ("3", "4")], 1, bad=[1]))
    assert [tag for tag, attributes in found.tags if attributes.get("class") == "right"] == ["th", "td", "td"]
    assert [tag for tag, attributes in found.tags if attributes.get("class") == "bad"] == ["tr"]
