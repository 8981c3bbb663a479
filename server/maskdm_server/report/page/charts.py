"""Line charts as SVG: axes with units, lines that differ without colour too, text that CSS can enlarge."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from .markup import Markup, stylesheet, tag, together
from .units import compact, figure

WIDTH, HEIGHT = 520, 288
LEFT, RIGHT, TOP, BOTTOM = 64, 504, 34, 232  # of the plot; there is room for text that is half as large again
MOST_POINTS = 400  # of a line; each then stands for the mean of several
MOST_MARKS = 40  # points of a line that get a mark of their own
MARKS = ("circle", "square", "diamond", "cross")

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """A line: its name, and (x, y) with rising x; values that are not finite are left out."""

    name: str
    points: Sequence[Point]
    colour: int | None = None  # of the four; None: by its place among the lines


@dataclass(frozen=True)
class Axis:
    """From data to places on the page, with its labels."""

    low: float
    high: float
    start: float  # place of `low`
    end: float  # place of `high`
    log: bool = False
    whole: bool = False  # only whole numbers are labelled

    def place(self, value: float) -> float:
        """Where a value is, within the plot."""
        low, high, at = (self._scaled(number) for number in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (at - low) / (high - low)

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def ticks(self) -> list[tuple[float, str]]:
        """Round values between the ends, with their labels."""
        if self.log:
            return [(value, compact(value)) for value in _log_ticks(self.low, self.high)]
        step = nice_step((self.high - self.low) / 5)
        step = max(1.0, float(math.ceil(step))) if self.whole else step
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [(number * step, compact(number * step, step)) for number in range(first, last + 1)]


def nice_step(least: float) -> float:
    """The smallest of 1, 2, 2.5, 5, 10 times a power of ten that is no less."""
    power = 10.0 ** math.floor(math.log10(least))
    return next((factor * power for factor in (1.0, 2.0, 2.5, 5.0) if factor * power >= least * (1 - 1e-9)), 10 * power)


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(decades) <= 3 else (1,)
    every = max(1, len(decades) // 6)
    found = [factor * 10.0**power for power in decades[::every] for factor in factors]
    return [value for value in found if low <= value <= high]


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most `most` points, each the mean of as many neighbours as it takes."""
    each = -(-len(points) // most) or 1
    groups = [points[start : start + each] for start in range(0, len(points), each)]
    return [(fmean(x for x, _ in group), fmean(y for _, y in group)) for group in groups]


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x: str,
    y: str,
    log: bool = False,
    log_x: bool = False,
    whole: bool = True,
    counts: bool = False,
    from_zero: bool = False,
    stages: Sequence[float] = (),
) -> Markup:
    """An SVG of up to four lines, or nothing where there is no point to draw.

    Args:
        x, y: what the axes show, with units.
        log, log_x: the y or the x axis is logarithmic where all its values are above 0.
        whole: x counts something.
        counts: y counts something.
        from_zero: the y axis begins at 0.
        stages: places on x where something else began.
    """
    lines = [replace(one, points=thinned([p for p in one.points if all(map(math.isfinite, p))])) for one in series]
    lines = [line for line in lines if line.points]
    if not lines:
        return Markup("")
    xs = [px for line in lines for px, _ in line.points]
    across = _axis(xs, LEFT, RIGHT, log=log_x and min(xs) > 0, whole=whole)
    ys = [py for line in lines for _, py in line.points]
    log, zero = log and min(ys) > 0, [0.0] if from_zero else []
    up = _axis([*ys, *zero], BOTTOM, TOP, log=log, whole=counts, below=not from_zero, above=True)
    drawn = [_frame(across, up, x, y)]
    for begin in stages:
        if across.low < begin < across.high:
            at = round(across.place(begin), 1)
            drawn.append(tag("line", class_="stage", x1=at, x2=at, y1=TOP, y2=BOTTOM))
    drawn += [_line(number, line, across, up) for number, line in enumerate(lines)]
    described = "; ".join(_summary(line, x) for line in lines)
    return together(
        _legend(lines),
        tag("svg", *drawn, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=f"{title}: {described}"),
    )


