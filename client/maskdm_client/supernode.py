"""Supervises a site's two processes: Flower's SuperNode, which holds the connection, and the worker, which trains.

Says what happens, comes back after a loss, leaves cleanly. The worker goes on while the connection is away.
"""

import json
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from maskdm.errors import DataError, FederationError
from maskdm.parcel import Outcome
from maskdm.processes import Child, free_port, script, script_environment
from maskdm.reporting import say
from maskdm.runfolder import LineReader

POLL_SECONDS = 0.25
# Between two tries to join. A node that went away without a word stays "online" at the server for about a minute, and
# nobody with its key may join as long.
FIRST_PAUSE, LONGEST_PAUSE = 2.0, 60.0
# A connection that held for so long counts as one that worked.
STEADY_SECONDS = 60.0
# After the last round the reply must reach the server before the node leaves; the server closes when it has it.
LEAVE_SECONDS = 60.0
# Without a reply between them, so many deaths of the worker are no accident.
MOST_RESTARTS = 5
# These outcomes will not get better by waiting: the site's own data or the prior must change first.
FATAL = (Outcome.DATA_UNUSABLE.name, Outcome.WRONG_CHANNELS.name)


def reachable(host: str, port: int, timeout: float = 2.0) -> bool:
    """True where something accepts connections."""
    try:
        with socket.create_connection((host, port), timeout=timeout):
            return True
    except OSError:
        return False


def work(folder: Path, host: str, port: int, certificate: Path | None, wait: float, check: Callable[[], None]) -> None:
    """Serve one federation until it ends.

    Args:
        folder: the site's folder, with its settings and slice.
        certificate: CA certificate for TLS; None connects in the clear.
        wait: seconds to keep trying while the server cannot be reached or does not let this site in.
        check: raises when the user asked to stop.

    Raises:
        FederationError: the server was not there for `wait` seconds, or the worker died again and again.
        DataError: this site's data cannot be used with the prior that came.
    """
    events = LineReader(folder / "events.jsonl")
    with Worker(folder) as worker:
        pause, last_steady = FIRST_PAUSE, time.monotonic()
        while True:
            _wait_for_server(host, port, wait, check)
            joined = time.monotonic()
            with _start(folder, host, port, certificate) as node:
                say(f"joined {host}:{port}; waiting for work")
                while node.exit_code() is None:
                    check()
                    worker.look_after()
                    for event in events.new():
                        _tell(event)
                        if event["event"] == "failed" and event["outcome"] in FATAL:
                            time.sleep(5)  # let the code reach the server
                            raise DataError(event["reason"])
                        if event["event"] == "finished":
                            _leave(host, port, node)
                            return
                        if event["event"] == "round":
                            worker.has_worked()
                    time.sleep(POLL_SECONDS)
            now = time.monotonic()
            if now - joined > STEADY_SECONDS:
                pause, last_steady = FIRST_PAUSE, now
            elif now - last_steady > wait + STEADY_SECONDS:
                raise FederationError(
                    f"--server {host}:{port} answers but does not let this site in (details: {node.log}): "
                    f"check --kit, or give a longer --wait"
                )
            say(f"the connection to {host}:{port} was lost (details: {node.log}); trying again in {pause:.0f} s")
            _pause(pause, check)
            pause = min(LONGEST_PAUSE, 2 * pause)


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

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.close()

    def _start(self) -> Child:
        command = [sys.executable, "-m", "maskdm_client.worker", str(self._folder.resolve())]
        return Child(command, log=self._folder / "logs" / "worker.log")


def _wait_for_server(host: str, port: int, wait: float, check: Callable[[], None]) -> None:
    started = time.monotonic()
    told = False
    while not reachable(host, port):
        check()
        waited = time.monotonic() - started
        if waited >= wait:
            raise FederationError(
                f"--server {host}:{port} did not answer for {waited:.0f} s: check address, port and firewall, "
                f"or give a longer --wait"
            )
        if not told:
            say(f"no server at {host}:{port} yet; trying for {wait:.0f} s")
            told = True
        _pause(min(1.0, wait), check)


def _start(folder: Path, host: str, port: int, certificate: Path | None) -> Child:
    home = folder / ".flwr"
    home.mkdir(exist_ok=True)
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    arguments = [script("flower-supernode"), "--superlink", address, "--port", str(free_port())]
    arguments += ["--root-certificates", str(certificate)] if certificate else ["--insecure"]
    arguments += ["--node-config", f"site={json.dumps(str(folder.resolve()))}"]
    environment = {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_HOME": str(home.resolve()),
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.5",
        **script_environment(),
    }
    return Child(arguments, log=folder / "logs" / "supernode.log", environment=environment)


def _tell(event: dict[str, Any]) -> None:
    kind = event["event"]
    if kind == "superseded":
        say(f"round {event['round']}: the server asks for something newer; this work is dropped")
    elif kind == "data":
        say(f"{event['summary']}; training on {event['train']:,}, held out {event['held_out']:,}")
    elif kind == "data warning":
        say(f"WARNING: {event['reason']}")
    elif kind == "measured":
        say(f"round {event['round']}/{event['rounds']}: held-out loss {event['loss']:.4f} with the model that came")
        if event.get("images"):
            say(f"round {event['round']}: going on at {event['images']:,} images")
    elif kind == "training":
        say(f"round {event['round']}: {event['images']:,}/{event['of']:,} images")
    elif kind == "round":
        say(
            f"round {event['round']}/{event['rounds']}: held-out loss {event['loss_before']:.4f} → "
            f"{event['loss_after']:.4f}, {event['images_seen']:,} images in {event['seconds']:.0f} s, "
            f"{event['bytes'] / 1e6:.1f} MB sent"
        )
    elif kind == "finished":
        say(f"the federation ended; held-out loss of the final model {event['loss']:.4f}")
    elif kind == "failed":
        say(f"round {event['round']}: {event['reason']} (the server is told only {event['outcome']})")


def _leave(host: str, port: int, node: Child) -> None:
    deadline = time.monotonic() + LEAVE_SECONDS
    while time.monotonic() < deadline and node.exit_code() is None and reachable(host, port, timeout=0.5):
        time.sleep(POLL_SECONDS)


def _pause(seconds: float, check: Callable[[], None]) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        check()
        time.sleep(min(POLL_SECONDS, seconds))
