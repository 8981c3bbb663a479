"""Supervises Flower's SuperNode for one site: joins, says what happens, comes back after a loss, leaves cleanly."""

import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from maskdm.errors import DataError, FederationError
from maskdm.processes import Child, free_port, script, script_environment
from maskdm.protocol import Outcome
from maskdm.reporting import say
from maskdm.runfolder import LineReader

POLL_SECONDS = 0.25
RETRY_SECONDS = 5.0
# After the last round the reply must reach the server before the node leaves; the server closes when it has it.
LEAVE_SECONDS = 20.0
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
        wait: seconds to keep trying while the server cannot be reached.
        check: raises when the user asked to stop.

    Raises:
        FederationError: the server was not there for `wait` seconds.
        DataError: this site's data cannot be used with the prior that came.
    """
    events = LineReader(folder / "events.jsonl")
    while True:
        _wait_for_server(host, port, wait, check)
        with _start(folder, host, port, certificate) as node:
            say(f"joined {host}:{port}; waiting for work")
            while node.exit_code() is None:
                check()
                for event in events.new():
                    _tell(event)
                    if event["event"] == "failed" and event["outcome"] in FATAL:
                        time.sleep(1)  # let the code reach the server
                        raise DataError(event["reason"])
                    if event["event"] == "finished":
                        _leave(host, port)
                        return
                time.sleep(POLL_SECONDS)
            say(f"the connection to {host}:{port} was lost (details: {node.log}); trying again")
        _pause(RETRY_SECONDS, check)


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
        "FLWR_HOME": str(home),
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.5",
        **script_environment(),
    }
    return Child(arguments, log=folder / "logs" / "supernode.log", environment=environment)


def _tell(event: dict[str, Any]) -> None:
    kind = event["event"]
    if kind == "data":
        say(f"{event['summary']}; training on {event['train']:,}, held out {event['held_out']:,}")
    elif kind == "data warning":
        say(f"WARNING: {event['reason']}")
    elif kind == "measured":
        say(f"round {event['round']}/{event['rounds']}: held-out loss {event['loss']:.4f} with the model that came")
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


def _leave(host: str, port: int) -> None:
    deadline = time.monotonic() + LEAVE_SECONDS
    while time.monotonic() < deadline and reachable(host, port, timeout=0.5):
        time.sleep(POLL_SECONDS)


def _pause(seconds: float, check: Callable[[], None]) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        check()
        time.sleep(min(POLL_SECONDS, seconds))
