"""Ctrl-C and SIGTERM as a flag: long work stops between steps and saves; a second Ctrl-C stops at once."""

import signal
import threading
from types import FrameType
from typing import Any, Self

from ..errors import Interrupted


class Interruption:
    """Context manager; `requested()` turns true on the first signal. Signals reach the main thread only: in any other
    one nothing changes."""

    def __init__(self) -> None:
        self._signal: int | None = None
        self._previous: dict[int, Any] = {}

    def requested(self) -> bool:
        return self._signal is not None

    def check(self) -> None:
        """Raise Interrupted if a signal came."""
        if self._signal is not None:
            raise Interrupted("interrupted; run the same command again to continue")

    def __enter__(self) -> Self:
        main = threading.current_thread() is threading.main_thread()
        for number in (signal.SIGINT, signal.SIGTERM) if main else ():
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self._signal is not None:
            raise KeyboardInterrupt
        self._signal = number
