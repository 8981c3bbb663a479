"""Real processes: how the end-to-end tests start, feed, watch and end them."""

import os
import re
import shlex
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

from maskdm.commands import command_line as cli
from maskdm.federated.policy import UNATTENDED
from maskdm_client.commands.app import app as client_app
from maskdm_server.commands.app import app as server_app
from maskdm_server.kits.provision import provision
from maskdm_server.lab.faces import Domain, draw_faces

DEADLINE = 600.0
Run = Callable[..., tuple[int, str]]

# The smallest work that still shows a falling loss; flags of a command come before these.
SMALL = {
    "MASKDM_SIZE": "tiny",
    "MASKDM_IMAGE_SIZE": "16",
    "MASKDM_MASK_RATIO": "0.5",
    "MASKDM_BLOCK_SIZE": "2",
    "MASKDM_IMAGES": "4K",
    "MASKDM_PREDICTION": "x0",
    "MASKDM_BATCH_SIZE": "32",
    "MASKDM_LR": "1e-3",
    "MASKDM_BETAS": "0.9,0.95",
    "MASKDM_ROUNDS": "2",
    "MASKDM_LOCAL_IMAGES": "1024",
    "MASKDM_FRACTION": "0.5",
    "MASKDM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
}


def environment(**extra: str) -> dict[str, str]:
    """This process's environment without its own MASKDM_ settings, plus the small ones."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MASKDM_")}
    return {**clean, **SMALL, **extra}


def _block(mark: str, page: str) -> str:
    """What stands in the fenced block of a page after `<!-- mark -->`."""
    text = (Path(__file__).parents[2] / page).read_text()
    block = re.search(rf"<!-- {re.escape(mark)} -->\n```\w+\n(.*?)```", text, re.DOTALL)
    assert block, f"{page} has no block {mark}"
    return block[1]


def documented(name: str, page: str = "README.md") -> list[list[str]]:
    """The commands of a page's block that is marked with a name, one after another."""
    lines = _block(name, page).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line and line[0] != "#"]


def documented_file(name: str, page: str, folder: Path) -> None:
    """Write a file that a page shows in a block marked `<!-- file NAME -->`."""
    (folder / name).write_text(_block(f"file {name}", page))


