"""Who joins with a kit whose policy was changed is told so, whether they changed it or not."""

import zipfile
from pathlib import Path

import numpy as np
import pytest

from maskdm.commands import command_line as cli
from maskdm.federated.kit import POLICY
from maskdm_client.commands.app import app
from maskdm_server.kits.provision import provision

STRICT = "min-images = 1000\n"  # with which the site takes no part: the test ends there


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    """Unpacked, as its site got it."""
    np.save(tmp_path / "faces.npy", np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), np.uint8))
    (made,) = provision(tmp_path / "kits", "127.0.0.1:8000", ["hospital-a"], policy=STRICT.encode())
    with zipfile.ZipFile(made) as archive:
        archive.extractall(tmp_path / "kit")
    return tmp_path / "kit"


def warnings(kit: Path, capsys: pytest.CaptureFixture[str], *options: str) -> list[str]:
    folder = kit.parent
    command = ["--data", str(folder / "faces.npy"), "--kit", str(kit), "--out", str(folder / "site"), "--device", "cpu"]
    assert cli.run(app, "maskdm-client", [*command, *options]) == 2
    said = capsys.readouterr().err
    assert "images to train on" in said
    return [line for line in said.splitlines() if line.startswith("WARNING: policy.toml")]


def test_a_changed_policy_is_said_with_the_keys_that_differ(kit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (kit / POLICY).write_text(STRICT + 'max-norm = 5.0\nmetrics = ["outcome", "round"]\nrequire-dp = true\n')
    (line,) = warnings(kit, capsys)
    assert "was changed since hospital-a's kit was made" in line
    for key in ("min-images = 1000", "max-norm = 5.0", "metrics = [outcome, round]", "require-dp = true"):
        assert key in line
    assert "max-relative-norm" not in line
    assert "ask the coordinator for a new kit" in line


def test_a_policy_as_it_was_made_is_no_event(kit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert warnings(kit, capsys) == []


def test_nor_is_one_that_is_not_used(kit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (kit / POLICY).write_text("min-images = 1\n")
    (tmp_path / "own.toml").write_text(STRICT)
    assert warnings(kit, capsys, "--policy", str(tmp_path / "own.toml")) == []
