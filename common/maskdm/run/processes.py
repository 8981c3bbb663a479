"""Child processes that end with their parent, whatever happens to it."""

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from . import guard

GRACE_SECONDS = 10.0
MOST_LOGGED = 10_000_000  # bytes of a child's log, and of the older one beside it
# Flower reads these as it is imported.
NO_CALLS_HOME = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}


class Child:
    """A command under a guard: it and all it starts end when this object is closed or this process dies.

    What it prints is appended to a log that keeps the newest: when it grows large it becomes LOG.1, also before the
    command starts, so that what the command prints first stays in its log for long.
    """

    def __init__(self, arguments: Sequence[str], *, log: Path, environment: Mapping[str, str] | None = None) -> None:
        log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if log.exists() and log.stat().st_size > MOST_LOGGED / 2:
            log.replace(log.with_name(f"{log.name}.1"))
        self.log = log
        reading, self._pipe = os.pipe()
        try:
            with log.open("ab") as output:
                self._guard = subprocess.Popen(
                    [
                        *(sys.executable, "-S", guard.__file__, str(reading), str(GRACE_SECONDS)),
                        *(str(log), str(MOST_LOGGED), *arguments),
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=output,  # its own, if it fails
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **(environment or {})},
                    pass_fds=[reading],
                    start_new_session=True,
                )
        finally:
            os.close(reading)

    def exit_code(self) -> int | None:
        """None while the command runs."""
        return self._guard.poll()

    def close(self) -> None:
        """End the command and everything it started, and wait for that."""
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1
        self._guard.wait()

    def last_lines(self, count: int = 20) -> str:
        """The end of the command's own output."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-count:])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def launched() -> bool:
    """Whether `torchrun` started several processes of which this is one."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ and "MASTER_ADDR" in os.environ


def is_first() -> bool:
    """Whether this is the process that writes and speaks; also before `distributed.process_group` was joined."""
    return not launched() or int(os.environ["RANK"]) == 0


def script(name: str) -> str:
    """Path of a console script installed beside this Python."""
    return str(Path(sys.executable).with_name(name))


def flower_environment(home: Path) -> dict[str, str]:
    """For Flower's processes: no calls home, and its files in a folder of ours."""
    return {
        **NO_CALLS_HOME,
        "FLWR_HOME": str(home.resolve()),
        **no_proxy_for_loopback(),
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.5",
        # Messages are copied several times, and most of that is the kernel's handing out of small pages.
        "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"),
        # Flower starts its children by bare name.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }


def no_proxy_for_loopback() -> dict[str, str]:
    """An institution's proxy is for the way out; our own processes speak to each other directly."""
    before = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    hosts = ",".join(dict.fromkeys([*filter(None, before.split(",")), "127.0.0.1", "localhost"]))
    return {"no_proxy": hosts, "NO_PROXY": hosts}


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that is free now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def port_is_taken(host: str, port: int) -> bool:
    """True where something already listens, or the address cannot be bound."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return True
    return False
