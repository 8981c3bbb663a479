"""What strangers can make the SuperLink's log say is bounded, and what is left out is counted."""

import logging
import time
from collections import Counter

BURST, RATE = 2**18, 2**11  # bytes of log at once, and a second
TRACEBACK = 5000  # bytes, about
LONGEST_LINE = 2000  # characters, some of which others chose
TELL_SECONDS = 60.0

log = logging.getLogger("uvicorn.error")


class Quiet(logging.Filter):
    """Lets so much through; the next line after that says how many were left out."""

    def __init__(self) -> None:
        super().__init__()
        self._room, self._last, self._left_out = float(BURST), time.monotonic(), 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a line is written; a long one is cut."""
        now = time.monotonic()
        self._room, self._last = min(BURST, self._room + RATE * (now - self._last)), now
        text = record.getMessage()[:LONGEST_LINE]
        size = len(text) + (TRACEBACK if record.exc_info else 100)
        if size > self._room:
            self._left_out += 1
            return False
        self._room -= size
        if self._left_out:
            text += f" ({self._left_out:,} lines before this one were left out)"
            self._left_out = 0
        record.msg, record.args = text, ()
        return True


def quieten() -> None:
    """Have all of the SuperLink's log go through one such filter."""
    quiet = Quiet()
    for name in ("uvicorn", "uvicorn.access", "flwr", ""):
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(quiet)
    if logging.lastResort:
        logging.lastResort.addFilter(quiet)


class Refusals:
    """Counts what is refused, and says so in a line a minute."""

    def __init__(self) -> None:
        self._counts, self._since = Counter[str](), time.monotonic()

    def count(self, what: str) -> None:
        """Count one, e.g. the status of its answer."""
        self._counts[what] += 1

    def tell(self) -> None:
        """Say what there was, if that was not done for a minute; cheap enough for every request."""
        now = time.monotonic()
        if self._counts and now - self._since >= TELL_SECONDS:
            counts = ", ".join(f"{number:,} x {what}" for what, number in sorted(self._counts.items()))
            log.warning("refused in the last %.0f s: %s", now - self._since, counts)
            self._counts.clear()
        if not self._counts:
            self._since = now if now - self._since >= TELL_SECONDS else self._since
