"""Feature networks: known by their hashes, checked as they are read, the same whatever the batch size."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from maskdm.errors import UsageError
from maskdm.evaluation.extractors.feature_net import KEY, FeatureNet, FeatureNetConfig, save_feature_net
from maskdm.evaluation.extractors.features import open_extractor, random_extractor


def images(count: int, channels: int = 3, size: int = 20) -> Tensor:
    randomness = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, channels, size, size), generator=randomness, dtype=torch.uint8)


@pytest.fixture
def small_net(tmp_path: Path) -> Path:
    config = FeatureNetConfig(name="cells", image_size=16, channels=1, classes=2, width=4, features=8)
    torch.manual_seed(0)
    save_feature_net(tmp_path / "cells.safetensors", FeatureNet(config), config)
    return tmp_path / "cells.safetensors"


@pytest.fixture
def mobilenet() -> Path:
    path = Path(os.environ.get("MASKDM_DATA", "../shared/data")) / "mobilenetv2_imagenet_int8.npz"
    if not path.exists():
        pytest.skip(f"no {path}: set MASKDM_DATA to the folder of the real images")
    return path


def test_distances_in_a_network_are_named_after_it(small_net: Path) -> None:
    extractor = open_extractor(small_net)
    assert (extractor.frechet, extractor.kernel) == ("FD-cells", "KD-cells")
    assert extractor.resize == "bilinear, antialias, to 16x16"


def test_features_do_not_depend_on_the_batch_size_and_progress_is_told(small_net: Path) -> None:
    extractor, told = open_extractor(small_net), list[int]()
    whole = extractor.features(images(7), batch_size=7)
    assert whole.shape == (7, 8)
    assert torch.allclose(extractor.features(images(7), batch_size=3, progress=told.append), whole, atol=1e-5)
    assert told == [3, 6, 7]


def test_a_network_of_grey_images_sees_colours_as_their_mean(small_net: Path) -> None:
    extractor = open_extractor(small_net)
    grey = images(3, channels=1)
    assert torch.allclose(extractor.features(grey.expand(-1, 3, -1, -1)), extractor.features(grey), atol=1e-5)


def test_random_weights_are_the_same_everywhere_and_leave_the_generator_alone() -> None:
    torch.manual_seed(5)
    first = random_extractor()
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.rand(1).equal(drawn)
    assert first.sha256 == random_extractor().sha256
    assert first.frechet == "FD-random"
    assert first.features(images(4)).equal(random_extractor().features(images(4)))


@pytest.mark.parametrize("name", ["MobileNetV2", "Inception", "random"])
def test_a_network_cannot_take_the_name_of_a_known_one(tmp_path: Path, name: str) -> None:
    config = FeatureNetConfig(name=name, image_size=16, channels=1, classes=2, width=4, features=8)
    save_feature_net(tmp_path / "a.safetensors", FeatureNet(config), config)
    with pytest.raises(UsageError, match="which is another network"):
        open_extractor(tmp_path / "a.safetensors")


def test_damaged_and_foreign_files_are_named(tmp_path: Path, small_net: Path) -> None:
    with pytest.raises(UsageError, match=r"--features .*missing does not exist"):
        open_extractor(tmp_path / "missing")
    (tmp_path / "text").write_text("no network")
    with pytest.raises(UsageError, match="is no feature network that MaskDM knows"):
        open_extractor(tmp_path / "text")
    weights = load_file(small_net)
    about = FeatureNetConfig(name="x", image_size=16, channels=1, classes=2, width=4, features=8).model_dump_json()
    for broken in (
        {**weights, "head.bias": torch.full((2,), torch.nan)},
        {**weights, "head.bias": torch.zeros(3)},
        {name: tensor for name, tensor in weights.items() if name != "head.bias"},
    ):
        save_file(broken, tmp_path / "broken.safetensors", {KEY: about})
        with pytest.raises(UsageError, match="is a damaged feature network"):
            open_extractor(tmp_path / "broken.safetensors")


def test_mobilenet_computes_what_the_reference_computes(mobilenet: Path) -> None:
    spec = importlib.util.spec_from_file_location("mnv2_features", mobilenet.with_name("mnv2_features.py"))
    assert spec
    assert spec.loader
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    extractor = open_extractor(mobilenet)
    assert extractor.frechet == "FD-MobileNetV2"
    for pictures in (images(3), images(2, channels=1, size=28)):
        wanted = reference.MNV2(mobilenet)(pictures)
        assert torch.allclose(extractor.features(pictures), wanted, rtol=1e-4, atol=1e-4)


def test_a_changed_mobilenet_is_refused(mobilenet: Path, tmp_path: Path) -> None:
    (tmp_path / "changed.npz").write_bytes(mobilenet.read_bytes() + b"x")
    with pytest.raises(UsageError, match="is no feature network that MaskDM knows"):
        open_extractor(tmp_path / "changed.npz")
