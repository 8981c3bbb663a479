"""Keeps a site in its federation: says what happens, comes back after a loss, leaves cleanly.

The worker goes on while the connection is away.
"""

import socket
import time
from collections.abc import Callable
from pathlib import Path

from maskdm.errors import FederationError
from maskdm.federated.kit import OpenedKit
from maskdm.run.reporting import say

from ..flower.supernode import SuperNode
from ..folder.mailbox import Mailbox
from .caretaker import POLL_SECONDS, Caretaker

# Between two tries to join. A node that went away without a word stays "online" at the server for about a minute, and
# nobody with its key may join as long.
FIRST_PAUSE, LONGEST_PAUSE = 2.0, 60.0
# A connection that held for so long counts as one that worked.
STEADY_SECONDS = 60.0
# Between two looks whether the server of a connection is still there.
LOOK_SECONDS = 5.0
# After the last round the reply must reach the server before the node leaves; the server closes when it has it. After a
# minute it asks for it again.
LEAVE_SECONDS = 120.0


def reachable(host: str, port: int, timeout: float = 2.0) -> bool:
    """True where something accepts connections."""
    try:
        with socket.create_connection((host, port), timeout=timeout):
            return True
    except OSError:
        return False


def work(folder: Path, host: str, port: int, kit: OpenedKit | None, wait: float, check: Callable[[], None]) -> None:
    """Serve one federation until it ends.

    Args:
        folder: the site's folder, with its settings and slice.
        kit: for TLS and the key of this site; None connects in the clear.
        wait: seconds to keep trying while the server cannot be reached or does not let this site in.
        check: raises when the user asked to stop.

    Raises:
        FederationError: the server was not there for `wait` seconds, or the worker died again and again.
        DataError: this site's data cannot be used with the prior that came.
        UsageError: the installed Flower lacks a name.
    """
    server, pause = Coordinator(folder, host, port, wait), FIRST_PAUSE
    with Caretaker(folder, check) as site:
        while True:
            while not server.is_there():
                if server.has_closed():
                    return
                site.pause(min(1.0, wait))
            started, joined = time.monotonic(), False
            with SuperNode(folder, host, port, kit) as node:
                while node.is_alive():
                    site.look()
                    if site.finished:
                        _leave(host, port, node)
                        return
                    if not server.is_there(LOOK_SECONDS) and server.has_closed():
                        return
                    if node.is_let_in() and not joined:
                        say(f"joined {host}:{port}; waiting for work")
                        joined = True
                    elif not joined:
                        server.must_let_in(node.log)
                    time.sleep(POLL_SECONDS)
            if joined:
                server.let_in()
                if time.monotonic() - started > STEADY_SECONDS:
                    pause = FIRST_PAUSE
            server.must_let_in(node.log)
            say(f"the connection to {host}:{port} was lost (details: {node.log}); trying again in {pause:.0f} s")
            site.pause(pause)
            pause = min(LONGEST_PAUSE, 2 * pause)


class Coordinator:
    """Whether the coordinator is there, and for how long it has not been, or has kept this site out."""

    def __init__(self, folder: Path, host: str, port: int, wait: float) -> None:
        self._box, self._host, self._port, self._wait = Mailbox(folder), host, port, wait
        self._looked = self._kept_out_since = time.monotonic()
        self._away_since: float | None = self._looked
        self._told = False

    def is_there(self, every: float = 0.0) -> bool:
        """Whether it accepts connections; looks after so many seconds at the earliest."""
        now = time.monotonic()
        if now - self._looked >= every:
            self._looked = now
            if reachable(self._host, self._port):
                self._away_since, self._told = None, False
            else:
                self._away_since = self._away_since or now
                self._kept_out_since = now
        return self._away_since is None

    def has_closed(self) -> bool:
        """Of one that is not there, which is said once: whether it went because the federation ended.

        Raises:
            FederationError: it did not, and has been away for too long.
        """
        if not self._told:
            say(f"no server at {self._host}:{self._port}; trying for {self._wait:.0f} s")
        self._told = True
        away = time.monotonic() - (self._away_since or time.monotonic())
        if away >= min(self._wait, LEAVE_SECONDS) and self._box.is_over():
            return True
        if away >= self._wait:
            raise FederationError(
                f"--server {self._host}:{self._port} did not answer for {away:.0f} s: check address, port and "
                f"firewall, or give a longer --wait"
            )
        return False

    def let_in(self) -> None:
        """Note that it let this site in."""
        self._kept_out_since = time.monotonic()

    def must_let_in(self, log: Path) -> None:
        """Complain where it is there and has kept this site out for too long."""
        # A site that is let in takes some seconds to join.
        if time.monotonic() - self._kept_out_since > max(self._wait, STEADY_SECONDS):
            raise FederationError(
                f"--server {self._host}:{self._port} answers but does not let this site in (details: {log}): "
                f"check --kit (maskdm-client doctor), or give a longer --wait"
            )


def _leave(host: str, port: int, node: SuperNode) -> None:
    deadline = time.monotonic() + LEAVE_SECONDS
    while time.monotonic() < deadline and node.is_alive() and reachable(host, port, timeout=0.5):
        time.sleep(POLL_SECONDS)
