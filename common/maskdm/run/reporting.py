"""What a person sees while long work runs: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from .processes import is_first

PLAIN_LINE_EVERY = 5.0  # seconds


def say(line: str) -> None:
    """One line for a person, on standard error so that standard output stays free; of several processes the first."""
    if is_first():
        print(line, file=sys.stderr, flush=True)


def readable_size(size: float) -> str:
    """Bytes as people read them, e.g. 6.5 MB."""
    for unit, power in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if size >= power:
            return f"{size / power:.1f} {unit}"
    return f"{size:.0f} B"


class WorkBar:
    """Progress of work that is counted, e.g. in images; `total` is None where nobody knows it beforehand."""

    def __init__(self, title: str, total: int | None, done: int = 0) -> None:
        self._title, self._total, self._done = title, total, done
        self._since, self._start = time.monotonic(), done
        self._last_line = self._since
        self._bar: Progress | None = None
        console = Console(stderr=True)
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[detail]}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task(title, total=total, completed=done, detail="")

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, done: int, detail: str = "") -> None:
        """Show `done` of the total; a plain line at most every few seconds."""
        self._done = done
        now = time.monotonic()
        shown = f"{done:,} {detail}" if self._total is None else f"{done:,}/{self._total:,} {detail}"
        if self._bar:
            self._bar.update(self._task, completed=done, detail=shown)
        elif now - self._last_line >= PLAIN_LINE_EVERY or done == self._total:
            self._last_line = now
            rate = (done - self._start) / max(now - self._since, 1e-9)
            left = f" ({(self._total - done) / rate:.0f} s left)" if self._total is not None and rate else ""
            say(f"{self._title}: {shown.rstrip()}{left}")
