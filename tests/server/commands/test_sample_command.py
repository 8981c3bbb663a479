"""`maskdm-server sample` on a small conditional checkpoint."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskdm.commands import command_line as cli
from maskdm.config import ModelConfig
from maskdm.metadata import CheckpointMetadata
from maskdm.networks.model import build_model
from maskdm.training.checkpoint import save_checkpoint
from maskdm_server.commands.app import app


@pytest.fixture
def checkpoint(tmp_path: Path, tiny: ModelConfig, metadata: CheckpointMetadata) -> Path:
    """A network of two classes with random weights; grey, 8x8."""
    shape = tiny.model_copy(update={"classes": 2})
    metadata = metadata.model_copy(update={"model": shape, "class_names": ("cat", "dog")})
    save_checkpoint(tmp_path / "model.safetensors", dict(build_model(shape).named_parameters()), metadata)
    return tmp_path / "model.safetensors"


def drawn(checkpoint: Path, *arguments: str) -> np.ndarray:
    """Images that the command draws, (N, 8, 8, 1)."""
    folder = checkpoint.parent
    common = ["sample", "--model", str(checkpoint), "--out", str(folder / "grid.png"), "--npz", str(folder / "a.npz")]
    assert cli.run(app, "maskdm-server", [*common, "--steps", "4", "--precision", "fp32", *arguments]) == 0
    assert (folder / "grid.png").exists()
    return np.asarray(np.load(folder / "a.npz")["images"])


@pytest.mark.parametrize("sampler", ["dpmpp", "ddim", "ddpm", "heun", "euler"])
def test_every_sampler_draws(checkpoint: Path, sampler: str) -> None:
    assert drawn(checkpoint, "--sampler", sampler, "--count", "3").shape == (3, 8, 8, 1)


def test_classes_take_turns_and_guidance_changes_what_is_drawn(checkpoint: Path) -> None:
    everything = drawn(checkpoint, "--count", "4")
    cats = drawn(checkpoint, "--count", "4", "--class", "cat")
    dogs = drawn(checkpoint, "--count", "4", "--class", "dog")
    assert np.array_equal(everything[0::2], cats[0::2])
    assert np.array_equal(everything[1::2], dogs[1::2])
    assert not np.array_equal(cats, dogs)
    assert not np.array_equal(cats, drawn(checkpoint, "--count", "4", "--class", "cat", "--guidance", "8"))


def test_a_hole_is_filled_and_the_rest_of_the_picture_stays(checkpoint: Path) -> None:
    folder = checkpoint.parent
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    hole = np.zeros((8, 8), np.uint8)
    hole[:4] = 255
    Image.fromarray(pixels).save(folder / "picture.png")
    Image.fromarray(hole).save(folder / "hole.png")
    filled = drawn(
        checkpoint, "--fill", str(folder / "picture.png"), "--hole", str(folder / "hole.png"), "--count", "2"
    )
    assert (filled[:, 4:, :, 0] == pixels[4:]).all()
    assert not (filled[:, :4, :, 0] == pixels[:4]).all()


def test_pictures_between_two_start_and_end_near_them(checkpoint: Path) -> None:
    folder = checkpoint.parent
    for name, value in (("dark", 30), ("bright", 220)):
        Image.fromarray(np.full((8, 8), value, np.uint8)).save(folder / f"{name}.png")
    between = drawn(checkpoint, "--between", str(folder / "dark.png"), str(folder / "bright.png"), "--count", "5")
    assert between.shape == (5, 8, 8, 1)
    assert between[0].mean() < between[4].mean()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--class", "cow"], "--class cow: choose from cat, dog"),
        (["--fill", "a.png"], "--fill and --hole belong together"),
        (["--fill", "a.png", "--hole", "b.png"], "--fill a.png cannot be read"),
        (["--steps", "51"], "--steps 51 is more than the model's 50 timesteps"),
    ],
)
def test_mistakes_are_named(
    checkpoint: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(app, "maskdm-server", ["sample", "--model", str(checkpoint), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_class_of_a_model_without_classes_is_an_error(
    tmp_path: Path, tiny: ModelConfig, metadata: CheckpointMetadata, capsys: pytest.CaptureFixture[str]
) -> None:
    save_checkpoint(tmp_path / "a.safetensors", dict(build_model(tiny).named_parameters()), metadata)
    assert cli.run(app, "maskdm-server", ["sample", "--model", str(tmp_path / "a.safetensors"), "--class", "cat"]) == 2
    assert "the model has no classes" in capsys.readouterr().err
