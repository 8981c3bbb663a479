"""`import maskdm`: what it gives, what it loads, and that each call does what its command does."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import maskdm
from maskdm.config import DiffusionConfig, MaskConfig, ModelConfig, Stage, TrainingConfig
from maskdm.diffusion.sampling import sample as draw
from maskdm.errors import CheckpointError, DataError, UsageError
from maskdm.metadata import CheckpointMetadata
from maskdm.networks.model import build_model
from maskdm.training.checkpoint import save_checkpoint


@pytest.fixture
def prior(tmp_path: Path, tiny: ModelConfig, metadata: CheckpointMetadata) -> Path:
    path = tmp_path / "prior.safetensors"
    save_checkpoint(path, {name: p.detach() for name, p in build_model(tiny, seed=1).named_parameters()}, metadata)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve grey pictures of two labels, four more in a test part."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 6), ("test", 2)):
        for label in ("left", "right"):
            for number in range(count):
                path = tmp_path / "images" / part / label / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(path)
    return tmp_path / "images"


def test_exactly_these_names_are_exported() -> None:
    assert maskdm.__all__ == [
        *("Corpus", "DiffusionConfig", "MaskConfig", "Model", "ModelConfig", "Run", "Stage", "TrainingConfig"),
        *("__version__", "evaluate", "fine_tune", "load", "masks", "pack", "pretrain", "processes", "sample"),
        "samplers",
    ]
    assert dir(maskdm) == maskdm.__all__
    assert all(getattr(maskdm, name) is not None for name in maskdm.__all__)
    assert set(maskdm.__all__) == {*maskdm.api.__all__, "__version__"}
    with pytest.raises(AttributeError, match="no attribute 'smaple'"):
        maskdm.smaple  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize("package", ["maskdm", "maskdm_server"])
def test_importing_it_loads_neither_pytorch_nor_numpy(package: str) -> None:
    code = (
        f"import sys, {package}\n"
        "sys.exit(str([name for name in sys.modules if name.split('.')[0] in ('torch', 'numpy', 'pydantic')] or 0))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == "0"


def test_a_model_is_loaded_with_what_is_known_of_it_and_saved_again(
    prior: Path, tmp_path: Path, metadata: CheckpointMetadata
) -> None:
    model = maskdm.load(prior, device="cpu")
    assert model.metadata == metadata
    model.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == prior.read_bytes()
    with pytest.raises(CheckpointError, match=r"missing\.safetensors does not exist"):
        maskdm.load(tmp_path / "missing.safetensors")


def test_samples_are_those_of_the_library_whatever_the_batch_size(prior: Path) -> None:
    model = maskdm.load(prior, device="cpu")
    images = maskdm.sample(model, 3, steps=4, seed=5, precision="fp32")
    assert images.equal(draw(model.network, model.metadata.diffusion, 3, steps=4, seed=5))
    assert images.equal(maskdm.sample(model, 3, steps=4, seed=5, precision="fp32", batch_size=2))
    with pytest.raises(UsageError, match="51 is more than the model's 50 timesteps"):
        maskdm.sample(model, 1, steps=51)
    with pytest.raises(UsageError, match="the model has no classes"):
        maskdm.sample(model, 1, classes=["cat"])


def test_from_pictures_to_a_prior_to_a_finer_one_to_numbers(folder: Path, tmp_path: Path) -> None:
    corpus = maskdm.pack(folder, tmp_path / "corpus", image_size=8)
    assert corpus.manifest.policy.channels == 1
    assert maskdm.Corpus.open(str(tmp_path / "corpus")).manifest == corpus.manifest
    run = maskdm.Run(
        model=ModelConfig(image_size=8, channels=1, patch_size=2, dim=16, depth=2, heads=2, classes=len(corpus.labels)),
        diffusion=DiffusionConfig(timesteps=50),
        stages=(Stage(mask=MaskConfig(kind="patch", ratio=0.5), training=TrainingConfig(images=32, batch_size=8)),),
        class_names=corpus.labels,
    )
    path = maskdm.pretrain(corpus, run, tmp_path / "prior", device="cpu")
    model = maskdm.load(path, device="cpu")
    assert model.metadata.images_seen == 32
    assert model.metadata.class_names == ("left", "right")

    before = {name: p.detach().clone() for name, p in model.network.named_parameters()}
    seen = list[int]()
    finer = maskdm.fine_tune(
        model, corpus, TrainingConfig(images=16, batch_size=4), on_progress=lambda p: seen.append(p.images)
    )
    assert seen[-1] == 16
    assert (finer.metadata.images_seen, finer.metadata.mask.kind) == (48, "none")
    assert all(p.equal(before[name]) for name, p in model.network.named_parameters()), "the model itself changed"
    assert not all(p.equal(before[name]) for name, p in finer.network.named_parameters())

    images = maskdm.sample(finer, 8, steps=2, classes=["right"])
    assert images.shape == (8, 1, 8, 8)
    numbers = maskdm.evaluate(images, corpus, resamples=10, neighbours=2)
    assert numbers["FD-random"].reference_images == 4  # the test part
    assert set(numbers) == {"FD-random", "KD-random", "precision", "recall", "density", "coverage"}
    rows = torch.from_numpy(corpus.pixels[corpus.index["split"] == 2])
    assert maskdm.evaluate(images, rows, resamples=10, neighbours=2) == numbers


def test_fine_tuning_takes_images_that_are_at_hand_and_only_of_the_model_s_size(prior: Path) -> None:
    model, short = maskdm.load(prior, device="cpu"), TrainingConfig(images=4, batch_size=4)
    finer = maskdm.fine_tune(model, torch.zeros(5, 1, 8, 8, dtype=torch.uint8), short)
    assert finer.metadata.images_seen == model.metadata.images_seen + 4
    with pytest.raises(DataError, match=r"\(1, 16, 16\) each, but the model's have \(1, 8, 8\)"):
        maskdm.fine_tune(model, torch.zeros(5, 1, 16, 16, dtype=torch.uint8), short)


def test_too_few_images_cannot_be_compared() -> None:
    images = torch.zeros(5, 1, 8, 8, dtype=torch.uint8)
    with pytest.raises(DataError, match="5 samples and 1 images to compare them with: give at least 2 of each"):
        maskdm.evaluate(images, images[:1])
