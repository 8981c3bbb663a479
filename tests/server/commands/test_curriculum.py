"""Recipes and stages: what is shipped loads and trains, and mistakes are named."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from maskdm.commands import command_line as cli
from maskdm.config import DiffusionConfig, MaskConfig, ModelConfig, Stage, TrainingConfig
from maskdm.data.corpus import Corpus, in_memory
from maskdm.errors import Interrupted, UsageError
from maskdm.run.runfolder import append_line, sha256_of
from maskdm.training import pretrain as pretraining
from maskdm.training.checkpoint import load_checkpoint
from maskdm.training.pretrain import Run, pretrain
from maskdm_server.commands.app import app
from maskdm_server.commands.curriculum import read_recipe, recipe_names, stages_from

PUBLISHED = {
    "celeba-64": [(0.875, 256, 2e-4), (0.0, 128, 2e-4)],
    "celebahq-256": [(0.8984375, 256, 2e-4), (0.5, 64, 2e-4), (0.0, 32, 1e-5)],
    "transfer-1": [(0.0, 64, 5e-5)],
    "transfer-10": [(0.0, 64, 5e-5)],
    "vggface2-256": [(0.8984375, 256, 2e-4)],
}

VALUES: dict[str, Any] = {
    "mask": "block",
    "mask_ratio": 0.5,
    "block_size": 2,
    "images": "1K",
    "batch_size": 10,
    "lr": 1e-3,
    "warmup_images": 0,
}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.npz"
    pixels = np.random.default_rng(0).integers(0, 256, (12, 64, 64, 3), dtype=np.uint8)
    np.savez(path, images=pixels, labels=np.arange(12) % 3)
    return path


def resolved(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """What --dry-run prints."""
    assert cli.run(app, "maskdm-server", ["pretrain", *arguments, "--dry-run"]) == 0
    return dict(json.loads(capsys.readouterr().out))


def test_the_shipped_recipes_are_those_of_the_paper() -> None:
    assert recipe_names() == sorted(PUBLISHED)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_recipe_resolves_to_the_published_settings(
    name: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = resolved(capsys, "--data", str(corpus), "--out", str(tmp_path / "run"), "--recipe", name)
    stages = found["stages"].values()
    assert [
        (stage["mask"]["effective_ratio"], stage["training"]["batch_size"], stage["training"]["lr"]) for stage in stages
    ] == [pytest.approx(expected) for expected in PUBLISHED[name]]
    assert found["diffusion"]["schedule"] == ("linear" if name == "celeba-64" else "cosine")
    assert found["model"]["dim"] == (768 if name == "celebahq-256" else 512)
    assert all(stage["training"]["betas"] == [0.99, 0.99] for stage in stages)
    assert {stage["training"]["horizontal_flip"] for stage in stages} == {0.5 if "transfer" in name else 0.0}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_recipe_takes_two_steps_in_every_stage(name: str, tmp_path: Path) -> None:
    """With its masks, rates and schedule, on a network and images small enough for a test."""
    recipe = read_recipe(name)
    size = recipe["image-size"] // 4
    model = ModelConfig(image_size=size, channels=3, patch_size=size // 16, dim=16, depth=2, heads=2)
    values = VALUES | {"horizontal_flip": recipe.get("horizontal-flip", 0.0), "precision": "fp32"}
    tables = [table | {"batch-size": 2, "images": 4} for table in recipe["stages"]]
    stages = stages_from(values, tables, ())
    images = in_memory(np.random.default_rng(0).integers(0, 256, (6, 3, size, size), dtype=np.uint8))
    run = Run(model, DiffusionConfig(schedule=recipe["schedule"], timesteps=20), stages)
    prior = pretrain(images, tmp_path, run, device=torch.device("cpu"))
    _, metadata = load_checkpoint(prior)
    assert metadata.images_seen == 4 * len(stages)
    assert metadata.mask.kind == stages[-1].mask.kind


def test_flags_beat_the_file_which_beats_the_recipe_in_every_stage(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.toml").write_text("weight-decay = 0.5\nsize = 'tiny'\n")
    common = ("--data", str(corpus), "--out", str(tmp_path / "run"), "--config", str(tmp_path / "mine.toml"))
    found = resolved(capsys, *common, "--recipe", "celeba-64", "--batch-size", "8")
    assert found["model"]["dim"] == 128
    assert found["diffusion"]["schedule"] == "linear"
    for stage in found["stages"].values():
        assert stage["training"]["batch_size"] == 8
        assert stage["training"]["weight_decay"] == 0.5
    assert len(found["stages"]) == 2


def test_a_file_may_hold_stages_of_its_own(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.toml").write_text("lr = 0.01\n[[stages]]\nimages = 64\n[[stages]]\nmask = 'none'\nlr = 0.001\n")
    common = ("--data", str(corpus), "--out", str(tmp_path / "run"), "--config", str(tmp_path / "mine.toml"))
    first, second = resolved(capsys, *common)["stages"].values()
    assert (first["training"]["images"], first["training"]["lr"]) == (64, 0.01)
    assert (second["mask"]["kind"], second["training"]["lr"]) == ("none", 0.001)
    again = resolved(capsys, *common, "--recipe", "celebahq-256")["stages"]
    assert len(again) == 2, "the file's stages beat the recipe's"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages = 3", "stages must be tables"),
        ("[[stages]]\ndim = 3", "stage 1: unknown key 'dim'"),
        ("[[stages]]\n[[stages]]\nlr = -1", "stage 2: --lr -1"),
        ("[[stages]]\nmask-ratio = 2", "stage 1: --mask-ratio 2"),
        ("[[stages]]\nimages = 'many'", "--images many"),
    ],
)
def test_a_mistake_in_a_stage_is_named(
    text: str, message: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.toml").write_text(text)
    arguments = ["pretrain", "--data", str(corpus), "--out", "x", "--config", str(tmp_path / "mine.toml")]
    assert cli.run(app, "maskdm-server", arguments) == 2
    assert message in capsys.readouterr().err


def test_an_unknown_recipe_lists_those_there_are(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(app, "maskdm-server", ["pretrain", "--data", str(corpus), "--out", "x", "--recipe", "cifar"]) == 2
    assert "choose one of celeba-64, celebahq-256" in capsys.readouterr().err


def stages(*lengths: int) -> tuple[Stage, ...]:
    """Stages that differ in everything a stage may differ in."""
    masks = (
        MaskConfig(kind="patch", ratio=0.75),
        MaskConfig(kind="block", ratio=0.5, block_size=2),
        MaskConfig(kind="none"),
    )
    return tuple(
        Stage(
            mask=masks[i],
            training=TrainingConfig(
                images=length,
                batch_size=(4, 3, 2)[i],
                accumulate=(1, 2, 2)[i],
                lr=(1e-3, 2e-3, 5e-4)[i],
                betas=((0.9, 0.95), (0.9, 0.99), (0.8, 0.9))[i],
                warmup_images=(0, 6, 0)[i],
                precision="fp32",
                seed=4,
            ),
        )
        for i, length in enumerate(lengths)
    )


def trained(folder: Path, run: Run, init: Path | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    return pretrain(pictures(), folder, run, device=torch.device("cpu"), init=init)


def pictures() -> Corpus:
    pixels = np.random.default_rng(1).integers(0, 256, (10, 1, 8, 8), dtype=np.uint8)
    return in_memory(pixels, ["even", "odd"] * 5)


@pytest.mark.parametrize("killed_at", [8, 16, 22, 28, 34])
def test_a_curriculum_that_was_stopped_anywhere_ends_with_the_same_weights(
    tiny: ModelConfig, tmp_path: Path, killed_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stages of 16, 12 and 8 images: inside of each, and on both borders."""
    shape = tiny.model_copy(update={"classes": 2})
    run = Run(shape, DiffusionConfig(timesteps=20), stages(14, 12, 7), ("even", "odd"))
    assert run.begins() == [0, 16, 28, 36]
    whole = trained(tmp_path / "whole", run)

    real = append_line

    def interrupt_after(path: Path, line: dict[str, Any]) -> None:
        real(path, line)
        if line.get("images", 0) >= killed_at:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(pretraining, "METRICS_EVERY", 0.0)  # a line for each step
    monkeypatch.setattr(pretraining, "append_line", interrupt_after)
    with pytest.raises(Interrupted):
        trained(tmp_path / "cut", run)
    monkeypatch.undo()
    _, described = load_checkpoint(tmp_path / "cut" / "prior.safetensors")
    assert killed_at <= described.images_seen < 36
    again = trained(tmp_path / "cut", run)
    first, described = load_checkpoint(whole)
    second, _ = load_checkpoint(again)
    assert described.images_seen == 36
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_every_stage_starts_from_the_average_of_the_one_before(tiny: ModelConfig, tmp_path: Path) -> None:
    """A second stage whose rate is next to nothing leaves what the first one's average was."""
    one = stages(16)[0]
    still = one.model_copy(update={"training": one.training.model_copy(update={"lr": 1e-12, "weight_decay": 0.0})})
    alone = trained(tmp_path / "a", Run(tiny, DiffusionConfig(timesteps=20), (one,)))
    both = trained(tmp_path / "b", Run(tiny, DiffusionConfig(timesteps=20), (one, still)))
    averaged, raw = (load_checkpoint(path)[0] for path in (alone, tmp_path / "a" / "raw.safetensors"))
    found, _ = load_checkpoint(both)
    assert all(torch.allclose(found[name], averaged[name], atol=1e-7) for name in found)
    assert not torch.allclose(raw["head.weight"], averaged["head.weight"], atol=1e-5)


def test_a_run_starts_from_a_checkpoint_and_says_so_in_its_configuration(tiny: ModelConfig, tmp_path: Path) -> None:
    one = stages(16)[0]
    still = one.model_copy(update={"training": one.training.model_copy(update={"lr": 1e-12, "weight_decay": 0.0})})
    first = trained(tmp_path / "a", Run(tiny, DiffusionConfig(timesteps=20), (one,)))
    run = Run(tiny, DiffusionConfig(timesteps=20), (still,))
    found, _ = load_checkpoint(trained(tmp_path / "b", run, first))
    expected, _ = load_checkpoint(first)
    assert all(torch.allclose(found[name], expected[name], atol=1e-7) for name in found)
    assert sha256_of(first) in (tmp_path / "b" / "config.json").read_text()
    with pytest.raises(UsageError, match="init_sha256"):
        trained(tmp_path / "b", run)
