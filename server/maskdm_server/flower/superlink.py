"""Starts and supervises Flower's processes for one federation: SuperLink, SuperExec, ServerApp.

Each may die without ending the federation. The SuperLink keeps its state in a file and is started again; the ServerApp
is a process of its own that outlives it (Flower's process isolation), and where it died itself a new run takes up the
journal.
"""

import secrets
import ssl
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from maskdm.errors import FederationError, UsageError
from maskdm.federated.flower_names import UNFIT
from maskdm.run.events import Event
from maskdm.run.processes import Child, flower_environment, free_port, port_is_taken, script
from maskdm.run.runfolder import LineReader

from ..door.door import SECRET
from ..door.keys import KEYS
from ..door.questions import ASKED
from ..federation.events import FederationFinished, RoundDone, RoundsFailed, known
from ..kits.authority import write_private
from .control import Control
from .liveness import is_alive
from .roster import NODES, Roster

START_SECONDS = 90.0
POLL_SECONDS = 0.25
# Without a round between them, so many deaths in a row are no accident.
MOST_RESTARTS = 5


class SuperLink:
    """Flower's processes for one run; leaving the `with` ends them and all they started."""

    def __init__(
        self,
        folder: Path,
        host: str,
        port: int,
        tls: Path | None,
        largest_update: int,
        say: Callable[[str], None],
    ) -> None:
        """Start them.

        Args:
            tls: folder made by `provision`; None serves whoever comes, in the clear.

        Raises:
            UsageError: the port is in use.
        """
        if port_is_taken(host, port):
            raise UsageError(f"--port {port} on {host} is in use or not ours: choose another --port or --host")
        self._folder, self._tls, self._say = folder, tls, say
        self._home = folder / ".flwr"
        self._home.mkdir(exist_ok=True)
        self._home.chmod(0o700)
        # Of a run that ended.
        for stale in (*self._home.glob("superlink.db*"), *(self._home / name for name in (NODES, KEYS, ASKED))):
            stale.unlink(missing_ok=True)
        write_private(self._home / SECRET, secrets.token_hex(32).encode())
        self._private = f"127.0.0.1:{free_port()}"
        self._roster = Roster(tls, self._home, say) if tls else None
        self._control: Control | None = None
        self._served, self._restarts = (tls / "server.crt").read_bytes() if tls else b"", 0
        self._environment = flower_environment(self._home)
        self._commands = self._commands_for(host, port, largest_update)
        self._processes = {name: self._start(name) for name in self._commands}

    def _commands_for(self, host: str, port: int, largest_update: int) -> dict[str, list[str]]:
        home, secret = self._home.resolve(), str(self._home.resolve() / SECRET)
        link = [
            sys.executable,
            "-m",
            "maskdm_server.door.door",
            str(home),
            str(largest_update),
            _split(self._private)[1],
        ]
        link += ["--host", host, "--port", str(port), "--isolation", "process"]
        link += ["--database", str(home / "superlink.db")]
        link += ["--disable-runtime-dependency-installation", "--superexec-auth-secret-file", secret]
        executor = [script("flower-superexec"), "--runtime-api-address", self._private]
        executor += ["--superexec-auth-secret-file", secret]
        if not self._tls:
            return {"superlink": [*link, "--insecure"], "superexec": [*executor, "--insecure"]}
        for option, name in (("certfile", "server.crt"), ("keyfile", "server.key"), ("ca-certfile", "ca.crt")):
            link += [f"--ssl-{option}", str(self._tls / name)]
        link += ["--enable-supernode-auth"]
        return {"superlink": link, "superexec": [*executor, "--root-certificates", str(self._tls / "ca.crt")]}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End them; a second time does nothing."""
        if self._control:
            self._control.close()
        for process in reversed(self._processes.values()):
            process.close()

    def submit(self, check: Callable[[], None]) -> None:
        """Wait until the SuperLink answers, let the sites in, and submit the federation's run.

        Raises:
            UsageError: the installed Flower lacks a name.
            FederationError: the SuperLink did not start, or does not take the run.
        """
        deadline = time.monotonic() + START_SECONDS
        host, port = _split(self._private)
        while not port_is_taken(host, int(port)):
            check()
            ended = self._processes["superlink"].exit_code()
            if ended == UNFIT:
                raise UsageError(self._processes["superlink"].last_lines(1))
            if ended is not None or time.monotonic() > deadline:
                raise FederationError(f"the SuperLink did not start:\n{self._processes['superlink'].last_lines()}")
            time.sleep(POLL_SECONDS)
        if self._control is None:
            certificate = self._tls / "ca.crt" if self._tls else None
            self._control = Control(self._private, (self._home / SECRET).read_text(), certificate)
        if self._roster:
            self._roster.follow(self._control)
        self._start_run(self._control)
        self._submitted = time.monotonic()
        self._lived = False

    def follow(self, hear: Callable[[Event], None], check: Callable[[], None], events: LineReader) -> None:
        """Follow the run until it ends, and start again what dies on the way.

        Raises:
            FederationError: the run failed, or its processes died too often.
        """
        while True:
            check()
            for event in known(events.new()):
                hear(event)
                match event:
                    case RoundsFailed():
                        raise FederationError(event.reason)
                    case FederationFinished():
                        return
                    case RoundDone():
                        self._restarts = 0
            for name, process in list(self._processes.items()):
                if process.exit_code() is not None:
                    self._count_restart(f"Flower's {name} ended unexpectedly", process)
                    process.close()
                    self._processes[name] = self._start(name)
            if self._tls and self._roster and self._control:
                self._roster.follow(self._control)
                self._take_new_certificate(self._tls)
            if self._server_app_is_gone():
                last = list(self._processes.values())[-1]
                self._count_restart("the process that runs the rounds ended unexpectedly", last)
                self.submit(check)
            time.sleep(POLL_SECONDS)

    def _take_new_certificate(self, folder: Path) -> None:
        try:
            now = (folder / "server.crt").read_bytes()
            if now == self._served:
                return
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(folder / "server.crt", folder / "server.key")
        except OSError:  # ssl's errors are of this kind: it and its key are being replaced
            return
        self._say("the server's certificate is a new one; starting the SuperLink again with it")
        self._served = now
        self._processes["superlink"].close()
        self._processes["superlink"] = self._start("superlink")

    def _start_run(self, control: Control) -> None:
        """Submit it."""
        control.start_run("flower-app", self._folder)

    def _server_app_is_gone(self) -> bool:
        """Whether it lived and does not any more, or never came to life."""
        alive = is_alive(self._folder)
        self._lived = self._lived or alive
        return not alive and (self._lived or time.monotonic() - self._submitted > START_SECONDS)

    def _count_restart(self, what: str, process: Child) -> None:
        self._restarts += 1
        if self._restarts > MOST_RESTARTS:
            raise FederationError(f"{what} {self._restarts} times without a round between:\n{process.last_lines()}")
        self._say(f"{what}; starting it again (details: {process.log})")
        time.sleep(min(30.0, 2.0**self._restarts / 4))

    def _start(self, name: str) -> Child:
        log = self._folder / "logs" / f"{name}.log"
        return Child(self._commands[name], log=log, environment=self._environment)


def _split(address: str) -> tuple[str, str]:
    host, _, port = address.rpartition(":")
    return host, port
