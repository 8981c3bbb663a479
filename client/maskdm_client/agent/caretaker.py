"""Looks after the process that trains, and tells the user what it does, whether there is a connection or not."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from maskdm.errors import DataError, FederationError
from maskdm.federated.parcel import Outcome
from maskdm.run.processes import Child
from maskdm.run.reporting import say
from maskdm.run.runfolder import LineReader

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
        self._check, self._events = check, LineReader(folder / "events.jsonl")
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
        for event in self._events.new():
            tell(event)
            if event["event"] in ("round", "failed", "finished"):
                self._worker.has_worked()
            if event["event"] == "failed" and event["outcome"] in FATAL:
                time.sleep(FATAL_SECONDS)
                raise DataError(event["reason"])
            self.finished = self.finished or event["event"] == "finished"

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


def tell(event: dict[str, Any]) -> None:
    """Say what an event means."""
    kind = event["event"]
    if kind == "superseded":
        say(f"round {event['round']}: the server asks for something newer; this work is dropped")
    elif kind == "data":
        say(f"{event['summary']}; training on {event['train']:,}, held out {event['held_out']:,}")
    elif kind in ("data warning", "dropped"):
        say(f"WARNING: {event['reason']}")
    elif kind == "measured":
        say(f"round {event['round']}/{event['rounds']}: held-out loss {event['loss']:.4f} with the model that came")
        if event.get("images"):
            say(f"round {event['round']}: going on at {event['images']:,} images")
    elif kind == "training":
        say(f"round {event['round']}: {event['images']:,}/{event['of']:,} images")
    elif kind == "drawing":
        say(f"evaluating a model: {event['images']:,}/{event['of']:,} images drawn")
    elif kind == "evaluated":
        found = ", ".join(f"{name} {value:g}" for name, value in event["quality"].items())
        say(f"a model was evaluated with {event['drawn']:,} images that it drew: {found}")
    elif kind == "not evaluated":
        say(f"the coordinator wanted a model evaluated, which gets only its held-out loss: {event['reason']}")
    elif kind == "waiting":
        say(f"WARNING: {event['reason']}; trying again until it can be written")
    elif kind == "code refused":
        say(f"WARNING: {event['reason']}; it was not unpacked, and the server is told only CODE_REFUSED")
    elif kind == "loss kept":
        say(f"round {event['round']}: one held-out image's loss is unlike all others', so no loss leaves")
    elif kind == "joined late":
        say(f"round {event['round']}: this site has not seen the prior itself, only what became of it")
    elif kind == "agreed":
        say(f"the terms of this federation were agreed to {event['how']}; their fingerprint is {event['fingerprint']}")
    elif kind == "asks":
        say(
            f"round {event['round']}: the terms of this federation wait for your approval, nothing leaves before: "
            f"maskdm-client approve --out {event['folder']} (fingerprint {event['fingerprint']})"
        )
    elif kind == "held":
        what = "the first update" if event["action"] == "train" else "a measurement"
        say(
            f"round {event['round']}: {what} waits for your approval: maskdm-client approve --out "
            f"{event['folder']} (or --deny); the terms have the fingerprint {event['fingerprint']}"
        )
    elif kind == "round":
        say(
            f"round {event['round']}/{event['rounds']}: held-out loss {event['loss_before']:.4f} → "
            f"{event['loss_after']:.4f}, {event['images_seen']:,} images in {event['seconds']:.0f} s, "
            f"{event['bytes'] / 1e6:.1f} MB sent"
        )
    elif kind == "finished" and "loss" in event:
        say(f"the federation ended; held-out loss of the final model {event['loss']:.4f}")
    elif kind == "finished":
        say(f"the federation ended; the final model was not measured: {event['reason']}")
    elif kind == "failed":
        say(f"round {event['round']}: {event['reason']} (the server is told only {event['outcome']})")
