"""What happens to a federation when something dies, freezes, fills up or lies: real processes, one fault at a time.

    python benchmarks/faults.py --json benchmarks/results/faults.json

Three honest clients, six rounds, a small model on drawn faces. Each row: rounds that had to be begun again, the final
model's held-out loss beside undisturbed runs of three seeds (of which all randomness follows, slices included), seconds
from the fault to the next journalled round, exit codes, and processes left over. The full disk needs root (a small
tmpfs). `--only NAME` runs one row.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from maskdm.run.processes import free_port, script
from maskdm.run.runfolder import read_lines, write_json
from maskdm_client.folder.job import SECRET
from maskdm_server.lab.faces import draw_faces

ROUNDS, CLIENTS = 6, 3
ROUND_DEADLINE = 40.0  # Flower takes 22 s to notice a dead ClientApp
LOCAL_IMAGES = 1024
PRETRAIN = (
    *("--size", "tiny", "--image-size", "16", "--mask-ratio", "0.5", "--block-size", "2", "--images", "16K"),
    *("--prediction", "x0", "--batch-size", "32", "--lr", "1e-3", "--betas", "0.9,0.95"),
)
ATTACKS = ("nan", "shapes", "key", "norm", "weight", "version", "parts", "body", "bomb")
ENVIRONMENT = {**{k: v for k, v in os.environ.items() if not k.startswith("MASKDM_")}, "OMP_NUM_THREADS": "1"}


class Lab:
    """One federation in a folder of its own."""

    def __init__(self, folder: Path, prior: Path, data: list[Path], seed: int = 0) -> None:
        self.folder, self.seed, self._prior, self._data = folder, seed, prior, data
        folder.mkdir(parents=True)
        self.port = free_port()
        self.federation = folder / "fed"
        self.server: subprocess.Popen[bytes] | None = None
        self.clients: list[subprocess.Popen[bytes]] = []
        self.fault_at = 0.0

    def start(self, ports: dict[int, int] | None = None) -> None:
        self.serve()
        for number in range(CLIENTS):
            self.clients.append(self.join(number, (ports or {}).get(number, self.port)))

    def serve(self) -> None:
        self.server = self.run(
            "serve",
            *("maskdm-server", "serve", "--prior", str(self._prior), "--out", str(self.federation), "--insecure"),
            *("--port", str(self.port), "--rounds", str(ROUNDS), "--min-clients", str(CLIENTS), "--min-replies", "2"),
            *("--round-deadline", str(ROUND_DEADLINE), "--local-images", str(LOCAL_IMAGES), "--lr", "5e-4"),
            *("--seed", str(self.seed)),
        )

    def join(self, number: int, port: int | None = None) -> subprocess.Popen[bytes]:
        site = self.folder / f"site-{number}"
        site.mkdir(exist_ok=True)  # with a secret that is none, so that runs can be compared weight by weight
        (site / SECRET).write_bytes(hashlib.sha256(f"{self.seed} {number}".encode()).digest())
        return self.run(
            f"client-{number}",
            *("maskdm-client", "--data", str(self._data[number]), "--server", f"127.0.0.1:{port or self.port}"),
            *("--out", str(site), "--fraction", "0.5", "--threads", "1"),
            *("--seed", str(self.seed)),
        )

    def run(self, name: str, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [script(program), *arguments],
                cwd=self.folder,
                env=ENVIRONMENT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def events(self) -> list[dict[str, Any]]:
        return read_lines(self.federation / "events.jsonl")

    def until(self, condition: Callable[[], object], seconds: float = 240.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError((self.folder / "serve.log").read_text()[-2000:])
            time.sleep(0.02)

    def until_training(self, site: int, round_number: int) -> None:
        """Until a client is in the middle of a round's training."""
        path = self.folder / f"site-{site}" / "events.jsonl"
        self.until(lambda: any(e["event"] == "training" and e["round"] == round_number for e in read_lines(path)))

    def fault(self, what: Callable[[], None]) -> None:
        self.fault_at = time.time()
        what()

    def processes(self, text: str, below: str = "") -> list[int]:
        """Living processes of this federation whose command line holds `text`, and whose environment holds `below`."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                around = (entry / "environ").read_bytes().decode(errors="replace")
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            ours = str(self.folder) in command + around
            if state != "Z" and ours and text in command and below in command + around and "guard.py" not in command:
                found.append(int(entry.name))
        return found

    def kill(self, text: str, below: str = "", number: signal.Signals = signal.SIGKILL) -> None:
        """Signal the youngest such process; wait until there is one."""
        self.until(lambda: self.processes(text, below), 60)
        os.kill(max(self.processes(text, below)), number)

    def end(self) -> dict[str, Any]:
        """Wait for everybody and say how it went."""
        assert self.server is not None
        exits = {"server": self.server.wait(600)}
        clients: list[int | str] = []
        for client in self.clients:
            try:
                clients.append(client.wait(120))
            except subprocess.TimeoutExpired:
                client.kill()
                clients.append("hung")
        deadline = time.monotonic() + 20
        while self.processes("") and time.monotonic() < deadline:
            time.sleep(0.2)
        left = len(self.processes(""))
        events = self.events()
        done = [event["time"] for event in events if event["event"] == "round"]
        after = [moment - self.fault_at for moment in done if moment > self.fault_at]
        asked = {event["exchange"] for event in events if event["event"] == "sent" and event["action"] == "train"}
        lines = read_lines(self.federation / "rounds.jsonl")
        result = self.federation / "result.json"
        return {
            "rounds_done": len(lines),
            "rounds_lost": len(asked) - len(lines),
            "rejected": sum(line["rejected"] for line in lines),
            "loss": json.loads(result.read_text())["loss_final"] if result.exists() else None,
            "seconds_to_next_round": round(after[0], 1) if self.fault_at and after else None,
            "seconds_a_round": round(statistics.median(line["seconds"] for line in lines), 1) if lines else None,
            "exit_server": exits["server"],
            "exit_clients": clients,
            "left_over": left,
        }


class Proxy:
    """A TCP link that can be cut, or lose an answer."""

    def __init__(self, target: int) -> None:
        self.port, self._target, self._cut = free_port(), target, False
        self._lose, self.has_lost = b"", False
        self._open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            if self._cut:
                client.close()
                continue
            try:
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                client.close()
                continue
            self._open += [client, server]
            asked = bytearray()  # what the client wants at the moment
            threading.Thread(target=self._pump, args=(client, server, asked, True), daemon=True).start()
            threading.Thread(target=self._pump, args=(server, client, asked, False), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, asked: bytearray, is_request: bool) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if is_request:
                    if data.startswith(b"POST "):  # not the body, which may come by itself
                        asked[:] = data[:100]
                elif self._lose and asked.startswith(self._lose) and b"content-length: 0\r\n" not in data:
                    self._lose, self.has_lost = b"", True
                    break
                sink.sendall(data)
        _end(source, sink)

    def lose(self, path: str) -> None:
        """Have the connection break before the next answer from this path that holds anything."""
        self._lose = f"POST {path} ".encode()

    def cut(self) -> None:
        self._cut = True
        _end(*self._open)
        self._open.clear()

    def restore(self) -> None:
        self._cut = False


def _end(*connections: socket.socket) -> None:
    """Not by closing: a thread that still reads would read from whatever gets the same number."""
    for connection in connections:
        with suppress(OSError):  # it has ended
            connection.shutdown(socket.SHUT_RDWR)


def undisturbed(lab: Lab) -> None:
    lab.start()


def client_killed(lab: Lab) -> None:
    lab.start()
    lab.until_training(1, 3)
    lab.fault(lab.clients[1].kill)
    lab.clients[1].wait()
    lab.clients[1] = lab.join(1)


def worker_killed(lab: Lab) -> None:
    lab.start()
    lab.until_training(1, 3)
    lab.fault(lambda: lab.kill("maskdm_client.agent.worker", "site-1"))


def client_app_killed(lab: Lab) -> None:
    lab.start()
    lab.until_training(1, 3)
    lab.fault(lambda: lab.kill("maskdm_client.flower.pinned clientapp", "site-1"))


def supernode_killed(lab: Lab) -> None:
    lab.start()
    lab.until_training(1, 3)
    lab.fault(lambda: lab.kill("maskdm_client.flower.pinned supernode", "site-1"))


def site_executor_killed(lab: Lab) -> None:
    lab.start()
    lab.until_training(1, 3)
    lab.fault(lambda: lab.kill("pinned superexec", "site-1"))


def server_app_killed(lab: Lab) -> None:
    lab.start()
    lab.until_training(1, 3)
    lab.fault(lambda: lab.kill("flwr-serverapp"))


def superlink_killed(lab: Lab) -> None:
    lab.start()
    lab.until_training(1, 3)
    lab.fault(lambda: lab.kill("maskdm_server.door.door"))


def superexec_killed(lab: Lab) -> None:
    lab.start()
    lab.until_training(1, 3)
    lab.fault(lambda: lab.kill("flower-superexec", "fed/.flwr"))


def server_killed(lab: Lab) -> None:
    lab.start()
    lab.until_training(1, 3)
    assert lab.server is not None
    lab.fault(lab.server.kill)
    lab.server.wait()
    lab.until(lambda: not lab.processes("maskdm_server.door.door"))
    lab.serve()


def client_frozen(lab: Lab) -> None:
    lab.start()
    lab.until_training(1, 3)
    frozen = [lab.clients[1].pid, *lab.processes("", "site-1")]

    def freeze() -> None:
        for pid in frozen:
            os.kill(pid, signal.SIGSTOP)

    lab.fault(freeze)
    lab.until(lambda: len(read_lines(lab.federation / "rounds.jsonl")) >= 4)
    for pid in frozen:
        os.kill(pid, signal.SIGCONT)


def link_cut(lab: Lab) -> None:
    proxy = Proxy(lab.port)
    lab.start({1: proxy.port})
    lab.until_training(1, 3)
    lab.fault(proxy.cut)
    time.sleep(15)
    proxy.restore()


def plan_lost(lab: Lab) -> None:
    """Flower's SuperLink hands a message out once, whether it arrives or not.

    It is a plan, since a round is shorter than what a site may work without a word.
    """
    proxy = Proxy(lab.port)
    lab.start({1: proxy.port})
    lab.until_training(1, 2)
    proxy.lose("/v1/fleet/pull-messages")
    lab.until(lambda: proxy.has_lost)
    lab.fault(lambda: None)


def disk_full(lab: Lab) -> None:
    rounds = lab.federation / "rounds"
    lab.start()
    lab.until(lambda: (lab.federation / "config.json").exists())
    rounds.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(rounds)], check=True)
    try:
        lab.until_training(1, 3)
        filler = rounds / ".filler"

        def fill() -> None:
            with filler.open("wb", buffering=0) as file:
                while True:
                    try:
                        file.write(bytes(2**16))
                    except OSError:
                        break

        lab.fault(fill)
        lab.until(lambda: any(event["event"] == "disk full" for event in lab.events()))
        time.sleep(3)
        filler.unlink()
        assert lab.server is not None
        lab.server.wait(600)
    finally:
        keep = lab.folder / "kept"
        shutil.copytree(rounds, keep)
        subprocess.run(["umount", str(rounds)], check=True)


def hostile(attack: str) -> Callable[[Lab], None]:
    def run(lab: Lab) -> None:
        lab.start()
        lab.until(lambda: (lab.federation / "events.jsonl").exists())
        lab.fault_at = time.time()
        with (lab.folder / "hostile.log").open("wb") as log:
            command = [sys.executable, str(Path(__file__).with_name("hostile.py")), f"127.0.0.1:{lab.port}", attack]
            node = subprocess.Popen(command, cwd=lab.folder, env=ENVIRONMENT, stdout=log, stderr=subprocess.STDOUT)
        assert lab.server is not None
        lab.server.wait(600)
        node.kill()
        node.wait()

    return run


ROWS: dict[str, Callable[[Lab], None]] = {
    "client killed in training": client_killed,
    "its training process killed": worker_killed,
    "its ClientApp killed": client_app_killed,
    "its SuperNode killed": supernode_killed,
    "its SuperExec killed": site_executor_killed,
    "ServerApp killed": server_app_killed,
    "SuperLink killed": superlink_killed,
    "SuperExec killed": superexec_killed,
    "whole server killed": server_killed,
    "client frozen past the deadline": client_frozen,
    "link cut for 15 s": link_cut,
    "plan lost on its way": plan_lost,
    "disk full at the journal": disk_full,
    **{f"hostile: {attack}": hostile(attack) for attack in ATTACKS},
}


def prepare(folder: Path) -> tuple[Path, list[Path]]:
    """A prior and the images of three institutions."""
    np.savez(folder / "public.npz", images=draw_faces(800, size=16))
    data = []
    for number, domain in enumerate(("clinic", "laboratory", "workshop")):
        data.append(folder / f"{domain}.npz")
        np.savez(data[-1], images=draw_faces(240, domain, size=16, seed=number))  # type: ignore[arg-type]
    command = [script("maskdm-server"), "pretrain", "--data", str(folder / "public.npz"), "--out", str(folder / "run")]
    subprocess.run([*command, *PRETRAIN], check=True, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    return folder / "run" / "prior.safetensors", data


def measure(name: str, act: Callable[[Lab], None], lab: Lab) -> dict[str, Any]:
    started = time.monotonic()
    try:
        act(lab)
        row = lab.end()
    finally:
        for pid in lab.processes(""):
            os.kill(pid, signal.SIGKILL)
    row = {"fault": name, **row, "seconds": round(time.monotonic() - started, 1)}
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", action="append", choices=ROWS, help="one row; may be given again")
    parser.add_argument("--keep", type=Path, help="folder in which everything is left")
    arguments = parser.parse_args()
    folder = arguments.keep or Path(tempfile.mkdtemp(prefix="faults-"))
    folder.mkdir(exist_ok=True)
    prior, data = prepare(folder)
    rows: list[dict[str, Any]] = []
    about: dict[str, Any] = {
        "rounds": ROUNDS,
        "clients": CLIENTS,
        "local_images": LOCAL_IMAGES,
        "round_deadline": ROUND_DEADLINE,
    }
    about |= {"machine": platform.machine(), "cores": os.cpu_count(), "torch": str(torch.__version__)}

    def add(name: str, act: Callable[[Lab], None], lab: Lab) -> None:
        rows.append(measure(name, act, lab) | about)
        if arguments.json:  # as it goes: the whole takes long
            write_json(arguments.json, rows)

    for seed in range(0 if arguments.only else 3):
        add(f"none, seed {seed}", undisturbed, Lab(folder / f"undisturbed-{seed}", prior, data, seed))
    for number, (name, act) in enumerate(ROWS.items()):
        if not arguments.only or name in arguments.only:
            add(name, act, Lab(folder / f"fault-{number}", prior, data))
    losses = [row["loss"] for row in rows if row["fault"].startswith("none")]
    print(f"\n| fault | rounds lost | loss | s to next round | exit server / clients | left over |\n|{'---|' * 6}")
    for row in rows:
        loss = "–" if row["loss"] is None else f"{row['loss']:.4f}"
        exits = f"{row['exit_server']} / {row['exit_clients']}"
        print(
            f"| {row['fault']} | {row['rounds_lost']} | {loss} | {row['seconds_to_next_round']} | {exits} | "
            f"{row['left_over']} |"
        )
    if len(losses) == 3:
        print(f"\nundisturbed: {statistics.mean(losses):.4f}, from {min(losses):.4f} to {max(losses):.4f}")
    if not arguments.keep:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
