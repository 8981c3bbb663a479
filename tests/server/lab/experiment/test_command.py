"""`experiment`, small: real training, real federations in one process."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from maskdm.commands import command_line as cli
from maskdm.config import SIZES, DiffusionConfig, MaskConfig, ModelConfig
from maskdm.data.corpus import in_memory
from maskdm.evaluation.extractors.feature_net import FeatureNet, FeatureNetConfig, save_feature_net
from maskdm.run.runfolder import read_lines
from maskdm.training.checkpoint import load_checkpoint
from maskdm_server.commands.app import app
from maskdm_server.lab.experiment import images, training
from maskdm_server.lab.experiment.arms import Sites, arms_named
from maskdm_server.lab.experiment.budget import ExperimentConfig
from maskdm_server.lab.experiment.quality import Judge

ARMS = "scratch,masked,unmasked,federated-skewed"


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The command on small grey pictures; returns the exit code."""
    monkeypatch.setattr("maskdm_client.work.fine_tuning.HELD_OUT_DRAWS", 16)
    monkeypatch.setattr("maskdm_server.federation.folder.draw_samples", lambda *_: None)
    monkeypatch.setenv("MASKDM_CACHE", str(tmp_path / "cache"))
    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    for name, count in (("public", 40), ("local", 240)):
        labels = np.array(["a", "b"])[random.integers(0, 2, count)]
        np.savez(tmp_path / f"{name}.npz", images=random.integers(0, 256, (count, 8, 8, 1), np.uint8), labels=labels)
    torch.manual_seed(0)
    about = FeatureNetConfig(name="Small", image_size=8, channels=1, classes=2, width=4, features=4)
    save_feature_net(tmp_path / "features.safetensors", FeatureNet(about), about)

    def run(*options: str, out: str = "out") -> int:
        arguments = ["experiment", "--public", str(tmp_path / "public.npz"), "--local", str(tmp_path / "local.npz")]
        arguments += ["--features", str(tmp_path / "features.safetensors"), "--out", str(tmp_path / out)]
        arguments += ["--image-size", "8", "--patch-size", "2", "--mask-ratio", "0.5", "--precision", "fp32"]
        arguments += ["--prior-images", "64", "--local-images", "64", "--batch-size", "8", "--clients", "2"]
        arguments += ["--rounds", "2", "--fraction", "0.5", "--alpha", "5", "--references", "30", "--samples", "16"]
        arguments += ["--sampling-steps", "2", "--rates", "0.001,0.01", "--seeds", "2", "--arms", ARMS, *options]
        return cli.run(app, "maskdm-server", arguments)

    return run


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "tiny", {"dim": 16, "depth": 2, "heads": 2})


