"""`import maskdm_server`: a federation in one call, the one that the command runs."""

import json
from pathlib import Path

import numpy as np
import pytest

import maskdm
import maskdm_server
from maskdm.commands import command_line as cli
from maskdm.config import ModelConfig
from maskdm.errors import UsageError
from maskdm.metadata import CheckpointMetadata
from maskdm.networks.model import build_model
from maskdm.training.checkpoint import save_checkpoint
from maskdm_server.commands.app import app


@pytest.fixture
def prior(tmp_path: Path, tiny: ModelConfig, metadata: CheckpointMetadata) -> Path:
    path = tmp_path / "prior.safetensors"
    save_checkpoint(path, {name: p.detach() for name, p in build_model(tiny, seed=1).named_parameters()}, metadata)
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    path = tmp_path / "images.npz"
    np.savez(path, images=np.random.default_rng(0).integers(0, 256, (60, 8, 8), np.uint8))
    return path


def test_exactly_one_name_is_exported() -> None:
    assert maskdm_server.__all__ == ["simulate"]
    assert dir(maskdm_server) == maskdm_server.__all__
    with pytest.raises(AttributeError, match="no attribute 'serve'"):
        maskdm_server.serve  # type: ignore[attr-defined]  # noqa: B018


def test_the_federation_is_that_of_the_command(prior: Path, images: Path, tmp_path: Path) -> None:
    called = maskdm_server.simulate(
        prior, images, tmp_path / "called", clients=2, rounds=1, fraction=0.5, local_images=8, batch_size=4, evaluate=0
    )
    typed = ["simulate", "--engine", "inline", "--prior", str(prior), "--data", str(images)]
    typed += ["--out", str(tmp_path / "typed"), "--clients", "2", "--rounds", "1", "--fraction", "0.5"]
    assert cli.run(app, "maskdm-server", [*typed, "--local-images", "8", "--batch-size", "4"]) == 0
    configured = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("called", "typed")]
    assert configured[0] == configured[1]
    first, second = (maskdm.load(path) for path in (called, tmp_path / "typed" / "model.safetensors"))
    assert first.metadata.rounds == second.metadata.rounds == 1
    others = dict(second.network.named_parameters())
    assert all(weight.equal(others[name]) for name, weight in first.network.named_parameters())


def test_an_unknown_option_and_an_impossible_one_are_refused_in_one_line(
    prior: Path, images: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="--loacl-images"):
        maskdm_server.simulate(prior, images, tmp_path / "out", loacl_images=8)
    with pytest.raises(UsageError, match="needs --min-replies 5"):
        maskdm_server.simulate(prior, images, tmp_path / "out", aggregation="krum")
