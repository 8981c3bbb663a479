"""Who is let in, what code runs at a site, what an outsider with the port can do, and whom our processes call."""

import json
import ssl
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from maskdm.federated.parcel import Outcome
from maskdm.run.processes import free_port
from maskdm.run.runfolder import read_lines
from maskdm_server.kits.provision import revoke

from .conftest import Started, make_kits, processes_with, wait_until, write_faces

pytestmark = pytest.mark.slow

# A coordinator that wants to run code of its own at its sites; the bundle is whole and well made.
HOSTILE = """
import hashlib, sys, zipfile
from io import BytesIO
import maskdm_server.flower.control as control
from maskdm.federated.bundle import source
from maskdm_server.__main__ import main

project = (source() / "pyproject.toml").read_text().replace("maskdm_client.flower.client_app:app", "evil:app").encode()
evil = b"open('EVIL', 'w').close()\\n"
packed = BytesIO()
with zipfile.ZipFile(packed, "w") as file:
    content = []
    for name, written in (("pyproject.toml", project), ("evil.py", evil)):
        file.writestr(name, written)
        content.append(f"{name},{hashlib.sha256(written).hexdigest()},{8 * len(written)}")
    file.writestr(".info/CONTENT", "\\n".join(content))
control.bundle = lambda name: packed.getvalue()
control.bundle_sha256 = lambda name: hashlib.sha256(packed.getvalue()).hexdigest()
sys.exit(main())
"""


def status(url: str, authority: Path | None = None, body: bytes | None = None) -> int:
    """Of the answer to a request, as anybody may send it."""
    context = ssl.create_default_context(cafile=str(authority)) if authority else None
    headers = {"content-type": "application/protobuf", "authorization": "Bearer guessed"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=60, context=context) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_only_those_who_were_given_a_kit_of_this_server_are_let_in(workplace: Path, prior: Path) -> None:
    write_faces(workplace / "local", 90, "clinic", "face")
    port = free_port()
    kits = make_kits(workplace / "kits", port, "hospital-a", "revoked", "leaver")
    foreign = make_kits(workplace / "foreign", port, "hospital-a")
    (workplace / "revoked.zip").write_bytes((kits / "revoked.zip").read_bytes())
    revoke(kits, "revoked")
    server = Started(
        [
            *("maskdm-server", "serve", "--prior", str(prior), "--out", "fed", "--tls", "kits/server"),
            *("--rounds", "1", "--min-clients", "1", "--host", "127.0.0.1"),
        ],
        workplace,
        "serve",
    )
    server.until("listening on")

    # What an outsider with the port can do: ask whether it is well.
    address, authority = f"https://127.0.0.1:{port}", kits / "server" / "ca.crt"
    wait_until(lambda: status(f"{address}/health", authority) == 200)
    for path in (
        "/v1/control/start-run",
        "/v1/control/list-runs",
        "/v1/runtime/pull-messages",
        "/docs",
        "/openapi.json",
    ):
        assert status(f"{address}{path}", authority, b"\x0a\x00") == 404, path
        assert status(f"{address}{path}", authority) == 404, path
    for path in (
        "activate-node",
        "pull-messages",
        "push-messages",
        "pull-object",
        "get-fab",
        "get-run",
    ):
        assert status(f"{address}/v1/fleet/{path}", authority, b"") == 401, path
        assert status(f"{address}/v1/fleet/{path}%0A", authority, b"") == 404, path
    assert status(f"{address}/v1/fleet/register-node", authority, b"") == 404, "who has a key is registered by it"
    with pytest.raises(urllib.error.URLError):
        status(f"{address}/health", foreign / "server" / "ca.crt")
    with pytest.raises((urllib.error.URLError, OSError)):
        status(f"http://127.0.0.1:{port}/health")

    join = ["maskdm-client", "--data", "./local"]
    outsiders = {
        "stranger": ["--kit", str(foreign / "hospital-a.zip")],
        "revoked": ["--kit", "revoked.zip"],
        "keyless": ["--server", f"127.0.0.1:{port}"],
    }
    started = {
        name: Started([*join, *how, "--out", f"site-{name}"], workplace, name) for name, how in outsiders.items()
    }
    for name in ("stranger", "revoked"):
        started[name].until("was lost")
    log = workplace / "site-keyless" / "logs" / "supernode.log"
    wait_until(lambda: log.exists() and b"retrying" in log.read_bytes().lower(), lambda: str(log.exists()))
    for name, client in started.items():
        assert client.interrupt() == 130, client.output()
        assert not (workplace / f"site-{name}" / "audit.jsonl").exists(), f"{name} was sent something"
        assert "joined" not in client.output()
    assert "0 of 1 clients" in server.output()

    client = Started([*join, "--kit", "kits/hospital-a.zip", "--out", "site"], workplace, "client")
    assert server.wait() == 0, server.output() + client.output()
    assert client.wait() == 0, client.output()
    assert "WARNING" not in server.output() + client.output()
    sites = {event["site"] for event in read_lines(workplace / "fed" / "events.jsonl") if "site" in event}
    assert sites <= {"hospital-a"}, "the events know sites by the names of their kits"


