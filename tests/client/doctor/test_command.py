"""The doctor's exit code, its order, and what it does where one thing is wrong and the rest is not."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from maskdm.commands import command_line as cli
from maskdm.config import ModelConfig
from maskdm.federated.policy import TEMPLATE
from maskdm.metadata import CheckpointMetadata
from maskdm.networks.model import build_model
from maskdm.training.checkpoint import save_checkpoint
from maskdm_client.commands.app import app
from maskdm_client.doctor import command as doctor_module
from maskdm_server.kits.provision import provision
from maskdm_server.lab.faces import draw_faces

ALL = [
    *("versions", "kit", "policy", "bundle", "name resolution", "connection", "clock", "node key"),
    *("disk", "accelerator", "memory", "training step", "data"),
]
COLOUR = ModelConfig(image_size=8, channels=3, patch_size=2, dim=16, depth=2, heads=2)
# Nobody listens there: a port that needs rights, on an address of our own.
NOBODY = "127.0.0.1:1"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metadata: CheckpointMetadata) -> Path:
    """Images that fit a small prior, and a kit of a server that is not there."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("MASKDM_")]:
        monkeypatch.delenv(name)
    np.save("faces.npy", draw_faces(150, size=8))
    about = metadata.model_copy(update={"model": COLOUR})
    save_checkpoint(Path("prior.safetensors"), dict(build_model(COLOUR).named_parameters()), about)
    provision(Path("kits"), NOBODY, ["hospital-a"], policy=TEMPLATE.encode(), model=COLOUR)
    return tmp_path


def doctor(*arguments: str) -> tuple[int, dict[str, tuple[bool | None, str, str]]]:
    """Exit code, and what was found by each check."""
    code = cli.run(app, "maskdm-client", ["doctor", "--data", "faces.npy", "--json", "found.json", *arguments])
    document = json.loads(Path("found.json").read_text())
    assert [check["check"] for check in document] == ALL
    assert all(check["remedy"] for check in document if check["ok"] is False)
    return code, {check["check"]: (check["ok"], check["found"], check["remedy"]) for check in document}


def test_without_a_kit_images_and_machine_are_checked_and_the_rest_says_why_not(folder: Path) -> None:
    code, found = doctor("--prior", "prior.safetensors")
    assert code == 0, found
    assert [name for name, (ok, _, _) in found.items() if ok is None] == [
        *("kit", "bundle", "name resolution", "connection", "clock", "node key")
    ]
    assert found["connection"][1] == "neither --kit nor --server was given"
    assert "8x8" in found["training step"][1]
    assert {"contact-sheet.png", "preflight.json", "skipped.jsonl"} <= {
        path.name for path in Path("maskdm-doctor").iterdir()
    }


def test_one_red_check_is_exit_code_1_and_the_others_are_made_all_the_same(folder: Path) -> None:
    code, found = doctor("--kit", "kits/hospital-a.zip")
    assert code == 1
    assert [name for name, (ok, _, _) in found.items() if ok is False] == ["connection"]
    assert [found[name][1] for name in ("clock", "node key")] == ["there is no connection"] * 2
    assert "8x8" in found["training step"][1], "the size is the kit's model's"
    assert not list((folder / "maskdm-doctor").rglob("client.key")), "the key has no place in a report"


def test_a_name_without_an_address_ends_the_way_there(folder: Path) -> None:
    code, found = doctor("--kit", "kits/hospital-a.zip", "--server", "maskdm.invalid:8000")
    assert code == 1
    assert found["name resolution"][0] is False
    assert found["connection"] == (None, "the server has no address", "")


def test_a_damaged_kit_is_red_and_its_server_is_not_asked(folder: Path) -> None:
    content = bytearray(Path("kits/hospital-a.zip").read_bytes())
    Path("broken.zip").write_bytes(content[:500])
    code, found = doctor("--kit", "broken.zip", "--prior", "prior.safetensors")
    assert code == 1
    assert [name for name, (ok, _, _) in found.items() if ok is False] == ["kit"]
    assert found["connection"] == (None, "the kit cannot be used", "")


def test_a_server_in_the_clear_is_asked_without_a_signature(folder: Path) -> None:
    code, found = doctor("--server", NOBODY, "--prior", "prior.safetensors")
    assert code == 1
    assert (found["connection"][0], found["node key"][0]) == (False, None)


def test_images_that_no_model_can_use_are_red(folder: Path) -> None:
    np.save("faces.npy", draw_faces(150, size=4))
    code, found = doctor("--prior", "prior.safetensors")
    assert (code, found["data"][0], "smaller than 8x8" in found["data"][1]) == (1, False, True), found


def test_fewer_images_than_the_policy_asks_for_are_red(folder: Path) -> None:
    Path("mine.toml").write_text("min-images = 1000\n")
    code, found = doctor("--prior", "prior.safetensors", "--policy", "mine.toml")
    assert code == 1
    assert [name for name, (ok, _, _) in found.items() if ok is False] == ["data"]
    assert "fewer than the 1,000 of the site's policy" in found["data"][1]


def test_a_policy_that_is_not_there_is_red(folder: Path) -> None:
    code, found = doctor("--prior", "prior.safetensors", "--policy", "none.toml")
    assert (code, found["policy"][0], "cannot be read" in found["policy"][1]) == (1, False, True)


def test_a_device_that_is_not_there_is_red(folder: Path) -> None:
    code, found = doctor("--prior", "prior.safetensors", "--device", "cuda:99")
    assert (code, found["accelerator"][0], found["training step"][0]) == (1, False, None)


def test_a_step_that_would_not_fit_is_not_tried(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_module, "available_memory", lambda device: 1)
    code, found = doctor("--prior", "prior.safetensors")
    assert (code, found["memory"][0], found["training step"][0]) == (1, False, None)


def test_the_results_may_go_to_standard_output_and_nothing_else_goes_there(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["doctor", "--data", "faces.npy", "--prior", "prior.safetensors", "--json", "-"]
    assert cli.run(app, "maskdm-client", arguments) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert [check["check"] for check in found] == ALL
    assert all(set(check) == {"check", "ok", "found", "remedy"} for check in found)
    lines = [line for line in shown.err.splitlines() if line[:2] in ("✓ ", "✗ ", "- ")]
    assert [line[2:18].strip() for line in lines] == ALL


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--kit", "none.zip"), "--kit none.zip does not exist"),
        (("--kit", "kits/hospital-a.zip", "--insecure"), "--kit and --insecure exclude each other"),
        (("--server", "example.org"), "give HOST:PORT"),
        (("--server", "example.org:8000"), "is another machine: give the --kit"),
        (("--data", "nowhere"), "--data nowhere does not exist"),
        (("--prior", "none.safetensors"), "--prior none.safetensors does not exist"),
        (("--image-size", "30"), "--image-size 30: give a multiple of 4"),
        (("--out", "faces.npy"), "cannot be written"),
        (("--json", "faces.npy/x.json", "--prior", "prior.safetensors"), "--json faces.npy/x.json cannot be written"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], expected: str
) -> None:
    code = cli.run(app, "maskdm-client", ["doctor", "--data", "faces.npy", *arguments])
    error = capsys.readouterr().err
    assert (code, expected in error.splitlines()[-1]) == (2, True), error
    assert "Traceback" not in error
