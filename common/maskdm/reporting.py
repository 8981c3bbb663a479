"""What a person sees while long work runs: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from maskdm.processes import is_first

PLAIN_LINE_EVERY = 5.0  # seconds


def say(line: str) -> None:
    """One line for a person, on standard error so that standard output stays free; of several processes the first."""
    if is_first():
        print(line, file=sys.stderr, flush=True)


class WorkBar:
    """Progress of work that is counted, e.g. in images."""

    def __init__(self, title: str, total: int, done: int = 0) -> None:
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
        if self._bar:
            self._bar.update(self._task, completed=done, detail=f"{done:,}/{self._total:,} {detail}")
        elif now - self._last_line >= PLAIN_LINE_EVERY or done >= self._total:
            self._last_line = now
            rate = (done - self._start) / max(now - self._since, 1e-9)
            left = (self._total - done) / rate if rate else 0.0
            say(f"{self._title}: {done:,}/{self._total:,} {detail} ({left:.0f} s left)")
