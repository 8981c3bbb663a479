"""Starts and supervises Flower's processes for one federation: SuperLink, SuperExec, ServerApp.

Each may die without ending the federation. The SuperLink keeps its state in a file and is started again; the ServerApp
is a process of its own that outlives it (Flower's process isolation), and where it died itself a new run takes up the
journal.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from maskdm.errors import FederationError, UsageError
from maskdm.processes import Child, flower_environment, port_is_taken, script
from maskdm.runfolder import LineReader, atomic_write
from maskdm_server.signs import is_alive

START_SECONDS = 90.0
ANSWER_SECONDS = 300.0
POLL_SECONDS = 0.25
# Without a round between them, so many deaths in a row are no accident.
MOST_RESTARTS = 5


def bundle(name: str) -> Path:
    """A Flower app bundle: inside an installed wheel, or in a checkout's deploy/."""
    installed = Path(__file__).parent / name
    return installed if installed.exists() else Path(__file__).parents[2] / "deploy" / name


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

        Raises:
            UsageError: the port is in use, or the TLS folder lacks a file.
        """
        if port_is_taken(host, port):
            raise UsageError(f"--port {port} on {host} is in use or not ours: choose another --port or --host")
        self._folder, self._tls, self._say = folder, tls, say
        self._address = f"{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
        self._home = folder / ".flwr"
        self._home.mkdir(exist_ok=True)
        for stale in self._home.glob("superlink.db*"):  # of a run that ended with its server
            stale.unlink()
        self._restarts = 0
        self._environment = flower_environment(self._home)
        self._commands = self._commands_for(host, port, largest_update)
        self._processes = {name: self._start(name) for name in self._commands}

    def _commands_for(self, host: str, port: int, largest_update: int) -> dict[str, list[str]]:
        link = [sys.executable, "-m", "maskdm_server.door", str(self._home.resolve()), str(largest_update)]
        link += ["--host", host, "--port", str(port), "--isolation", "process"]
        link += ["--database", str(self._home.resolve() / "superlink.db")]
        link += ["--disable-runtime-dependency-installation"]
        executor = [script("flower-superexec"), "--runtime-api-address", self._address]
        if not self._tls:
            return {"superlink": [*link, "--insecure"], "superexec": [*executor, "--insecure"]}
        for option, name in (("certfile", "server.crt"), ("keyfile", "server.key"), ("ca-certfile", "ca.crt")):
            if not (self._tls / name).is_file():
                raise UsageError(
                    f"--tls {self._tls} holds no {name}: give a folder with ca.crt, server.crt and server.key"
                )
            link += [f"--ssl-{option}", str(self._tls / name)]
        return {"superlink": link, "superexec": [*executor, "--root-certificates", str(self._tls / "ca.crt")]}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End them; a second time does nothing."""
        for process in reversed(self._processes.values()):
            process.close()

    def submit(self, check: Callable[[], None]) -> None:
        """Wait until the SuperLink answers, and submit the federation's run."""
        self._write_connection()
        deadline = time.monotonic() + START_SECONDS
        while not port_is_taken(*_split(self._address)):
            check()
            if self._processes["superlink"].exit_code() is not None or time.monotonic() > deadline:
                raise FederationError(f"the SuperLink did not start:\n{self._processes['superlink'].last_lines()}")
            time.sleep(POLL_SECONDS)
        federation = json.dumps(str(self._folder.resolve()))
        answer = self._flwr("run", *self._run(), "--format", "json", "-c", f"federation={federation}")
        if "run-id" not in answer:
            raise FederationError(f"the run was not accepted: {answer}")
        self._submitted = time.monotonic()
        self._lived = False

    def follow(self, on_event: Callable[[dict[str, Any]], None], check: Callable[[], None], events: LineReader) -> None:
        """Follow the run until it ends, and start again what dies on the way.

        Raises:
            FederationError: the run failed, or its processes died too often.
        """
        while True:
            check()
            for event in events.new():
                on_event(event)
                if event["event"] == "failed":
                    raise FederationError(event["reason"])
                if event["event"] == "finished":
                    return
                if event["event"] == "round":
                    self._restarts = 0
            for name, process in list(self._processes.items()):
                if process.exit_code() is not None:
                    self._count_restart(f"Flower's {name} ended unexpectedly", process)
                    process.close()
                    self._processes[name] = self._start(name)
            if self._server_app_is_gone():
                last = list(self._processes.values())[-1]
                self._count_restart("the process that runs the rounds ended unexpectedly", last)
                self.submit(check)
            time.sleep(POLL_SECONDS)

    def _run(self) -> list[str]:
        """What is submitted, and where."""
        return [str(bundle("flower-app")), "maskdm"]

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

    def _write_connection(self) -> None:
        security = (
            f"root-certificates = {json.dumps(str((self._tls / 'ca.crt').resolve()))}"
            if self._tls
            else "insecure = true"
        )
        text = f'[superlink]\ndefault = "maskdm"\n\n[superlink.maskdm]\naddress = "{self._address}"\n{security}\n'
        atomic_write(self._home / "config.toml", text)

    def _flwr(self, *arguments: str) -> dict[str, Any]:
        try:
            result = subprocess.run(
                [script("flwr"), *arguments],
                env={**os.environ, **self._environment},
                capture_output=True,
                text=True,
                stdin=subprocess.DEVNULL,
                timeout=ANSWER_SECONDS,
            )
        except subprocess.TimeoutExpired as error:
            raise FederationError(f"flwr {arguments[0]} did not end within {ANSWER_SECONDS:.0f} s") from error
        start = result.stdout.find("{")
        try:
            document = json.JSONDecoder().raw_decode(result.stdout[start:])[0] if start >= 0 else {}
        except ValueError:
            document = {}
        if not document:
            raise FederationError(f"flwr {arguments[0]} failed: {(result.stdout + result.stderr).strip()[-800:]}")
        return dict(document)


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host, int(port)
