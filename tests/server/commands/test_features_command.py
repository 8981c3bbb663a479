"""`features`: a network that tells the classes of a domain apart, for distances in it."""

from pathlib import Path

import numpy as np
import pytest
import torch

from maskdm.commands import command_line as cli
from maskdm.evaluation.distances import frechet_distance, moments
from maskdm.evaluation.extractors.features import open_extractor
from maskdm_server.commands.app import app


def stripes(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows against columns, with noise, (N, 16, 16, 1)."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 2, count)
    rows = np.tile((np.arange(16) % 4 < 2) * 200, (16, 1))
    images = np.stack([rows if label else rows.T for label in labels]) + random.integers(0, 55, (count, 16, 16))
    return images[..., None].astype(np.uint8), np.array(["columns", "rows"])[labels]


@pytest.fixture
def labelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MASKDM_CACHE", str(tmp_path / "cache"))
    torch.set_num_threads(1)
    images, labels = stripes(200, seed=0)
    np.savez(tmp_path / "labelled.npz", images=images, labels=labels)
    return tmp_path / "labelled.npz"


def test_learns_the_classes_and_sees_what_is_unlike_them(
    labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "Stripes.safetensors"
    options = ["features", "--data", str(labelled), "--out", str(out), "--image-size", "16", "--epochs", "4"]
    assert cli.run(app, "maskdm-server", options) == 0
    assert "names 100.0% of held-out images" in capsys.readouterr().err
    extractor = open_extractor(out)
    assert extractor.name == "Stripes"

    def found(images: np.ndarray) -> torch.Tensor:
        return extractor.features(torch.from_numpy(np.moveaxis(images, 3, 1).copy()))

    real, other = found(stripes(200, seed=1)[0]), found(stripes(200, seed=2)[0])
    noise = found(np.random.default_rng(3).integers(0, 256, (200, 16, 16, 1), np.uint8))
    alike, unlike = (frechet_distance(moments(real), moments(features)) for features in (other, noise))
    assert unlike > 20 * alike


def test_the_same_seed_gives_the_same_file(labelled: Path, tmp_path: Path) -> None:
    files = []
    for name in ("a", "b"):
        out = tmp_path / name / "Net.safetensors"
        options = ["features", "--data", str(labelled), "--out", str(out), "--image-size", "16", "--epochs", "1"]
        assert cli.run(app, "maskdm-server", options) == 0
        files.append(out.read_bytes())
    assert files[0] == files[1]


def test_images_without_labels_are_refused(tmp_path: Path, labelled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "plain.npz", images=stripes(40, seed=0)[0])
    options = ["features", "--data", str(tmp_path / "plain.npz"), "--out", str(tmp_path / "x.safetensors")]
    assert cli.run(app, "maskdm-server", [*options, "--image-size", "16"]) == 2
    assert "--data has no two labels" in capsys.readouterr().err


def test_a_name_that_no_number_can_carry_is_refused(
    tmp_path: Path, labelled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["features", "--data", str(labelled), "--out", str(tmp_path / "my net.safetensors")]
    assert cli.run(app, "maskdm-server", [*options, "--image-size", "16"]) == 2
    assert "--out my net" in capsys.readouterr().err
