"""`maskdm-client doctor` at a real server: what it may ask, and that nobody is disturbed by it."""

import json
from pathlib import Path

import pytest

from maskdm.federated.kit import open_kit
from maskdm.run.processes import free_port
from maskdm.run.runfolder import read_lines
from maskdm_client.doctor.node_key import node_key
from maskdm_server.kits.provision import provision, revoke

from .conftest import Started, make_kits, write_faces

pytestmark = pytest.mark.slow
WAY = ("name resolution", "connection", "clock", "node key")


def doctor(folder: Path, name: str, kit: str) -> tuple[int, dict[str, dict[str, object]], str]:
    """Exit code, checks by name, all that was said."""
    command = ["maskdm-client", "doctor", "--data", "./local", "--kit", kit, "--out", name, "--json", f"{name}.json"]
    started = Started([*command, "--prior", "prior.safetensors"], folder, name)
    code = started.wait()
    found = {check["check"]: check for check in json.loads((folder / f"{name}.json").read_text())}
    return code, found, started.output()


def test_doctor_knows_who_would_be_let_in_and_disturbs_nobody(workplace: Path, prior: Path) -> None:
    write_faces(workplace / "local", 150, "public", "face")
    (workplace / "prior.safetensors").write_bytes(prior.read_bytes())
    port = free_port()
    kits = make_kits(workplace / "kits", port, "hospital-a", "leaver")
    (workplace / "leaver.zip").write_bytes((kits / "leaver.zip").read_bytes())
    serve = ["maskdm-server", "serve", "--prior", str(prior), "--out", "fed", "--tls", "kits/server"]
    server = Started([*serve, "--rounds", "4", "--min-clients", "1", "--host", "127.0.0.1"], workplace, "serve")
    server.until("0 of 1 clients")

    for name, kit in (("a", "kits/hospital-a.zip"), ("leaver", "leaver.zip")):
        code, found, said = doctor(workplace, name, kit)
        assert [found[check]["ok"] for check in WAY] == [True] * 4, said
        assert (code, [check for check in found.values() if not check["ok"]]) == (0, []), said

    revoke(kits, "leaver")
    server.until("leaver is let in no more")
    code, found, said = doctor(workplace, "revoked", "leaver.zip")
    assert (code, [name for name, check in found.items() if not check["ok"]]) == (1, ["node key"]), said
    assert "revoked" in str(found["node key"]["found"])

    # Another authority's kit for the same address.
    (foreign,) = provision(workplace / "foreign", f"127.0.0.1:{port}", ["hospital-a"], policy=b"")
    code, found, said = doctor(workplace, "foreign", str(foreign))
    assert (code, found["connection"]["ok"], found["node key"]["ok"]) == (1, False, None), said

    # Nobody counted as there, so nothing was sent; who was examined joins at once, and may be examined at work too.
    assert not [event for event in read_lines(workplace / "fed" / "events.jsonl") if event["event"] == "sent"]
    client = Started(["maskdm-client", "--data", "local", "--kit", "kits/hospital-a.zip"], workplace, "client")
    server.until("round 1/4: held-out")
    check = node_key("127.0.0.1", port, open_kit(kits / "hospital-a.zip", workplace / "opened"))
    assert check.ok, check
    assert server.wait() == 0, server.output() + client.output()
    assert client.wait() == 0, client.output()
    assert "WARNING" not in server.output() + client.output()
    assert [done["clients"] for done in read_lines(workplace / "fed" / "rounds.jsonl")] == [1] * 4
