"""Line plots as SVG text, written by hand: no drawing library, the same bytes for the same data.

``line_plot({"int8": [(1.9, 1e-4)], "transform": [(8, 7e-4), (16, 5e-3)]}, title=…, x_label=…, y_label=…, log_x=True, log_y=True)``
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from kvstore.errors import InvalidInputError

Point = tuple[float, float]

#: Colours that stay apart for colour-blind readers (Okabe and Ito, 2008); then markers tell the rest apart.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c6d31")
_WIDTH, _HEIGHT = 760, 440
_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 170, 44, 56


@dataclass(frozen=True)
class _Axis:
    """Maps data to pixels. `low` and `high` are data values, `start` and `stop` the pixels they fall on."""

    low: float
    high: float
    start: float
    stop: float
    log: bool

    def at(self, value: float) -> float:
        low, high, value = (math.log10(x) if self.log else x for x in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.stop - self.start)

    def ticks(self) -> list[float]:
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            steps = (1,) if last - first > 4 else (1, 2, 5)
            candidates = [m * 10.0**e for e in range(first, last + 1) for m in steps]
        else:
            rough = (self.high - self.low) / 5
            unit = 10.0 ** math.floor(math.log10(rough))
            step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= rough * 0.999)
            candidates = [step * i for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        return [t for t in candidates if self.low * (1 - 1e-9) <= t <= self.high * (1 + 1e-9) or (t == 0 and self.low <= 0 <= self.high)]


def line_plot(
    series: Mapping[str, Sequence[Point]], *, title: str, x_label: str, y_label: str, log_x: bool = False, log_y: bool = False
) -> str:
    """An SVG document with one line a series, its points marked, and a legend.

    Parameters
    ----------
    series : mapping of name to points (x, y)
        Points are joined in the order given. A series of one point is a lone marker. Points that cannot stand on a logarithmic
        axis (zero or less), NaN and infinities are left out.
    title, x_label, y_label : str
    log_x, log_y : bool
        Logarithmic axes.

    Raises
    ------
    InvalidInputError
        When there is no point to draw.
    """
    drawable = {name: [p for p in points if _fits(p[0], log_x) and _fits(p[1], log_y)] for name, points in series.items()}
    points = [p for line in drawable.values() for p in line]
    if not points:
        raise InvalidInputError(f"the plot {title!r} has no point to draw")
    x_axis = _axis([p[0] for p in points], _LEFT, _WIDTH - _RIGHT, log_x)
    y_axis = _axis([p[1] for p in points], _HEIGHT - _BOTTOM, _TOP, log_y)
    body = [*_frame(x_axis, y_axis, title, x_label, y_label)]
    for number, (name, line) in enumerate(drawable.items()):
        body += _series(number, name, [(x_axis.at(x), y_axis.at(y)) for x, y in line])
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="12" role="img">'
    )
    return "\n".join([head, f"<title>{escape(title)}</title>", *body, "</svg>"]) + "\n"


def _fits(value: float, log: bool) -> bool:
    return math.isfinite(value) and (value > 0 or not log)


def _axis(values: list[float], start: float, stop: float, log: bool) -> _Axis:
    low, high = min(values), max(values)
    if log:
        margin = max((high / low) ** 0.05, 1.1)
        return _Axis(low / margin, high * margin, start, stop, log)
    margin = 0.05 * (high - low) or max(abs(high), 1.0) * 0.5
    floor = 0.0 if 0 <= low < high / 2 else low - margin
    return _Axis(floor, high + margin, start, stop, log)


def _text(x: float, y: float, text: str, extra: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {extra}>{escape(text)}</text>'


def _frame(x_axis: _Axis, y_axis: _Axis, title: str, x_label: str, y_label: str) -> list[str]:
    """Background, grid with its numbers, and the three captions."""
    left, right, top, bottom = _LEFT, _WIDTH - _RIGHT, _TOP, _HEIGHT - _BOTTOM
    out = [f'<rect width="{_WIDTH}" height="{_HEIGHT}" rx="6" fill="#ffffff"/>', '<g stroke="#dddddd" stroke-width="1">']
    out += [f'<line x1="{x_axis.at(t):.1f}" y1="{top}" x2="{x_axis.at(t):.1f}" y2="{bottom}"/>' for t in x_axis.ticks()]
    out += [f'<line x1="{left}" y1="{y_axis.at(t):.1f}" x2="{right}" y2="{y_axis.at(t):.1f}"/>' for t in y_axis.ticks()]
    out += ["</g>", f'<rect x="{left}" y="{top}" width="{right - left}" height="{bottom - top}" fill="none" stroke="#555555"/>']
    out += [_text(x_axis.at(t), bottom + 18, f"{t:.6g}", 'text-anchor="middle" fill="#333333"') for t in x_axis.ticks()]
    out += [_text(left - 8, y_axis.at(t) + 4, f"{t:.6g}", 'text-anchor="end" fill="#333333"') for t in y_axis.ticks()]
    middle = (top + bottom) / 2
    out += [
        _text((left + right) / 2, 26, title, 'text-anchor="middle" font-size="15" font-weight="bold"'),
        _text((left + right) / 2, _HEIGHT - 16, x_label, 'text-anchor="middle"'),
        _text(18, middle, y_label, f'text-anchor="middle" transform="rotate(-90 18 {middle:.1f})"'),
    ]
    return out


def _series(number: int, name: str, pixels: list[Point]) -> list[str]:
    """One line, its markers and its row of the legend."""
    colour = _COLOURS[number % len(_COLOURS)]
    dash = ' stroke-dasharray="6 4"' if number >= len(_COLOURS) else ""
    legend_x, legend_y = _WIDTH - _RIGHT + 16, _TOP + 10 + 20 * number
    out = []
    if len(pixels) > 1:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in pixels)
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
    out += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}" stroke="#ffffff"/>' for x, y in pixels]
    out.append(f'<line x1="{legend_x}" y1="{legend_y}" x2="{legend_x + 22}" y2="{legend_y}" stroke="{colour}" stroke-width="2"{dash}/>')
    out.append(f'<circle cx="{legend_x + 11}" cy="{legend_y}" r="4" fill="{colour}" stroke="#ffffff"/>')
    out.append(_text(legend_x + 28, legend_y + 4, name))
    return out
