"""Flower's two processes of a site.

The SuperNode holds the connection; the SuperExec starts a ClientApp for each message that it brings.
"""

import json
from pathlib import Path
from typing import Self

from maskdm.processes import Child, flower_environment, free_port, script
from maskdm.reporting import say

# What the SuperNode writes into its log once the server has let it in.
LET_IN = b"SuperNode ID"


class SuperNode:
    """One connection; leaving the `with` ends both processes."""

    def __init__(self, folder: Path, host: str, port: int, certificate: Path | None) -> None:
        """Start the SuperNode; the SuperExec follows when there is somebody to work for."""
        home = folder / ".flwr"
        home.mkdir(exist_ok=True)
        self._logs, self._let_in = folder / "logs", False
        self._environment = flower_environment(home)
        own = free_port()
        self._runtime = f"127.0.0.1:{own}"
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        arguments = ["--superlink", address, "--host", "127.0.0.1", "--port", str(own), "--isolation", "process"]
        arguments += ["--root-certificates", str(certificate)] if certificate else ["--insecure"]
        arguments += ["--node-config", f"site={json.dumps(str(folder.resolve()))}"]
        self.log = self._logs / "supernode.log"
        self._earlier = self.log.stat().st_size if self.log.exists() else 0
        self._node = self._start("supernode", arguments)
        self._executor: Child | None = None

    def is_let_in(self) -> bool:
        """Whether the server took this site in."""
        if not self._let_in:
            with self.log.open("rb") as file:
                file.seek(self._earlier)
                self._let_in = LET_IN in file.read()
        return self._let_in

    def is_alive(self) -> bool:
        """Whether both processes live; the SuperExec is started when the site is let in."""
        if self._node.exit_code() is not None:
            return False
        if self._executor is None and self.is_let_in():
            self._executor = self._start("superexec", ["--runtime-api-address", self._runtime, "--insecure"])
        # A SuperNode whose ClientApp was ended with the SuperExec waits for its reply for ever.
        if self._executor and self._executor.exit_code() is not None:
            say(f"Flower's superexec ended unexpectedly (details: {self._executor.log})")
            return False
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._executor:
            self._executor.close()
        self._node.close()

    def _start(self, name: str, arguments: list[str]) -> Child:
        command = [script(f"flower-{name}"), *arguments]
        return Child(command, log=self._logs / f"{name}.log", environment=self._environment)
