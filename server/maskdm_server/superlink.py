"""Starts and supervises Flower's SuperLink for one federation, and submits the run."""

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from maskdm.errors import FederationError, UsageError
from maskdm.processes import Child, port_is_taken, script, script_environment
from maskdm.runfolder import LineReader, atomic_write

START_SECONDS = 90.0
POLL_SECONDS = 0.25
# Flower itself notices a dead ServerApp after about a minute; asking costs seconds of CPU, so seldom.
STATUS_SECONDS = 60.0


def bundle() -> Path:
    """The Flower app bundle: inside an installed wheel, or in a checkout's deploy/."""
    installed = Path(__file__).parent / "flower-app"
    return installed if installed.exists() else Path(__file__).parents[2] / "deploy" / "flower-app"


def environment(folder: Path) -> dict[str, str]:
    """Flower without calls home, with its files in the federation's own folder."""
    return {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_HOME": str(folder.resolve() / ".flwr"),
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.5",
        **script_environment(),
    }


class SuperLink:
    """A running SuperLink; leaving the `with` ends it and all it started."""

    def __init__(self, folder: Path, host: str, port: int, tls: Path | None) -> None:
        """Start it.

        Raises:
            UsageError: the port is in use, or the TLS folder lacks a file.
        """
        if port_is_taken(host, port):
            raise UsageError(f"--port {port} on {host} is in use or not ours: choose another --port or --host")
        self._folder, self._tls = folder, tls
        self._loopback = f"{'127.0.0.1' if host in ('0.0.0.0', '::') else host}:{port}"
        arguments = [script("flower-superlink"), "--host", host, "--port", str(port)]
        arguments += ["--disable-runtime-dependency-installation"]
        if tls:
            for option, name in (("certfile", "server.crt"), ("keyfile", "server.key"), ("ca-certfile", "ca.crt")):
                if not (tls / name).is_file():
                    raise UsageError(
                        f"--tls {tls} holds no {name}: give a folder with ca.crt, server.crt and server.key"
                    )
                arguments += [f"--ssl-{option}", str(tls / name)]
        else:
            arguments += ["--insecure"]
        self.process = Child(arguments, log=folder / "logs" / "superlink.log", environment=environment(folder))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the SuperLink; a second time does nothing."""
        self.process.close()

    def submit(self, check: Callable[[], None]) -> str:
        """Wait until it answers, submit the federation's run, and return the run's id."""
        self._write_connection()
        deadline = time.monotonic() + START_SECONDS
        while True:
            check()
            if self.process.exit_code() is not None or time.monotonic() > deadline:
                raise FederationError(f"the SuperLink did not start:\n{self.process.last_lines()}")
            if port_is_taken(*_split(self._loopback)):
                break
            time.sleep(POLL_SECONDS)
        federation = json.dumps(str(self._folder.resolve()))
        answer = self._flwr("run", str(bundle()), "maskdm", "--format", "json", "-c", f"federation={federation}")
        if "run-id" not in answer:
            raise FederationError(f"the run was not accepted: {answer}")
        return str(answer["run-id"])

    def wait(
        self, run: str, on_event: Callable[[dict[str, Any]], None], check: Callable[[], None], events: LineReader
    ) -> None:
        """Follow the run until it ends.

        Raises:
            FederationError: the run failed, or the SuperLink died.
        """
        asked = time.monotonic()
        while True:
            check()
            for event in events.new():
                on_event(event)
                if event["event"] == "failed":
                    raise FederationError(event["reason"])
                if event["event"] == "finished":
                    return
            if self.process.exit_code() is not None:
                raise FederationError(f"the SuperLink died:\n{self.process.last_lines()}")
            if time.monotonic() - asked > STATUS_SECONDS:
                asked = time.monotonic()
                status = self._status(run)
                if status.startswith("finished"):
                    for event in events.new():
                        on_event(event)
                        if event["event"] == "finished":
                            return
                    raise FederationError(f"Flower ended the run as {status}:\n{self.process.last_lines()}")
            time.sleep(POLL_SECONDS)

    def _status(self, run: str) -> str:
        answer = self._flwr("ls", "maskdm", "--run-id", run, "--format", "json")
        runs = answer.get("runs") or [{}]
        return str(runs[0].get("status", "unknown"))

    def _write_connection(self) -> None:
        security = (
            f"root-certificates = {json.dumps(str((self._tls / 'ca.crt').resolve()))}"
            if self._tls
            else "insecure = true"
        )
        text = f'[superlink]\ndefault = "maskdm"\n\n[superlink.maskdm]\naddress = "{self._loopback}"\n{security}\n'
        atomic_write(self._folder / ".flwr" / "config.toml", text)

    def _flwr(self, *arguments: str) -> dict[str, Any]:
        result = subprocess.run(
            [script("flwr"), *arguments],
            env={**os.environ, **environment(self._folder)},
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=START_SECONDS,
        )
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
