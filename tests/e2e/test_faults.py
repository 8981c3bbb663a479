"""What dies, freezes or lies does not end a federation: real processes, killed for real.

The whole table, with figures, is made by benchmarks/faults.py.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from maskdm.run.processes import free_port
from maskdm.run.runfolder import read_lines
from maskdm.training.checkpoint import load_checkpoint

from .conftest import DEADLINE, RecordingProxy, Started, processes_with, wait_until, write_faces

pytestmark = pytest.mark.slow

ATTACKS = ("nan", "key", "parts", "bomb")
HOSTILE = Path(__file__).parents[2] / "benchmarks" / "hostile.py"


def federation(
    workplace: Path, prior: Path, rounds: int, *options: str, through: Callable[[int], int] | None = None
) -> tuple[Started, list[Started], int]:
    """A server and two clients at work; the images, and so a round, take a few seconds.

    Args:
        through: what stands before the server's port, once that listens; returns the port for the first client.
    """
    for site in ("a", "b"):
        write_faces(workplace / f"local-{site}", 90, "clinic", "face")
    port = free_port()
    serve = ["maskdm-server", "serve", "--prior", str(prior), "--out", "fed", "--insecure", "--port", str(port)]
    server = Started([*serve, "--rounds", str(rounds), "--round-deadline", "20", *options], workplace, "serve")
    if through:
        server.until("listening on")
    clients = [join(workplace, "a", through(port) if through else port), join(workplace, "b", port)]
    return server, clients, port


def join(workplace: Path, site: str, port: int, name: str = "") -> Started:
    command = ["maskdm-client", "--data", f"local-{site}", "--server", f"127.0.0.1:{port}", "--out", f"site-{site}"]
    return Started(command, workplace, name or f"client-{site}")


def pid_of(text: str, folder: Path) -> int:
    """The youngest process with `text` in its command line and `folder` in its command line or environment."""
    found: list[int] = []

    def look() -> bool:
        found[:] = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                command = (entry / "cmdline").read_bytes()
                around = (entry / "environ").read_bytes()
            except OSError:
                continue
            if text.encode() in command and str(folder).encode() in command + around and b"guard.py" not in command:
                found.append(int(entry.name))
        return bool(found)

    wait_until(look, lambda: text)
    return max(found)


def rounds_done(workplace: Path) -> int:
    return len(read_lines(workplace / "fed" / "rounds.jsonl"))


def training_in(workplace: Path, site: str, number: int) -> bool:
    events = read_lines(workplace / f"site-{site}" / "events.jsonl")
    return any(event["event"] == "training" and event["round"] >= number for event in events)


def check_whole(
    workplace: Path, server: Started, clients: list[Started], rounds: int, all_answered: bool = True
) -> None:
    """Everybody ended well, every round was done once, the model is whole, nothing is left.

    Args:
        all_answered: no ClientApp died of what was done to its neighbours.
    """
    assert server.wait() == 0, server.output()
    for client in clients:
        assert client.wait() == 0, client.output()
        assert not all_answered or "ended without an answer" not in client.output()
    wait_until(lambda: not processes_with(str(workplace)), lambda: str(processes_with(str(workplace))))
    assert [line["round"] for line in read_lines(workplace / "fed" / "rounds.jsonl")] == list(range(1, rounds + 1))
    assert load_checkpoint(workplace / "fed" / "model.safetensors")[1].rounds == rounds
    result = json.loads((workplace / "fed" / "result.json").read_text())
    assert result["loss_final"] < result["loss_prior"]


def test_a_federation_outlives_the_deaths_of_its_processes_one_after_another(workplace: Path, prior: Path) -> None:
    server, clients, _ = federation(workplace, prior, 7)
    site = workplace / "site-a"
    victims = [
        ("maskdm_client.agent.worker", site),
        ("flwr-serverapp", workplace / "fed"),
        ("maskdm_server.door.door", workplace / "fed"),
        ("maskdm_client.flower.pinned\0superexec", site),
        ("maskdm_client.flower.pinned\0supernode", site),
    ]
    for number, (process, folder) in enumerate(victims, start=1):
        wait_until(lambda n=number: training_in(workplace, "a", n), server.output)  # type: ignore[misc]
        os.kill(pid_of(process, folder), signal.SIGKILL)
        wait_until(lambda n=number: rounds_done(workplace) >= n, server.output)  # type: ignore[misc]
    check_whole(workplace, server, clients, 7, all_answered=False)
    asked = [e["exchange"] for e in read_lines(workplace / "fed" / "events.jsonl") if e["event"] == "sent"]
    assert len(set(asked)) <= 7 + 1 + len(victims), "a death costs at most the round in progress"


def test_a_server_that_was_killed_is_taken_up_by_the_clients_that_kept_working(workplace: Path, prior: Path) -> None:
    server, clients, port = federation(workplace, prior, 3)
    wait_until(lambda: rounds_done(workplace) >= 1 and training_in(workplace, "a", 2), server.output)
    server.kill()
    wait_until(
        lambda: not any("maskdm_server.door.door" in line for line in processes_with(str(workplace))),
        lambda: "the SuperLink lives on",
    )
    again = ["maskdm-server", "serve", "--prior", str(prior), "--out", "fed", "--insecure", "--port", str(port)]
    server = Started([*again, "--rounds", "3", "--round-deadline", "20"], workplace, "serve-again")
    check_whole(workplace, server, clients, 3)
    assert "going on at" in clients[0].output() or len(read_lines(workplace / "site-a" / "audit.jsonl")) >= 8


def test_a_client_that_was_killed_comes_back_in_the_middle_of_the_round(workplace: Path, prior: Path) -> None:
    server, clients, port = federation(workplace, prior, 2, "--min-replies", "2")
    wait_until(lambda: training_in(workplace, "a", 1), server.output)
    clients[0].kill()
    clients[0] = join(workplace, "a", port, "client-a-again")
    check_whole(workplace, server, clients, 2)


def test_a_plan_that_is_lost_on_its_way_is_sent_again_in_the_same_round(workplace: Path, prior: Path) -> None:
    """The SuperLink hands it out once, and the connection breaks before it is there."""
    proxies = list[RecordingProxy]()

    def proxy(port: int) -> int:
        proxies.append(RecordingProxy(port, lose="/v1/fleet/pull-messages"))
        return proxies[0].port

    options = ["--min-replies", "2", "--round-deadline", "45"]  # asked again after 30
    server, clients, _ = federation(workplace, prior, 1, *options, through=proxy)
    check_whole(workplace, server, clients, 1)
    assert proxies[0].has_lost
    said = [line["verdict"] for line in read_lines(workplace / "fed" / "audit.jsonl")]
    assert said.count("sent: train") == 2 + 1
    assert said.count("unknown") == 1
    (line,) = read_lines(workplace / "fed" / "rounds.jsonl")
    assert (line["clients"], line["silent"], line["attempts"]) == (2, 0, 1)


def test_hostile_nodes_change_nothing_and_are_named(workplace: Path, prior: Path) -> None:
    everybody = ["--min-clients", str(2 + len(ATTACKS)), "--round-deadline", "120"]  # nobody is given up for silent
    server, clients, port = federation(workplace, prior, 2, "--min-replies", "2", *everybody)
    server.until("listening on")
    with ExitStack() as nodes:
        for attack in ATTACKS:
            log = nodes.enter_context((workplace / f"hostile-{attack}.log").open("wb"))
            command = [sys.executable, str(HOSTILE), f"127.0.0.1:{port}", attack]
            node = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=workplace)
            nodes.callback(node.wait, DEADLINE)
            nodes.callback(node.kill)
        check_whole(workplace, server, clients, 2)
    lines = read_lines(workplace / "fed" / "rounds.jsonl")
    assert all(line["clients"] == 2 for line in lines)
    assert lines[0]["rejected"] == len(ATTACKS)
    assert server.output().count("was rejected") >= len(ATTACKS)
