"""Hosts of their own, as network namespaces: a server and two sites with nothing between them but a cable each."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from maskdm.federated.policy import UNATTENDED
from maskdm.run.runfolder import read_lines
from maskdm_server.kits.provision import provision

from .conftest import Started, write_faces

pytestmark = pytest.mark.slow

HOSTS = {"server": "10.77.0.1", "hospital-a": "10.77.0.2", "hospital-b": "10.77.0.3"}


def ip(*arguments: str) -> None:
    done = subprocess.run(("ip", *arguments), capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"


@pytest.fixture
def network(workplace: Path) -> Iterator[dict[str, str]]:
    """Name → namespace; a switch joins them, and nothing else does."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and iproute2")
    number = os.getpid() % 100_000
    switch, names = f"mdm{number}-switch", {name: f"mdm{number}-{name}" for name in HOSTS}
    if subprocess.run(("ip", "netns", "add", switch), capture_output=True).returncode:
        pytest.skip("this machine makes no network namespaces")
    try:
        ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        ip("-n", switch, "link", "set", "bridge", "up")
        for place, (name, address) in enumerate(HOSTS.items()):
            ip("netns", "add", names[name])
            ip(
                "-n",
                switch,
                "link",
                "add",
                f"port{place}",
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                names[name],
            )
            ip("-n", switch, "link", "set", f"port{place}", "master", "bridge", "up")
            ip("-n", names[name], "address", "add", f"{address}/24", "dev", "eth0")
            ip("-n", names[name], "link", "set", "eth0", "up")
            ip("-n", names[name], "link", "set", "lo", "up")
        yield names
    finally:
        for namespace in (*names.values(), switch):
            subprocess.run(("ip", "netns", "delete", namespace), capture_output=True)


def test_sites_on_hosts_of_their_own_join_with_a_kit_and_finish(
    workplace: Path, prior: Path, network: dict[str, str]
) -> None:
    provision(workplace / "kits", "10.77.0.1:8000", ["hospital-a", "hospital-b"], policy=UNATTENDED.encode())
    command = ["maskdm-server", "serve", "--prior", str(prior), "--out", "fed", "--tls", "kits/server", "--rounds", "2"]
    server = Started(command, workplace, "serve", within=network["server"])
    clients = {}
    for name in ("hospital-a", "hospital-b"):
        write_faces(workplace / name / "local", 90, "clinic", "face")
        shutil.move(workplace / "kits" / f"{name}.zip", workplace / name)  # all that the site is given
        join = ["maskdm-client", "--data", "./local", "--kit", f"{name}.zip"]
        clients[name] = Started(join, workplace / name, "client", within=network[name])
    assert server.wait() == 0, server.output() + "".join(client.output() for client in clients.values())
    for name, client in clients.items():
        assert client.wait() == 0, client.output()
        assert (workplace / name / "maskdm-site" / "model.safetensors").exists()
    rounds = read_lines(workplace / "fed" / "rounds.jsonl")
    assert [(line["round"], line["clients"]) for line in rounds] == [(1, 2), (2, 2)]
