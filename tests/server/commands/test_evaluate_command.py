"""`maskdm-server evaluate` on small checkpoints with random weights."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from maskdm.commands import command_line as cli
from maskdm.config import ModelConfig
from maskdm.evaluation.extractors.feature_net import FeatureNet, FeatureNetConfig, save_feature_net
from maskdm.evaluation.record import Evaluation, read_record
from maskdm.metadata import CheckpointMetadata
from maskdm.networks.model import build_model
from maskdm.run.runfolder import sha256_of
from maskdm.training.checkpoint import save_checkpoint
from maskdm_server.commands.app import app

Evaluate = Callable[..., Evaluation]


def noise(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 1), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path: Path, tiny: ModelConfig, metadata: CheckpointMetadata, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint, a feature network, labelled real images with a test part, and training images."""
    monkeypatch.setenv("MASKDM_CACHE", str(tmp_path / "cache"))
    save_checkpoint(tmp_path / "fed" / "model.safetensors", dict(build_model(tiny).named_parameters()), metadata)
    config = FeatureNetConfig(name="cells", image_size=8, channels=1, classes=2, width=4, features=8)
    torch.manual_seed(0)
    save_feature_net(tmp_path / "cells.safetensors", FeatureNet(config), config)
    labels = np.array(["cat", "cat", "dog"] * 10)
    np.savez(tmp_path / "real.npz", x_train=noise(30, 0), y_train=labels, x_test=noise(30, 1), y_test=labels)
    np.savez(tmp_path / "train.npz", images=noise(40, 2))
    return tmp_path


@pytest.fixture
def evaluate(folder: Path) -> Evaluate:
    def run(*arguments: str) -> Evaluation:
        out = folder / "out.json"
        command = ["evaluate", "--reference", str(folder / "real.npz"), "--features", str(folder / "cells.safetensors")]
        small = ["--resamples", "20", "--precision", "fp32", "--json", str(out)]
        small += [] if "--samples" in arguments else ["--steps", "3", "--count", "24"]
        assert cli.run(app, "maskdm-server", [*command, *small, *arguments]) == 0
        return read_record(out)

    return run


def model_in(folder: Path) -> list[str]:
    return ["--model", str(folder / "fed" / "model.safetensors")]


def test_the_record_holds_everything_that_belongs_to_a_number(folder: Path, evaluate: Evaluate) -> None:
    found = evaluate(*model_in(folder), "--train", str(folder / "train.npz"), "--extrapolate", "--sampler", "ddim")
    assert found.model_sha256 == sha256_of(folder / "fed" / "model.safetensors")
    assert found.images_seen == 640
    assert found.extractor.sha256 == sha256_of(folder / "cells.safetensors")
    assert (found.extractor.name, found.extractor.features) == ("cells", 8)
    assert (found.reference.split, found.reference.images) == ("test", 30)
    assert found.training
    assert found.training.images == 40
    sampling = found.sampling
    assert (sampling.count, sampling.sampler, sampling.steps, sampling.eta) == (24, "ddim", 3, 0.0)
    assert (sampling.guidance, sampling.seed, sampling.precision) == (1.0, 0, "fp32")
    assert {"FD-cells", "KD-cells", "FD∞-cells", "precision", "coverage", "memorisation", "copies"} <= set(
        found.metrics
    )
    for number in found.metrics.values():
        assert (number.images, number.reference_images, number.floor_images) == (24, 30, 15)
    assert found.headline == "FD-cells"
    assert len(found.pairs) == 16
    assert all(pair.sample < 24 and pair.training < 40 for pair in found.pairs)
    assert (folder / "out.png").read_bytes().startswith(b"\x89PNG")


def test_the_record_lies_beside_the_model_and_the_same_evaluation_replaces_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["evaluate", *model_in(folder), "--reference", str(folder / "real.npz"), "--steps", "2"]
    for extra in (["--count", "8"], ["--count", "8"], ["--count", "9"]):
        assert cli.run(app, "maskdm-server", [*common, "--resamples", "0", *extra]) == 0
    assert len(list((folder / "fed" / "evaluations").glob("model-640-random-*.json"))) == 2
    printed = capsys.readouterr()
    assert "KD-random" in printed.out
    assert "features of --reference: from the cache" in printed.err
    assert "random weights compare models roughly" in printed.out


def test_the_same_seed_gives_the_same_numbers_whatever_the_batch_size(folder: Path, evaluate: Evaluate) -> None:
    values = {
        batch: {
            name: number.value for name, number in evaluate(*model_in(folder), "--batch-size", batch).metrics.items()
        }
        for batch in ("24", "5")
    }
    assert values["24"] == pytest.approx(values["5"], rel=1e-2)
    other = evaluate(*model_in(folder), "--seed", "1").metrics["FD-cells"].value
    assert other != pytest.approx(values["24"]["FD-cells"], rel=1e-3)


