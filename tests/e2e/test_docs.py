"""The tutorial and the how-to pages with real processes: their commands as a reader types them, on fewer images."""

import json
import shutil
import tomllib
from pathlib import Path

import pytest
from PIL import Image

from maskdm.federated.kit import POLICY, open_kit
from maskdm.federated.policy import TEMPLATE, load_policy
from maskdm.run.processes import free_port
from maskdm.run.runfolder import read_lines
from maskdm.training.checkpoint import load_checkpoint
from maskdm_server.federation.settings import FederationConfig

from .conftest import SMALL, Started, documented, documented_file, make_kits, write_faces

pytestmark = pytest.mark.slow

TUTORIAL, RESUME, SITE = "docs/tutorial.md", "docs/how-to/resume.md", "docs/how-to/join-as-a-site.md"
SIZE = {"MASKDM_IMAGE_SIZE": "32"}  # as the tutorial packs them
GENTLE = {"MASKDM_LR": "2e-4"}  # a prior of seconds is soon spoilt
FEWER = {"6000": "300", "1600": "400", "36": "4"}


class Reader:
    """Somebody who follows the pages in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port, self._count = folder, free_port(), 0

    def start(self, command: list[str]) -> Started:
        self._count += 1
        smaller = [FEWER.get(part, part).replace(":8000", f":{self.port}") for part in command]
        return Started(smaller, self.folder, f"{self._count:02}", **SIZE, **(GENTLE if "serve" in command else {}))

    def do(self, name: str, page: str = TUTORIAL) -> str:
        """Type what a block says, one line after another; returns what they printed."""
        printed = ""
        for command in documented(name, page):
            done = self.start(command)
            assert done.wait() == 0, f"{' '.join(command)}\n{done.output()}"
            printed += done.output()
        return printed

    def federate(self, serve: list[str]) -> str:
        """A server, and all sites beside it; returns what the server said."""
        server = self.start(serve)
        server.until("listening on")
        sites = [self.start(command) for command in documented("join", TUTORIAL)]
        assert server.wait() == 0, server.output() + "".join(site.output() for site in sites)
        for site in sites:
            assert site.wait() == 0, site.output()
        return server.output()


def updates_out(site: Path) -> list[int]:
    """Rounds whose update the gate let out."""
    lines = read_lines(site / "audit.jsonl")
    out = [line for line in lines if line["direction"] == "out" and line["verdict"] == "released"]
    return [line["round"] for line in out if line.get("arrays")]


@pytest.fixture
def reader(workplace: Path) -> Reader:
    return Reader(workplace)


def test_the_tutorial_leads_from_images_to_a_federation_of_three_sites_that_goes_on_and_is_backed_up(
    reader: Reader,
) -> None:
    folder = reader.folder
    reader.do("draw")
    reader.do("prepare")
    with Image.open(folder / "corpus" / "contact-sheet.png") as sheet:
        assert sheet.getextrema() != ((255, 255),) * 3
    documented_file("prior.toml", TUTORIAL, folder)
    resolved = json.loads(reader.do("dry-run"))
    assert resolved["model"]["image_size"] == 32
    assert not (folder / "prior").exists()
    reader.do("pretrain")
    losses = [line["loss"] for line in read_lines(folder / "prior" / "metrics.jsonl")]
    assert losses[-1] < losses[0]
    reader.do("sample")
    assert "authority: SHA-256" in reader.do("provision")
    documented_file("federation.toml", TUTORIAL, folder)
    (serve,) = documented("serve", TUTORIAL)
    waiting = reader.start(serve)
    waiting.until("of 3 clients are there; waiting")
    assert "nothing is red" in reader.do("doctor")
    assert waiting.interrupt() == 130, waiting.output()

    said = reader.federate(serve)
    result = json.loads((folder / "federation" / "result.json").read_text())
    assert (result["rounds"], result["clients"]) == (int(SMALL["MASKDM_ROUNDS"]), 3)
    assert result["loss_final"] < result["loss_prior"]
    assert "held-out loss: prior" in said
    printed = reader.do("results")
    assert "whole: site-a/audit.jsonl" in printed
    assert "released (DONE, 9 numbers" in printed
    assert (folder / "federation" / "report.html").exists()

    reader.do("backup", RESUME)
    assert load_checkpoint(folder / "federation-backup" / "model.safetensors")[1].rounds == 2
    (more,) = documented("more-rounds", RESUME)
    assert more[-2] == "--rounds"
    reader.federate([*more[:-1], "3"])
    assert load_checkpoint(folder / "federation" / "model.safetensors")[1].rounds == 3


def test_the_tutorials_prior_is_what_its_text_says(workplace: Path, reader: Reader) -> None:
    documented_file("prior.toml", TUTORIAL, workplace)
    written = tomllib.loads((workplace / "prior.toml").read_text())
    write_faces(workplace / "public", 40, "public", "face")
    command = ["maskdm-server", "pretrain", "--data", "public", "--out", "prior", "--config", "prior.toml", "--dry-run"]
    command += ["--image-size", "32"]
    for key, value in written.items():  # over what makes the tests small
        command += [f"--{key}", str(value)]
    done = reader.start(command)
    assert done.wait() == 0, done.output()
    stage = json.loads(done.output())["stages"]["1"]
    assert (stage["mask"]["effective_ratio"], stage["mask"]["visible"]) == (0.75, 16)
    assert stage["training"]["images"] == 100_000


def test_the_tutorials_federation_is_one_that_can_be(workplace: Path) -> None:
    documented_file("federation.toml", TUTORIAL, workplace)
    written = tomllib.loads((workplace / "federation.toml").read_text())
    values = {key.replace("-", "_"): value for key, value in written.items()} | {"local_images": 1000}
    FederationConfig.model_validate({**values, "prior_sha256": "0" * 64, "federation": "0" * 16})


def test_a_site_that_follows_its_page_takes_its_policy_out_and_approves_before_anything_leaves(
    workplace: Path, prior: Path
) -> None:
    """`docs/how-to/join-as-a-site.md`, with a server that is content with one site."""
    port = free_port()
    make_kits(workplace / "kits", port, "hospital-a", policy=TEMPLATE)
    shutil.copy(workplace / "kits" / "hospital-a.zip", workplace)
    write_faces(workplace / "images", 120, "clinic", "face")
    (take_out, doctor), (join,), (approve, deny) = (documented(name, SITE) for name in ("policy", "join", "approve"))
    assert take_out[:2] == ["unzip", "-p"]
    policy = (open_kit(workplace / "hospital-a.zip", workplace / "opened").folder / POLICY).read_text()
    (workplace / "policy.toml").write_text(policy)
    assert load_policy(workplace / "policy.toml").approve_first_round

    def here(command: list[str]) -> list[str]:
        return ["./images" if part == "/srv/images" else part for part in command]

    server = Started(
        ["maskdm-server", "serve", "--prior", str(prior), "--out", "fed", "--tls", "kits/server", "--min-clients", "1"],
        workplace,
        "serve",
    )
    server.until("listening on")
    found = Started(here(doctor), workplace, "doctor")
    assert found.wait() == 0, found.output()
    assert "the first after somebody here approves it" in found.output()
    site = Started(here(join), workplace, "site", MASKDM_WAIT="60")
    site.until("the first update waits for your approval")
    assert updates_out(workplace / "site") == []
    assert deny == [*approve, "--deny"]
    decided = Started(approve, workplace, "approve")
    assert decided.wait() == 0, decided.output()
    assert "approved: federation" in decided.output()
    assert server.wait() == 0, server.output()
    assert site.wait() == 0, site.output()
    assert updates_out(workplace / "site") == [1, 2]
    for number, command in enumerate(documented("audit", SITE)):
        done = Started(command, workplace, f"audit-{number}")
        assert done.wait() == 0, done.output()
    assert load_checkpoint(workplace / "site" / "model.safetensors")[1].rounds == 2