def picture_of(chart: Markup, names: Sequence[str]) -> str:
    """A chart of these lines as an SVG file of its own, light or dark as who looks at it likes: for pages elsewhere."""
    drawn = chart[chart.rindex("<svg viewBox=") :]
    keys = []
    for number, name in enumerate(names):
        y = TOP + 8 + 18 * number
        piece = tag("g", tag("polyline", points=f"{RIGHT - 150},{y} {RIGHT - 120},{y}"), _mark(number, RIGHT - 135, y))
        keys.append(tag("g", piece, tag("text", name, x=RIGHT - 112, y=y + 4.5), class_=f"line s{number}"))
    head, _, rest = drawn.partition(">")
    size = f'xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="system-ui, sans-serif"'
    style = tag("style", stylesheet(), Markup("svg { background: var(--paper) } .line text { stroke: none }"))
    return f"{head} {size}>{style}{rest.removesuffix('</svg>')}{together(*keys)}</svg>\n"


def _axis(
    values: Sequence[float],
    start: float,
    end: float,
    *,
    log: bool = False,
    whole: bool = False,
    below: bool = False,
    above: bool = False,
) -> Axis:
    """Of all values, with some room below and above where that is wanted, or where they are all the same."""
    low, high = min(values), max(values)
    if log:
        return Axis(low / 1.1, high * 1.1, start, end, log=True)
    room = 0.06 * (high - low)
    if room <= 1e-9 * max(abs(low), abs(high)):
        room, above = 1.0 if whole else abs(high) / 2 or 1.0, True
    return Axis(low - (room if below else 0), high + (room if above else 0), start, end, whole=whole)


def _frame(across: Axis, up: Axis, x: str, y: str) -> Markup:
    parts = [tag("text", y, x=4, y=15, class_="unit")]
    for value, label in up.ticks():
        at = round(up.place(value), 1)
        parts.append(tag("line", class_="grid", x1=LEFT, x2=RIGHT, y1=at, y2=at))
        parts.append(tag("text", label, x=LEFT - 8, y=round(at + 4.5, 1), text_anchor="end"))
    parts.append(tag("line", class_="axis", x1=LEFT, x2=RIGHT, y1=BOTTOM, y2=BOTTOM))
    for value, label in across.ticks():
        at = round(across.place(value), 1)
        parts.append(tag("line", class_="axis", x1=at, x2=at, y1=BOTTOM, y2=BOTTOM + 5))
        parts.append(tag("text", label, x=at, y=BOTTOM + 22, text_anchor="middle"))
    parts.append(tag("text", x, x=(LEFT + RIGHT) // 2, y=HEIGHT - 8, text_anchor="middle", class_="unit"))
    return together(*parts)


def _line(number: int, line: Series, across: Axis, up: Axis) -> Markup:
    places = [(round(across.place(px), 1), round(up.place(py), 1)) for px, py in line.points]
    parts = [tag("polyline", points=" ".join(f"{px},{py}" for px, py in places))]
    if len(places) <= MOST_MARKS:
        parts += [_mark(number, *place) for place in places]
    return tag("g", *parts, class_=_looks(number, line))


def _looks(number: int, line: Series) -> str:
    return f"line d{number} s{number if line.colour is None else line.colour}"


def _mark(number: int, px: float, py: float) -> Markup:
    kind = MARKS[number]
    if kind == "circle":
        return tag("circle", cx=px, cy=py, r=3.2)
    shape = {"square": "m-3,-3h6v6h-6z", "diamond": "m0,-4.4l4.4,4.4l-4.4,4.4l-4.4,-4.4z", "cross": "m-4,0h8m-4,-4v8"}
    return tag("path", d=f"M{px},{py}{shape[kind]}")


def _legend(lines: Sequence[Series]) -> Markup:
    """Beside a chart of several lines: a short piece of each line, and its name."""
    if len(lines) < 2:
        return Markup("")
    keys = []
    for number, line in enumerate(lines):
        piece = tag("g", tag("polyline", points="1,8 31,8"), _mark(number, 16, 8), class_=_looks(number, line))
        drawn = tag("svg", piece, viewBox="0 0 32 16", class_="key", aria_hidden="true")
        keys.append(tag("span", drawn, line.name))
    return tag("div", *keys, class_="legend")


def _summary(line: Series, x: str) -> str:
    (first, begin), (last, end) = line.points[0], line.points[-1]
    if len(line.points) == 1:
        return f"{line.name} {figure(begin)} at {x} {figure(first)}"
    return f"{line.name} from {figure(begin)} at {x} {figure(first)} to {figure(end)} at {x} {figure(last)}"