class Started:
    """A command in the background whose output can be read."""

    every: ClassVar[list["Started"]] = []

    def __init__(self, arguments: list[str], folder: Path, name: str, within: str = "", **extra: str) -> None:
        """Start it, within a network namespace if need be."""
        self.log = folder / f"{name}.log"
        beside = Path(sys.executable).with_name(arguments[0])
        program = str(beside) if beside.exists() else arguments[0]
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [*(("ip", "netns", "exec", within) if within else ()), program, *arguments[1:]],
                cwd=folder,
                env=environment(**extra),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.every.append(self)

    def output(self) -> str:
        return self.log.read_text()

    def wait(self) -> int:
        try:
            return self.process.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.log} after {DEADLINE:.0f} s:\n{self.output()}") from None

    def until(self, text: str) -> None:
        """Wait until the output holds `text`."""
        wait_until(lambda: text in self.output() or self.process.poll() is not None, lambda: self.output())
        assert text in self.output(), self.output()

    def interrupt(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.wait()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def wait_until(condition: Callable[[], bool], explain: Callable[[], str] = lambda: "") -> None:
    """Poll until it holds; the deadline is only there so that a broken test ends."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, explain()
        time.sleep(0.05)


def processes_with(text: str) -> list[str]:
    """Command lines of living processes whose command line or environment holds `text`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command, inherited = (folder / "cmdline").read_bytes(), (folder / "environ").read_bytes()
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state != "Z" and int(folder.name) != os.getpid() and text.encode() in command + inherited:
            found.append(command.replace(b"\0", b" ").decode(errors="replace"))
    return found


def write_faces(folder: Path, count: int, domain: Domain, prefix: str) -> None:
    """PNG files of faces in a folder, named with a prefix that must never leave it."""
    folder.mkdir(parents=True)
    for number, pixels in enumerate(draw_faces(count, domain, size=16)):
        Image.fromarray(pixels).save(folder / f"{prefix}-{number:04d}.png")


def make_kits(folder: Path, port: int, *clients: str, days: int = 90, policy: str = UNATTENDED) -> Path:
    """Kits for a server on loopback; returns the folder of all that was made."""
    provision(folder, f"127.0.0.1:{port}", clients, days=days, policy=policy.encode())
    return folder


class RecordingProxy:
    """Keeps every byte that a client sends to the server; with the server's own folder it looks into TLS."""

    def __init__(self, target: int, tls: Path | None = None, lose: str = "") -> None:
        """Listen.

        Args:
            lose: path whose first answer with any content is lost, as where a connection breaks; only without TLS.
        """
        self.sent, self.has_lost = bytearray(), False
        self._target, self._in, self._out = target, None, None
        self._lose = f"POST {lose} ".encode()
        if tls:
            self._in = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._in.load_cert_chain(tls / "server.crt", tls / "server.key")
            self._out = ssl.create_default_context(cafile=str(tls / "ca.crt"))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._connect, args=(client,), daemon=True).start()

    def _connect(self, client: socket.socket) -> None:
        try:
            server = socket.create_connection(("127.0.0.1", self._target))
        except OSError:  # whoever looks whether somebody is there shall see that nobody is
            client.close()
            self.close()
            return
        try:
            client = self._in.wrap_socket(client, server_side=True) if self._in else client
            server = self._out.wrap_socket(server, server_hostname="127.0.0.1") if self._out else server
        except OSError:
            client.close()
            server.close()
            return
        wanted = False  # what was asked last is what is to be lost

        def to_server(data: bytes) -> bool:
            nonlocal wanted
            self.sent += data
            if data.startswith(b"POST "):  # not the body, which may come by itself
                wanted = data.startswith(self._lose)
            return True

        def to_client(data: bytes) -> bool:
            loses = wanted and not self.has_lost and b"content-length: 0\r\n" not in data
            self.has_lost = self.has_lost or loses
            return not loses

        answers = threading.Thread(target=_pump, args=(server, client, to_client), daemon=True)
        answers.start()
        _pump(client, server, to_server)
        answers.join()
        # Not before both threads are done with them: a new connection may get the same numbers.
        client.close()
        server.close()

    def close(self) -> None:
        with suppress(OSError):  # it is closed
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def _pump(source: socket.socket, sink: socket.socket, may_pass: Callable[[bytes], bool]) -> None:
    """Carry bytes one way until one of both ends it, then end the other way too."""
    with suppress(OSError):
        while (data := source.recv(65536)) and may_pass(data):
            sink.sendall(data)
    for end in (source, sink):
        with suppress(OSError):  # the other thread was first
            end.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in this process, in an empty folder; returns exit code and standard error."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("MASKDM_")]:
        monkeypatch.delenv(name)

    def run_command(program: str, *arguments: str) -> tuple[int, str]:
        app = server_app if program == "maskdm-server" else client_app
        code = cli.run(app, program, list(arguments))
        return code, capsys.readouterr().err

    return run_command


@pytest.fixture
def workplace(tmp_path: Path) -> Iterator[Path]:
    """A folder for real processes; whatever a failed test leaves there is ended."""
    yield tmp_path
    for started in Started.every:
        if started.log.is_relative_to(tmp_path) and started.process.poll() is None:
            started.kill()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int(folder.name) != os.getpid() and str(tmp_path).encode() in (folder / "cmdline").read_bytes():
                os.kill(int(folder.name), signal.SIGKILL)
        except OSError:
            continue


@pytest.fixture(scope="session")
def public_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small public corpus."""
    path = tmp_path_factory.mktemp("public") / "public.npz"
    np.savez(path, images=draw_faces(400, size=16))
    return path


@pytest.fixture(scope="session")
def prior(public_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prior trained by the real command."""
    folder = tmp_path_factory.mktemp("prior")
    run = Started(["maskdm-server", "pretrain", "--data", str(public_corpus), "--out", "run"], folder, "pretrain")
    assert run.wait() == 0, run.output()
    return folder / "run" / "prior.safetensors"
