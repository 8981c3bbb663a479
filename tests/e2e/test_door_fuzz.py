"""A minute of everything that strangers and one hostile site can send, while two honest sites finish their rounds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from maskdm.run.processes import free_port
from maskdm.run.runfolder import read_lines
from maskdm.training.checkpoint import load_checkpoint

from .conftest import DEADLINE, Started, make_kits, wait_until, write_faces

pytestmark = pytest.mark.slow

FUZZ = Path(__file__).parents[2] / "benchmarks" / "door_fuzz.py"
SECONDS, ROUNDS = 60, 3
MOST_MEMORY = 700_000  # kilobytes; without any of this it takes about 250,000
MOST_LOG = 2_000_000  # bytes


@pytest.mark.parametrize("seed", [0])
def test_rounds_are_finished_while_strangers_and_a_hostile_site_try_everything(
    workplace: Path, prior: Path, seed: int
) -> None:
    port = free_port()
    kits = make_kits(workplace / "kits", port, "a", "b", "hostile")
    serve = ["maskdm-server", "serve", "--prior", str(prior), "--out", "fed", "--tls", "kits/server"]
    enough = ["--min-clients", "2", "--min-replies", "2", "--round-deadline", "40"]
    server = Started([*serve, "--host", "127.0.0.1", "--rounds", str(ROUNDS), *enough], workplace, "serve")
    server.until("listening on")
    command = [sys.executable, str(FUZZ), f"127.0.0.1:{port}", "--kit", str(kits / "hostile.zip")]
    command += ["--seconds", str(SECONDS), "--seed", str(seed)]
    with (workplace / "fuzz.log").open("wb") as log:
        fuzz = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=workplace)
    clients = []
    for name in ("a", "b"):
        write_faces(workplace / name, 60, "clinic", "face")
        command = ["maskdm-client", "--data", name, "--kit", f"kits/{name}.zip", "--out", f"site-{name}"]
        clients.append(Started(command, workplace, f"client-{name}"))
    memory = 0

    def is_over() -> bool:
        nonlocal memory
        memory = max(memory, resident(workplace))
        return fuzz.poll() is not None and server.process.poll() is not None

    wait_until(is_over, lambda: server.output())
    said = (workplace / "fuzz.log").read_text()
    assert fuzz.wait(DEADLINE) == 0, said
    assert server.wait() == 0, server.output()
    for client in clients:
        assert client.wait() == 0, client.output()
    assert "unexpectedly" not in server.output(), "no process of the server's died"
    rounds = read_lines(workplace / "fed" / "rounds.jsonl")
    assert [line["round"] for line in rounds] == list(range(1, ROUNDS + 1))
    assert all(line["clients"] == 2 for line in rounds), "nothing that an honest site sent was lost"
    assert load_checkpoint(workplace / "fed" / "model.safetensors")[1].rounds == ROUNDS
    tried = json.loads(said.splitlines()[-1])
    for what in ("malformed", "large head", "connection", "slow body", "question"):
        assert tried.get(what), f"{what} was not tried: {tried}"
    assert any("signed: <Response [403" in what for what in tried), f"no question's objects were named: {tried}"
    assert 0 < memory < MOST_MEMORY
    logged = (workplace / "fed" / "logs" / "superlink.log").stat().st_size
    assert logged < MOST_LOG


def resident(workplace: Path) -> int:
    """Kilobytes that the SuperLink has in memory."""
    found = [0]
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status = (folder / "status").read_text()
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if b"maskdm_server.door.door" in command and str(workplace).encode() in command:
            found += [int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:")]
    return max(found)
