"""The hand-written SVG plot: well formed, in its frame, refusing nothing to draw."""

import xml.etree.ElementTree as ET

import pytest

from kvstore.errors import InvalidInputError
from services.plot import line_plot

SVG = "{http://www.w3.org/2000/svg}"
LABELS = {"title": "rate < & divergence", "x_label": "ratio", "y_label": "KL"}


def circles(svg: str) -> list[tuple[float, float]]:
    return [(float(c.get("cx")), float(c.get("cy"))) for c in ET.fromstring(svg).iter(f"{SVG}circle")]


@pytest.mark.parametrize("log", [False, True])
def test_points_keep_their_order_on_both_axes(log):
    svg = line_plot({"a": [(2, 1e-4), (8, 1e-3), (32, 1e-1)]}, log_x=log, log_y=log, **LABELS)
    (x0, y0), (x1, y1), (x2, y2), _legend = circles(svg)
    assert x0 < x1 < x2 and y0 > y1 > y2
    assert all(0 < x < 760 and 0 < y < 440 for x, y in circles(svg))


def test_equal_steps_of_a_logarithmic_axis_are_equal():
    svg = line_plot({"a": [(1, 1), (10, 1), (100, 1)]}, log_x=True, **LABELS)
    (x0, _), (x1, _), (x2, _), _legend = circles(svg)
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)


def test_zero_is_left_out_of_a_logarithmic_axis_and_text_is_escaped():
    svg = line_plot({"<a>": [(1, 0.0), (2, 0.5)], "b": [(3, 1.0)]}, log_y=True, **LABELS)
    assert len(circles(svg)) == 2 + 2
    assert {"<a>", "b", "rate < & divergence"} <= {t.text for t in ET.fromstring(svg).iter(f"{SVG}text")}


def test_many_series_and_one_value_only():
    line_plot({f"s{i}": [(i, 5.0)] for i in range(20)}, **LABELS)
    line_plot({"a": [(0.0, 0.0)]}, **LABELS)


def test_nothing_to_draw_is_refused():
    with pytest.raises(InvalidInputError, match="no point"):
        line_plot({"a": [(0.0, 1.0)]}, log_x=True, **LABELS)
