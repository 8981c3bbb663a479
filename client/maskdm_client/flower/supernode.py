"""Flower's two processes of a site.

The SuperNode holds the connection; the SuperExec starts a ClientApp for each message that it brings. Both run no code
but what is installed here (`maskdm_client.flower.pinned`), and other users of this machine cannot give them work.
"""

import json
import secrets
import shlex
import sys
from pathlib import Path
from typing import Self

from maskdm.errors import UsageError
from maskdm.federated.flower_names import UNFIT
from maskdm.federated.kit import OpenedKit
from maskdm.run.processes import Child, flower_environment, free_port
from maskdm.run.reporting import say
from maskdm.run.runfolder import atomic_write

from .pinned import ADDRESS, ADMITTED, PORT, PROGRAM, UNANSWERED


def pinned(program: str, site: Path) -> list[str]:
    """Command of a process of Flower's that runs no code that a coordinator sends."""
    return [sys.executable, "-m", "maskdm_client.flower.pinned", program, str(site)]


class SuperNode:
    """One connection; leaving the `with` ends both processes."""

    def __init__(self, folder: Path, host: str, port: int, kit: OpenedKit | None) -> None:
        """Start the SuperNode; the SuperExec follows when there is somebody to work for.

        Args:
            kit: for TLS and this site's key; None connects in the clear, as nobody in particular.
        """
        home, site = (folder / ".flwr").resolve(), folder.resolve()
        home.mkdir(exist_ok=True, mode=0o700)
        home.chmod(0o700)
        self._site, self._logs = site, folder / "logs"
        self._unanswered, self._admitted = folder / UNANSWERED, folder / ADMITTED
        self._admitted.unlink(missing_ok=True)
        self._environment = flower_environment(home)
        self._secret, self._programs = home / "secret", home / "bin"
        atomic_write(self._secret, secrets.token_hex(32), private=True)
        # The only program that the SuperExec finds by its name.
        self._programs.mkdir(exist_ok=True)
        program = self._programs / PROGRAM
        program.write_text(f'#!/bin/sh\nexec {shlex.join(pinned("clientapp", site))} "$@"\n')
        program.chmod(0o700)
        self._port = str(free_port())
        self._runtime = f"127.0.0.1:{self._port}"
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        arguments = ["--superlink", address, "--host", "127.0.0.1", PORT, self._port, "--isolation", "process"]
        arguments += ["--superexec-auth-secret-file", str(self._secret)]
        if kit:
            arguments += ["--root-certificates", str(kit.authority), "--auth-supernode-private-key", str(kit.key)]
        else:
            arguments += ["--insecure"]
        arguments += ["--node-config", f"site={json.dumps(str(site))}"]
        self.log = self._logs / "supernode.log"
        command = [*pinned("supernode", site), *arguments]
        self._node = Child(command, log=self.log, environment=self._environment)
        self._executor: Child | None = None

    def is_let_in(self) -> bool:
        """Whether the server took this site in."""
        return self._admitted.exists() and self._admitted.read_text() == self._port

    def is_alive(self) -> bool:
        """Whether both processes live; the SuperExec is started when the site is let in.

        Raises:
            UsageError: the installed Flower lacks a name.
        """
        ended = self._node.exit_code()
        if ended == UNFIT:
            raise UsageError(self._node.last_lines(1))
        if ended is not None:
            return False
        if self._executor is None and self.is_let_in():
            command = [*pinned("superexec", self._site), ADDRESS, self._runtime, "--insecure"]
            command += ["--superexec-auth-secret-file", str(self._secret)]
            around = {**self._environment, "PATH": str(self._programs)}
            self._executor = Child(command, log=self._logs / "superexec.log", environment=around)
        # A SuperNode whose ClientApp was ended with the SuperExec waits for its reply for ever.
        if self._executor and self._executor.exit_code() is not None:
            say(f"Flower's superexec ended unexpectedly (details: {self._executor.log})")
            return False
        # One of an earlier SuperNode may leave it late.
        if self._unanswered.exists() and self._unanswered.read_text() == self._runtime:
            say(f"Flower's ClientApp ended without an answer (details: {self._logs / 'superexec.log'})")
            return False
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._executor:
            self._executor.close()
        self._node.close()
