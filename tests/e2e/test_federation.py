"""The README's story with real processes: pretrain, serve, two clients; and what happens when someone stops or dies."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from maskdm.federated.parcel import REPORT_NAMES, Outcome
from maskdm.networks.trainable import expected_shapes
from maskdm.run.processes import free_port
from maskdm.run.runfolder import read_lines, sha256_of
from maskdm.training.checkpoint import load_checkpoint

from .conftest import RecordingProxy, Started, documented, processes_with, wait_until, write_faces

pytestmark = pytest.mark.slow


def with_port(command: list[str], port: int) -> list[str]:
    return [part.replace(":8000", f":{port}") for part in command]


def alone(prior: Path, port: int) -> tuple[list[str], list[str]]:
    """Commands of a server that is content with one client, and of that client."""
    serve = ["maskdm-server", "serve", "--prior", str(prior), "--out", "fed", "--min-clients", "1"]
    serve += ["--insecure", "--port", str(port)]
    return serve, ["maskdm-client", "--data", "./local", "--server", f"127.0.0.1:{port}", "--out", "site"]


def test_the_readme_story_trains_a_federated_model_and_only_listed_names_leave_a_client(workplace: Path) -> None:
    write_faces(workplace / "public" / "nested", 400, "public", "face")
    secret = "SMITH-1961-ward7"
    write_faces(workplace / "local" / "DIAGNOSIS-positive", 120, "clinic", secret)
    write_faces(workplace / "other", 120, "workshop", "other")
    pretrain, provision, serve, client, approve = documented("story")
    port = free_port()
    for command, name in ((pretrain, "pretrain"), (with_port(provision, port), "provision")):
        run = Started(command, workplace, name)
        assert run.wait() == 0, run.output()
    server = Started(serve, workplace, "serve", MASKDM_MIN_CLIENTS="2")
    server.until("listening on")
    proxy = RecordingProxy(port, workplace / "kits" / "server")
    first = Started(client, workplace, "first", MASKDM_OUT="site-a", MASKDM_SERVER=f"127.0.0.1:{proxy.port}")
    other = ["maskdm-client", "--data", "./other", "--kit", "kits/hospital-b.zip", "--out", "site-b"]
    second = Started(other, workplace, "second")
    for joined, name in ((first, "site-a"), (second, "site-b")):
        joined.until("waits for your approval")
        approved = Started(approve, workplace, f"approve-{name}", MASKDM_OUT=name)
        assert approved.wait() == 0, approved.output()
    assert server.wait() == 0, server.output() + first.output()
    assert first.wait() == 0, first.output()
    assert second.wait() == 0, second.output()
    proxy.close()
    wait_until(lambda: not processes_with(str(workplace)), lambda: str(processes_with(str(workplace))))

    federation = workplace / "federation"
    prior, metadata = load_checkpoint(federation / "prior.safetensors")
    model, after = load_checkpoint(federation / "model.safetensors")
    assert any(not prior[name].equal(model[name]) for name in prior)
    assert after.rounds == 2
    assert after.prior_sha256 == sha256_of(federation / "prior.safetensors")
    rounds = read_lines(federation / "rounds.jsonl")
    wanted = {
        *("round", "clients", "examples", "loss_before", "loss_after"),
        *("bytes_down", "bytes_up", "seconds", "rejected"),
    }
    assert [line["round"] for line in rounds] == [1, 2]
    assert all(wanted <= line.keys() and line["clients"] == 2 and line["rejected"] == 0 for line in rounds)
    result = json.loads((federation / "result.json").read_text())
    assert result["loss_final"] < result["loss_prior"]
    for name in ("config.json", "samples/before.png", "samples/after.png", "rounds"):
        assert (federation / name).exists(), name

    site = workplace / "site-a"
    left = [line for line in read_lines(site / "audit.jsonl") if line["verdict"] == "released"]
    released = [line for line in left if line["scalars"]["outcome"] == Outcome.DONE]
    assert all(line["scalars"]["outcome"] in (Outcome.DONE, Outcome.WORKING) for line in left)
    names = set(expected_shapes(metadata.model))
    assert [set(line["arrays"]) for line in released] == [names, names, set()]
    assert all(set(line["scalars"]) == set(REPORT_NAMES) for line in released)
    assert load_checkpoint(site / "model.safetensors")[0].keys() == names
    sent = bytes(proxy.sent)
    assert len(sent) > sum(line["bytes"] for line in released), "the proxy saw less than the audit log"
    for private in (secret, "DIAGNOSIS", str(workplace), "slice.json"):
        assert private.encode() not in sent, f"{private} left the site"
    assert "INSECURE" not in server.output() + first.output()


def test_a_client_gives_up_with_a_message_when_no_server_comes(workplace: Path) -> None:
    write_faces(workplace / "local", 90, "clinic", "face")
    port = free_port()
    command = ["maskdm-client", "--data", "./local", "--server", f"127.0.0.1:{port}", "--wait", "1"]
    client = Started(command, workplace, "client")
    assert client.wait() == 1
    assert f"no server at 127.0.0.1:{port}; trying for 1 s" in client.output()
    assert "--wait" in client.output().splitlines()[-1]


def test_interrupted_server_and_client_end_with_130_and_leave_no_process_and_the_same_commands_continue(
    workplace: Path, prior: Path
) -> None:
    write_faces(workplace / "local", 90, "clinic", "face")
    port = free_port()
    serve, join = alone(prior, port)
    server = Started([*serve, "--rounds", "50"], workplace, "serve")
    client = Started(join, workplace, "client")
    server.until("round 1/50: held-out")
    assert server.interrupt() == 130, server.output()
    assert client.interrupt() == 130, client.output()
    wait_until(lambda: not processes_with(str(workplace)), lambda: str(processes_with(str(workplace))))
    done = len(read_lines(workplace / "fed" / "rounds.jsonl"))
    assert done >= 1
    more = str(done + 1)
    after = workplace / "fed" / "samples" / "after.png"
    after.write_bytes(b"samples of a model with fewer rounds")
    server = Started([*serve, "--rounds", more], workplace, "serve-again")
    client = Started(join, workplace, "client-again")
    assert server.wait() == 0, server.output()
    assert client.wait() == 0, client.output()
    assert [line["round"] for line in read_lines(workplace / "fed" / "rounds.jsonl")] == list(range(1, done + 2))
    with Image.open(after) as drawn, Image.open(after.with_name("before.png")) as before:
        assert drawn.size == before.size


def test_nothing_survives_when_server_and_client_are_killed(workplace: Path, prior: Path) -> None:
    write_faces(workplace / "local", 90, "clinic", "face")
    port = free_port()
    serve, join = alone(prior, port)
    server = Started([*serve, "--rounds", "50"], workplace, "serve")
    client = Started(join, workplace, "client")
    server.until("clients at work")
    assert any("maskdm_server.door.door" in line for line in processes_with(str(workplace)))
    client.kill()
    server.kill()
    wait_until(lambda: not processes_with(str(workplace)), lambda: str(processes_with(str(workplace))))


def test_colour_images_for_a_grey_prior_end_the_client_with_one_clear_line(workplace: Path) -> None:
    write_faces(workplace / "public", 90, "public", "face")
    write_faces(workplace / "local", 90, "clinic", "face")
    command = ["maskdm-server", "pretrain", "--data", "./public", "--out", "run", "--channels", "3", "--images", "64"]
    assert Started(command, workplace, "pretrain").wait() == 0
    grey = workplace / "grey"
    grey.mkdir()
    for path in sorted((workplace / "public").iterdir()):
        Image.open(path).convert("L").save(grey / path.name)
    command = ["maskdm-server", "pretrain", "--data", "./grey", "--out", "grey-run", "--images", "64"]
    assert Started(command, workplace, "pretrain-grey").wait() == 0
    port = free_port()
    serve, join = alone(Path("grey-run/prior.safetensors"), port)
    server = Started(serve, workplace, "serve")
    server.until("listening on")
    client = Started(join, workplace, "client")
    assert client.wait() == 2, client.output()
    assert "colour images" in client.output().splitlines()[-1]
    server.interrupt()


def test_the_readme_commands_simulate_a_federation_and_sample_its_model(workplace: Path, prior: Path) -> None:
    (workplace / "prior").mkdir()
    shutil.copy(prior, workplace / "prior" / "prior.safetensors")
    for label in ("masks", "hats"):
        write_faces(workplace / "local" / label, 90, "clinic" if label == "masks" else "workshop", "face")
    (simulate,) = documented("simulate")
    run = Started([*simulate, "--rounds", "1", "--local-images", "64"], workplace, "simulate")
    assert run.wait() == 0, run.output()
    assert len(list((workplace / "federation" / "sites").glob("*/client/audit.jsonl"))) == 3
    for command in documented("sample"):
        run = Started(command, workplace, command[1])
        assert run.wait() == 0, run.output()
    assert "federation is finished" in (workplace / "federation" / "report.html").read_text()
    with Image.open(workplace / "grid.png") as grid:
        assert grid.getextrema() != ((255, 255),) * 3