def test_all_arms_run_and_the_same_command_again_adds_nothing(
    experiment: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert experiment() == 0
    shown = capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(results["runs"]) == set(ARMS.split(","))
    for arm, runs in results["runs"].items():
        assert [run["seed"] for run in runs] == [0, 1], arm
        assert runs[0]["lr"] == runs[1]["lr"]  # the rate is chosen with the first seed
        totals = {run["curve"][-1]["flops"] for run in runs}
        assert len(totals) == 1
    folder = tmp_path / "out" / "runs"
    assert sorted(p.name for p in (folder / "masked").iterdir() if "seed0" in p.name) == [
        "seed0-lr0.001",
        "seed0-lr0.01",
    ]
    assert len([p for p in (folder / "masked").iterdir() if "seed1" in p.name]) == 1
    for kept in (folder / "federated-skewed" / "seed0-lr0.01", folder / "masked" / "seed0-lr0.001"):
        assert (kept / "samples.png").exists()
        assert load_checkpoint(kept / "model.safetensors")[1].mask.kind == "none"
    assert shown == (tmp_path / "out" / "results.md").read_text()
    assert "| federated-skewed | 1 |" in shown
    page = (tmp_path / "out" / "results.html").read_text()
    assert page.count("<img") == len(results["runs"])
    assert all(sentence in page for sentence in results["sentences"])
    assert "unmasked" in (tmp_path / "out" / "curves.svg").read_text()
    before = {path: path.read_bytes() for path in folder.rglob("curve.jsonl")}
    assert experiment() == 0
    assert {path: path.read_bytes() for path in folder.rglob("curve.jsonl")} == before


def test_an_interrupted_run_goes_on_to_the_same_numbers(
    experiment: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--arms", "scratch", "--rates", "0.01", "--seeds", "1")
    assert experiment(*options) == 0
    judged = Judge.judge
    calls = 0

    def stopping(self: Judge, weights: dict[str, torch.Tensor], seed: int) -> dict[str, object]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return judged(self, weights, seed)

    monkeypatch.setattr(Judge, "judge", stopping)
    assert experiment(*options, out="again") == 130
    monkeypatch.setattr(Judge, "judge", judged)
    assert experiment(*options, out="again") == 0
    curves = [read_lines(next((tmp_path / out).rglob("curve.jsonl"))) for out in ("out", "again")]
    assert curves[0] == curves[1]


@pytest.mark.parametrize("arm", ["scratch", "federated"])
def test_a_run_stopped_after_its_last_measurement_still_leaves_its_model_and_picture(
    experiment: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arm: str
) -> None:
    options = ("--arms", arm, "--rates", "0.01", "--seeds", "1")
    with monkeypatch.context() as stopped:
        stopped.setattr(training, "save_png", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert experiment(*options) == 130
    (kept,) = (tmp_path / "out" / "runs").rglob("curve.jsonl")
    model, curve = kept.with_name("model.safetensors"), kept.read_bytes()
    before = load_checkpoint(model)[0]
    model.unlink()
    assert experiment(*options) == 0
    after = load_checkpoint(model)[0]
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert kept.read_bytes() == curve
    assert kept.with_name("samples.png").exists()


def test_a_public_corpus_with_held_out_images_is_refused(
    experiment: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "local.npz").rename(tmp_path / "public.npz")
    with np.load(tmp_path / "public.npz", allow_pickle=False) as public:
        np.savez(tmp_path / "local.npz", images=public["images"], labels=public["labels"])
    assert experiment() == 2
    assert "--public holds 60 of the images that --local holds out" in capsys.readouterr().err


def test_skewed_sites_without_labels_are_refused_before_anything_is_trained(
    experiment: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with np.load(tmp_path / "local.npz", allow_pickle=False) as local:
        images_alone = local["images"]
    np.savez(tmp_path / "local.npz", images=images_alone)
    assert experiment() == 2
    assert "needs labels" in capsys.readouterr().err
    assert not (tmp_path / "out" / "priors").exists()


def test_another_experiment_is_not_mixed_in(experiment: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert experiment("--arms", "scratch", "--rates", "0.01", "--seeds", "1") == 0
    assert experiment("--arms", "scratch", "--rates", "0.01", "--seeds", "2") == 0  # more seeds are the same experiment
    assert experiment("--arms", "scratch", "--rates", "0.01", "--local-images", "128") == 2
    assert "local_images" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--references", "100"), "--references 100"),
        (("--arms", "nonsense"), "--arms nonsense"),
        (("--arms", "mask=block:0.5:3"), "--block-size 3 does not divide"),
        (("--rates", "fast"), "--rates fast"),
        (("--clients", "3"), "cannot be shared out"),
    ],
)
def test_mistakes_are_one_line(
    experiment: Callable[..., int], capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    assert experiment(*options) == 2
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert message in error


def small_config(**more: object) -> ExperimentConfig:
    model = ModelConfig(image_size=8, channels=1, patch_size=2, dim=16, depth=2, heads=2)
    mask = MaskConfig(kind="patch", ratio=0.5)
    return ExperimentConfig.model_validate(
        {"model": model, "diffusion": DiffusionConfig(), "mask": mask, "fraction": 0.5, **more}
    )


def test_images_of_one_group_and_equal_images_are_held_out_together() -> None:
    random = np.random.default_rng(2)
    pixels = random.integers(0, 256, (200, 1, 8, 8), np.uint8)
    pixels[100:110] = pixels[:10]
    corpus = in_memory(pixels)
    corpus.index["group"][20:80] = np.arange(60) // 5 + 1
    parted = images.part(corpus, 30)
    sides = {"local": parted.local, "validation": parted.validation, "test": parted.test}
    assert (len(parted.validation), len(parted.test)) == (30, 30)
    of_group: dict[object, set[str]] = {}
    for side, rows in sides.items():
        for row in rows.tolist():
            group = int(corpus.index["group"][row])
            of_group.setdefault(group or corpus.index["sha256"][row].tobytes(), set()).add(side)
    assert [found for found in of_group.values() if len(found) > 1] == []
    assert len(parted.local) >= 120


def test_a_strong_skew_over_few_labels_is_drawn_until_every_site_has_images() -> None:
    corpus = in_memory(
        np.random.default_rng(3).integers(0, 256, (4000, 1, 8, 8), np.uint8), ["a", "b", "c", "c"] * 1000
    )
    config = small_config(alpha=0.1)
    public = in_memory(np.zeros((1, 1, 8, 8), np.uint8))
    images.check(images.part(corpus, 50), public, config, arms_named(["federated-skewed"], config.mask))


def test_pooled_and_federated_arms_train_on_the_same_images(tmp_path: Path) -> None:
    """Equal and skewed sites too: a slice is chosen by content, wherever an image lies."""
    random = np.random.default_rng(1)
    labels = ["a", "b"] * 200
    corpus = in_memory(random.integers(0, 256, (400, 1, 8, 8), np.uint8), labels)
    config = small_config(clients=2, alpha=1.0)
    parted = images.part(corpus, 50)
    assert not set(parted.local) & {*parted.validation, *parted.test}
    kinds: tuple[Sites, ...] = ("iid", "skewed")
    pools = [images.pool(images.make_sites(parted, config, kind, tmp_path / kind, seed=3)) for kind in kinds]
    assert {image.tobytes() for image in pools[0]} == {image.tobytes() for image in pools[1]}
    held_out = {corpus.pixels[row].tobytes() for row in (*parted.validation, *parted.test)}
    assert not held_out & {image.tobytes() for image in pools[0]}
    assert 0.35 * 300 < len(pools[0]) < 0.55 * 300
