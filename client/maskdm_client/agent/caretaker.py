"""Looks after the process that trains, and tells the user what it does, whether there is a connection or not."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from maskdm.errors import DataError, FederationError
from maskdm.federated.parcel import Outcome
from maskdm.run.events import EVENTS
from maskdm.run.processes import Child
from maskdm.run.reporting import say
from maskdm.run.runfolder import LineReader

from ..folder.events import RoundAnswered, SiteFinished, WorkFailed, known

POLL_SECONDS = 0.25
# Without a reply between them, so many deaths of the worker are no accident.
MOST_RESTARTS = 5
# These outcomes will not get better by waiting: the site's own data or the prior must change first.
FATAL = (Outcome.DATA_UNUSABLE.name, Outcome.WRONG_CHANNELS.name)
FATAL_SECONDS = 5.0  # let the code reach the server


class Caretaker:
    """Whoever waits for something calls `look` again and again; leaving the `with` ends the worker."""

    def __init__(self, folder: Path, check: Callable[[], None]) -> None:
        """Start the worker; `check` raises when the user asked to stop."""
        self._check, self._events = check, LineReader(folder / EVENTS)
        self._worker = Worker(folder)
        self.finished = False

    def look(self) -> None:
        """Look once.

        Raises:
            FederationError: the worker died again and again.
            DataError: this site's data cannot be used with the prior that came.
        """
        self._check()
        self._worker.look_after()
        for event in known(self._events.new()):
            if words := event.words():
                say(words)
            match event:
                case WorkFailed():
                    self._worker.has_worked()
                    if event.outcome in FATAL:
                        time.sleep(FATAL_SECONDS)
                        raise DataError(event.reason)
                case RoundAnswered():
                    self._worker.has_worked()
                case SiteFinished():
                    self._worker.has_worked()
                    self.finished = True

    def pause(self, seconds: float) -> None:
        """Look for so long."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.look()
            time.sleep(min(POLL_SECONDS, seconds))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.close()


class Worker:
    """The process that trains; started again where it dies."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._deaths = folder, 0
        self._process = self._start()

    def look_after(self) -> None:
        """Start it again if it is gone."""
        if self._process.exit_code() is None:
            return
        self._process.close()
        self._deaths += 1
        if self._deaths > MOST_RESTARTS:
            raise FederationError(
                f"the process that trains died {self._deaths} times in a row (details: {self._process.log}):\n"
                f"{self._process.last_lines(5)}"
            )
        say(f"the process that trains ended unexpectedly; it goes on where it was saved (details: {self._process.log})")
        self._process = self._start()

    def has_worked(self) -> None:
        """Deaths before this do not count."""
        self._deaths = 0

    def close(self) -> None:
        """End it."""
        self._process.close()

    def _start(self) -> Child:
        command = [sys.executable, "-m", "maskdm_client.agent.worker", str(self._folder.resolve())]
        return Child(command, log=self._folder / "logs" / "worker.log")
