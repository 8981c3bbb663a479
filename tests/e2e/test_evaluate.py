"""`evaluate` as a real process: a trained model gets better numbers than an untrained one, and noise the worst."""

from pathlib import Path

import numpy as np
import pytest
import torch

from maskdm.evaluation.extractors.feature_net import FeatureNetConfig, save_feature_net, train_feature_net
from maskdm.evaluation.record import Evaluation, read_record
from maskdm.networks.model import build_model
from maskdm.run.runfolder import sha256_of
from maskdm.training.checkpoint import describe_checkpoint, save_checkpoint
from maskdm_server.lab.faces import SITES, draw_faces

from .conftest import Started

pytestmark = pytest.mark.slow


@pytest.fixture
def place(workplace: Path, prior: Path) -> Path:
    """Real faces that no model saw, noise, an untrained model, and a feature network."""
    np.savez(workplace / "real.npz", images=draw_faces(200, size=16, seed=5))
    noise = np.random.default_rng(0).integers(0, 256, (100, 16, 16, 3), dtype=np.uint8)
    np.savez(workplace / "noise.npz", images=noise)
    metadata = describe_checkpoint(prior)
    save_checkpoint(workplace / "untrained.safetensors", dict(build_model(metadata.model).named_parameters()), metadata)
    # Domains of faces to tell apart, and noise.
    kinds = [*(draw_faces(100, site, size=16) for site in SITES), noise]
    config = FeatureNetConfig(name="faces", image_size=16, channels=3, classes=len(kinds), width=8, features=16)
    labels = torch.arange(len(kinds)).repeat_interleave(100)
    images = torch.from_numpy(np.moveaxis(np.concatenate(kinds), 3, 1).copy())
    net = train_feature_net(images, labels, config, epochs=8)
    save_feature_net(workplace / "faces.safetensors", net, config)
    return workplace


def start(place: Path, name: str, *arguments: str) -> Started:
    common = [
        "--reference",
        "real.npz",
        "--features",
        "faces.safetensors",
        "--resamples",
        "100",
        "--json",
        f"{name}.json",
    ]
    small = ["--batch-size", "50", "--precision", "fp32"]
    small += [] if "--samples" in arguments else ["--count", "100", "--steps", "10"]
    command = ["maskdm-server", "evaluate", *common, *small, *arguments]
    return Started(command, place, name, MASKDM_CACHE=str(place / "cache"))


def test_better_models_get_better_numbers_and_real_features_are_computed_once(
    place: Path, prior: Path, public_corpus: Path
) -> None:
    trained_run = start(place, "trained", "--model", str(prior), "--train", str(public_corpus))
    noise_run = start(place, "noise", "--samples", "noise.npz")  # at the same time, with the same cache
    assert trained_run.wait() == 0, trained_run.output()
    assert noise_run.wait() == 0, noise_run.output()
    untrained_run = start(place, "untrained", "--model", "untrained.safetensors")
    assert untrained_run.wait() == 0, untrained_run.output()
    assert "features of --reference: from the cache" in untrained_run.output()
    assert "samples: 100/100" in untrained_run.output()

    trained, untrained, noise = (read_record(place / f"{name}.json") for name in ("trained", "untrained", "noise"))
    for name in ("FD-faces", "KD-faces"):
        numbers = [found.metrics[name] for found in (trained, untrained, noise)]
        assert numbers[0].value < min(numbers[1].value, numbers[2].value), name
        assert numbers[0].high is not None
        assert numbers[0].high < min(number.low or 0 for number in numbers[1:]), name
        floor = numbers[0].floor
        assert floor is not None
        assert floor < numbers[0].value
    assert trained.metrics["memorisation"].value > 0.5
    check_facts(trained, place, prior)


def check_facts(found: Evaluation, place: Path, prior: Path) -> None:
    assert found.model_sha256 == sha256_of(prior)
    assert found.images_seen >= 4000
    assert found.extractor.sha256 == sha256_of(place / "faces.safetensors")
    assert (found.sampling.count, found.sampling.sampler, found.sampling.steps) == (100, "dpmpp", 10)
    assert (found.reference.images, found.reference.split) == (200, "all")
    assert found.training
    assert found.training.images == 400
    assert (place / "trained.png").exists()


def test_the_same_command_gives_the_same_numbers(place: Path, prior: Path) -> None:
    runs = [start(place, name, "--model", str(prior)) for name in ("one", "two")]
    assert [run.wait() for run in runs] == [0, 0], runs[0].output()
    one, two = (read_record(place / f"{name}.json") for name in ("one", "two"))
    assert one.metrics == two.metrics
    assert one.name() == two.name()
