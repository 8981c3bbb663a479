"""Real processes: how the end-to-end tests start, feed, watch and end them."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from PIL import Image

from maskdm import cli
from maskdm.processes import free_port
from maskdm_client.cli import app as client_app
from maskdm_server.cli import app as server_app
from maskdm_server.faces import Domain, draw_faces

DEADLINE = 240.0
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


def documented(name: str, page: str = "README.md") -> list[list[str]]:
    """The commands of a page's block that is marked with a name, one after another."""
    text = (Path(__file__).parents[2] / page).read_text()
    block = re.search(rf"<!-- {name} -->\n```bash\n(.*?)```", text, re.DOTALL)
    assert block, f"{page} has no block {name}"
    return [shlex.split(line) for line in block[1].replace("\\\n", " ").splitlines() if line and line[0] != "#"]


class Started:
    """A command in the background whose output can be read."""

    def __init__(self, arguments: list[str], folder: Path, name: str, **extra: str) -> None:
        self.log = folder / f"{name}.log"
        program = str(Path(sys.executable).with_name(arguments[0]))
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [program, *arguments[1:]],
                cwd=folder,
                env=environment(**extra),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def output(self) -> str:
        return self.log.read_text()

    def wait(self) -> int:
        return self.process.wait(DEADLINE)

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


def write_certificates(folder: Path) -> None:
    """An authority of its own and a server certificate for loopback: ca.crt, server.crt, server.key."""
    folder.mkdir()
    now = datetime.now(UTC)
    authority_key, server_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    authority = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"authority {folder.name}")])

    def certificate(name: x509.Name, key: ec.EllipticCurvePublicKey, is_authority: bool) -> bytes:
        builder = x509.CertificateBuilder().subject_name(name).issuer_name(authority).public_key(key)
        builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now - timedelta(hours=1))
        builder = builder.not_valid_after(now + timedelta(days=1))
        builder = builder.add_extension(x509.BasicConstraints(is_authority, None), critical=True)
        names = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
        signed = builder.add_extension(names, critical=False).sign(authority_key, hashes.SHA256())
        return signed.public_bytes(serialization.Encoding.PEM)

    server = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "server")])
    (folder / "ca.crt").write_bytes(certificate(authority, authority_key.public_key(), True))
    (folder / "server.crt").write_bytes(certificate(server, server_key.public_key(), False))
    (folder / "server.key").write_bytes(
        server_key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )


class RecordingProxy:
    """A TCP proxy that keeps every byte a client sends to the server."""

    def __init__(self, target: int) -> None:
        self.port = free_port()
        self.sent = bytearray()
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            try:
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                client.close()
                continue
            threading.Thread(target=self._pump, args=(client, server, True), daemon=True).start()
            threading.Thread(target=self._pump, args=(server, client, False), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, record: bool) -> None:
        try:
            while data := source.recv(65536):
                if record:
                    self.sent += data
                sink.sendall(data)
        except OSError:
            pass
        finally:
            source.close()
            sink.close()

    def close(self) -> None:
        self._listener.close()


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