def test_images_made_elsewhere_are_measured_and_real_ones_are_nearer_than_noise_of_another_kind(
    folder: Path, evaluate: Evaluate
) -> None:
    np.savez(folder / "like.npz", images=noise(30, 7))
    np.savez(folder / "dark.npz", images=noise(30, 8) // 4)
    like, dark = (evaluate("--samples", str(folder / f"{name}.npz")) for name in ("like", "dark"))
    assert like.sampling.sha256 == sha256_of(folder / "like.npz")
    assert like.sampling.sampler is None
    assert like.sampling.count == 30
    for name in ("FD-cells", "KD-cells"):
        assert like.metrics[name].value < dark.metrics[name].value
    assert like.metrics["precision"].value > dark.metrics["precision"].value


def test_a_model_that_repeats_its_training_images_is_found_out(folder: Path, evaluate: Evaluate) -> None:
    np.savez(folder / "copies.npz", images=noise(40, 2))
    copies = evaluate("--samples", str(folder / "copies.npz"), "--train", str(folder / "train.npz"))
    fresh = evaluate("--samples", str(folder / "real.npz"), "--train", str(folder / "train.npz"))
    assert (copies.metrics["memorisation"].value, copies.metrics["copies"].value) == (0, 1)
    assert all(pair.sample == pair.training for pair in copies.pairs)
    assert fresh.metrics["copies"].value < 0.5


@pytest.fixture
def conditional(folder: Path, tiny: ModelConfig, metadata: CheckpointMetadata) -> list[str]:
    shape = tiny.model_copy(update={"classes": 3})
    metadata = metadata.model_copy(update={"model": shape, "class_names": ("bird", "cat", "dog")})
    save_checkpoint(folder / "classes.safetensors", dict(build_model(shape).named_parameters()), metadata)
    return ["--model", str(folder / "classes.safetensors")]


def test_classes_are_drawn_in_the_proportions_of_the_reference(
    folder: Path, evaluate: Evaluate, conditional: list[str]
) -> None:
    assert evaluate(*conditional).sampling.classes == {"bird": 0, "cat": 16, "dog": 8}
    only = evaluate(*conditional, "--class", "dog")
    assert only.sampling.classes == {"bird": 0, "cat": 0, "dog": 24}
    assert (only.reference.labels, only.reference.images) == (("dog",), 10)
    np.savez(folder / "real.npz", images=noise(30, 1))
    unknown = evaluate(*conditional)
    assert unknown.sampling.classes == {"bird": 8, "cat": 8, "dog": 8}
    assert any("none of the model's classes" in note for note in unknown.notes)


def test_what_makes_numbers_better_than_they_are_is_said(folder: Path, evaluate: Evaluate) -> None:
    found = evaluate(*model_in(folder), "--split", "train", "--train", str(folder / "real.npz"), "--count", "6")
    assert any("the training part of" in note for note in found.notes)
    assert any("30 images of --reference are in --train too" in note for note in found.notes)
    assert any("there are 8 features: go by KD-cells" in note for note in found.notes)
    assert found.headline == "KD-cells"
    few = evaluate(*model_in(folder), "--count", "4")
    assert "precision" not in few.metrics
    assert any("need more than --neighbours 5 images" in note for note in few.notes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --model, or --samples"),
        (["--model", "fed/model.safetensors", "--samples", "train.npz"], "give either --model, or --samples"),
        (["--model", "fed/model.safetensors", "--reference", "nowhere"], "--reference nowhere does not exist"),
        (["--model", "fed/model.safetensors", "--train", "nowhere"], "--train nowhere does not exist"),
        (["--model", "fed/model.safetensors", "--features", "nowhere"], "--features nowhere does not exist"),
        (["--model", "fed/model.safetensors", "--features", "real.npz"], "is no feature network that MaskDM knows"),
        (["--model", "fed/model.safetensors", "--steps", "51"], "--steps 51 is more than the model's 50"),
        (["--model", "fed/model.safetensors", "--class", "cat"], "the model has no classes"),
        (["--model", "fed/model.safetensors", "--split", "validation"], "has 0 images in its part validation"),
        (["--model", "fed/model.safetensors", "--count", "1"], "--count"),
        (["--model", "real.npz"], "--model real.npz"),
        (["--samples", "wide.npz"], "give square ones"),
        (["--samples", "like.npz", "--steps", "10"], "--steps is for --model"),
        (["--samples", "like.npz", "--class", "a"], "--class is for --model"),
        (["--samples", "like.npz", "--guidance", "2"], "--guidance is for --model"),
        (["--samples", "large.npz"], "--reference: none of 60 images can be used (60: smaller than 16x16)"),
    ],
)
def test_mistakes_are_one_line_that_names_the_option(
    folder: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    np.savez("wide.npz", images=np.zeros((4, 8, 9), np.uint8))
    np.savez("large.npz", images=np.zeros((4, 16, 16), np.uint8))
    assert cli.run(app, "maskdm-server", ["evaluate", "--reference", "real.npz", *arguments]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert message in last
    assert not list(folder.glob("**/evaluations"))


def test_a_record_that_cannot_be_written_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "file").write_text("")
    arguments = ["--reference", str(folder / "real.npz"), "--count", "8", "--steps", "2", "--resamples", "0"]
    command = ["evaluate", *model_in(folder), *arguments, "--json", str(folder / "file" / "a.json")]
    assert cli.run(app, "maskdm-server", command) == 2
    assert "--json" in capsys.readouterr().err.splitlines()[-1]
