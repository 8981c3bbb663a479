"""Whatever a federation writes into FED while it is under way; a full disk is waited for."""

import contextlib
import errno
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from maskdm.errors import FederationError
from maskdm.federated import auditlog
from maskdm.federated.auditlog import Message
from maskdm.run.events import Event, append_event

from .events import DiskFull

# A full disk is no reason to lose a round: somebody may make room.
DISK_SECONDS = 600.0

Pause = Callable[[float], None]
Clock = Callable[[], float]
T = TypeVar("T")


class FederationWriter:
    """Writes into one federation's folder."""

    def __init__(self, folder: Path, pause: Pause, clock: Clock) -> None:
        self._folder, self._pause, self._clock = folder, pause, clock
        self.round = 0  # in progress

    def say(self, event: Event) -> None:
        """Tell the process that started this one; a full disk must not end the federation for want of a line."""
        with contextlib.suppress(OSError):
            append_event(self._folder, event)

    def write(self, act: Callable[[], T]) -> T:
        """Do what writes to the disk; a full one is waited for, and `act` is done again.

        Raises:
            FederationError: nobody made room in time, or there is another problem.
        """
        since = last = -math.inf
        while True:
            try:
                return act()
            except OSError as error:
                now = self._clock()
                since, last = now if now - last > DISK_SECONDS else since, now
                if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or now - since > DISK_SECONDS:
                    raise FederationError(
                        f"{self._folder} cannot be written to ({error.strerror}): make room and run the same command "
                        f"again; the last good model was kept"
                    ) from error
                self.say(DiskFull(round=self.round, seconds=DISK_SECONDS))
                self._pause(min(5.0, DISK_SECONDS))

    def record(self, direction: str, peer: str, round_number: int, verdict: str, message: Message) -> None:
        """One line of FED's audit log; room for it is waited for: a log that is to be believed has no gaps."""
        about = (direction, peer, round_number, verdict, message)
        self.write(lambda: auditlog.record(self._folder / auditlog.AUDIT, *about))

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """Room on the disk for updates that wait or are held, empty before and gone after."""
        folder = self._folder / ".updates"
        shutil.rmtree(folder, ignore_errors=True)
        self.write(folder.mkdir)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