def test_a_site_that_is_revoked_while_it_works_is_put_out_and_the_others_go_on(workplace: Path, prior: Path) -> None:
    port = free_port()
    kits = make_kits(workplace / "kits", port, "stays", "leaves")
    for name in ("stays", "leaves"):
        write_faces(workplace / name, 90, "clinic", "face")
    command = ["maskdm-server", "serve", "--prior", str(prior), "--out", "fed", "--tls", "kits/server"]
    server = Started([*command, "--rounds", "4", "--host", "127.0.0.1"], workplace, "serve")
    clients = {
        name: Started(
            ["maskdm-client", "--data", name, "--kit", f"kits/{name}.zip", "--out", f"site-{name}"], workplace, name
        )
        for name in ("stays", "leaves")
    }
    server.until("round 1/4: held-out")
    revoke(kits, "leaves")
    server.until("leaves is let in no more")
    clients["leaves"].until("was lost")
    assert server.wait() == 0, server.output()
    assert clients["stays"].wait() == 0, clients["stays"].output()
    assert clients["leaves"].interrupt() == 130
    rounds = read_lines(workplace / "fed" / "rounds.jsonl")
    assert rounds[0]["clients"] == 2
    assert rounds[-1]["clients"] == 1


def test_a_hostile_server_cannot_run_its_code_at_a_site(workplace: Path, prior: Path) -> None:
    write_faces(workplace / "local", 90, "clinic", "face")
    (workplace / "hostile.py").write_text(HOSTILE)
    port = free_port()
    server = Started(
        [
            *(Path(sys.executable).name, "hostile.py", "serve", "--prior", str(prior), "--out", "fed", "--insecure"),
            *("--port", str(port), "--min-clients", "1", "--rounds", "1"),
        ],
        workplace,
        "serve",
    )
    client = Started(["maskdm-client", "--data", "local", "--server", f"127.0.0.1:{port}"], workplace, "client")
    assert server.wait() == 1, server.output()
    assert "CODE_REFUSED" in server.output() or "other code" in server.output()
    client.until("neither kit nor policy allows")
    assert client.interrupt() == 130
    site = workplace / "maskdm-site"
    left = [line for line in read_lines(site / "audit.jsonl") if line["direction"] == "out"]
    assert left
    assert all(line["scalars"]["outcome"] == Outcome.CODE_REFUSED and not line["arrays"] for line in left)
    assert not list(workplace.rglob("EVIL"))
    assert not list(site.rglob("evil*")), "it was unpacked"
    assert not (site / ".flwr" / "apps").exists(), "it was unpacked"


def test_server_and_clients_call_nobody_but_each_other(workplace: Path, prior: Path) -> None:
    """Every connection that any of their processes tries, seen by the kernel's tracer."""
    traced = [
        "strace",
        "-f",
        "-qq",
        "--seccomp-bpf",
        "-e",
        "trace=connect,sendto,sendmsg,sendmmsg",
        "-e",
        "signal=none",
    ]
    write_faces(workplace / "local", 90, "clinic", "face")
    port = free_port()
    make_kits(workplace / "kits", port, "hospital-a")
    programs = Path(sys.executable).parent
    server = Started(
        [
            *(*traced, "-o", "server.trace", str(programs / "maskdm-server"), "serve", "--prior", str(prior)),
            *("--out", "fed", "--tls", "kits/server", "--host", "127.0.0.1", "--min-clients", "1", "--rounds", "1"),
        ],
        workplace,
        "serve",
    )
    client = Started(
        [
            *(*traced, "-o", "client.trace", str(programs / "maskdm-client"), "--data", "local"),
            *("--kit", "kits/hospital-a.zip"),
        ],
        workplace,
        "client",
    )
    assert server.wait() == 0, server.output() + client.output()
    assert client.wait() == 0, client.output()
    wait_until(lambda: not processes_with(str(workplace)), lambda: str(processes_with(str(workplace))))
    for name in ("server.trace", "client.trace"):
        lines = [line for line in (workplace / name).read_text().splitlines() if "sa_family=AF_INET" in line]
        assert lines, "the tracer sees the connections to each other"
        elsewhere = [line for line in lines if "127.0.0.1" not in line and '"::1"' not in line]
        assert not elsewhere, f"{name}: {json.dumps(elsewhere[:5], indent=1)}"
