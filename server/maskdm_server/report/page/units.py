"""Numbers as people read them."""

import math
from datetime import UTC, datetime


def figure(value: float | None) -> str:
    """Four significant digits; a dash where nothing was measured."""
    return "–" if value is None else f"{value:#.4g}" if 1e-4 <= abs(value) < 1000 else f"{value:.4g}"


def count(value: float | None) -> str:
    """A whole number with separators."""
    return "–" if value is None else f"{value:,.0f}"


def percent(value: float) -> str:
    """A change or a share in per cent, with a true minus sign."""
    return f"{100 * value:.1f} %".replace("-", "−")


def duration(seconds: float) -> str:
    """The two largest units that matter: 0.8 s, 42 s, 3 min 20 s, 2 h 5 min, 3 d 4 h."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    left = round(seconds)
    for large, small, (big, little) in ((86_400, 3600, ("d", "h")), (3600, 60, ("h", "min")), (60, 1, ("min", "s"))):
        if left >= large:
            rest = left % large // small
            return f"{left // large:,} {big}{f' {rest} {little}' if rest else ''}"
    return f"{left} s"


def moment(seconds: float) -> str:
    """Seconds since 1970 as a time in UTC; a dash where no calendar has it."""
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}"
    except (OverflowError, ValueError, OSError):
        return "–"


def compact(value: float, step: float = 0.0) -> str:
    """A label of an axis: 0.04, 1.5K, 2M, 1e-6; `step` is the distance of labels, which decides the digits."""
    size = abs(value)
    if size >= 1000:
        power = min(4, int(math.log10(size) / 3))
        return f"{value / 1000**power:.4g}{('', 'K', 'M', 'G', 'T')[power]}".replace("-", "−")
    if size and size < 1e-3:
        return f"{value:.2g}".replace("e-0", "e-").replace("-", "−")
    digits = max(0, -math.floor(math.log10(step))) if step > 0 else 0
    if step > 0 and round(step, digits) != round(step, digits + 2):  # steps of 0.25
        digits += 1
    return (f"{value:.{digits}f}" if step > 0 else f"{value:.4g}").replace("-", "−")
