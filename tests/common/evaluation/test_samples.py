"""Generated images in blocks: the same whatever the batch size, and files of others checked."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maskdm.config import DiffusionConfig, ModelConfig
from maskdm.errors import DataError
from maskdm.evaluation import samples
from maskdm.evaluation.samples import StoredSamples, drawn, proportional_classes
from maskdm.networks.model import build_model


@pytest.mark.parametrize("sampler", ["dpmpp", "ddpm"])
def test_the_same_seed_draws_the_same_images_whatever_the_batch_size(
    tiny: ModelConfig, monkeypatch: pytest.MonkeyPatch, sampler: str
) -> None:
    monkeypatch.setattr(samples, "BLOCK", 6)
    model, told = build_model(tiny), list[int]()

    def draw(batch_size: int, seed: int = 0) -> torch.Tensor:
        options = {"sampler": sampler, "steps": 4, "seed": seed, "batch_size": batch_size, "progress": told.append}
        blocks = list(drawn(model, DiffusionConfig(timesteps=50), 14, **options))  # type: ignore[arg-type]
        assert [len(block) for block in blocks] == [6, 6, 2]
        return torch.cat(blocks)

    first = draw(6)
    assert told == [6, 12, 14]
    others = draw(2)
    assert (first.int() - others.int()).abs().max() <= 1  # a last digit in sums
    assert not first.equal(draw(6, seed=1))
    assert len({image.numpy().tobytes() for image in first}) == 14, "a block repeats another"


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(1, 200))
def test_each_class_is_drawn_as_often_as_it_occurs(sizes: list[int], count: int) -> None:
    classes = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    found = torch.bincount(proportional_classes(classes, count, 0), minlength=len(sizes))
    assert int(found.sum()) == count
    assert all(abs(int(n) - count * size / sum(sizes)) <= 1 for n, size in zip(found, sizes, strict=True))


def test_classes_stand_in_random_order_that_the_seed_gives() -> None:
    classes = torch.arange(2).repeat_interleave(50)
    first = proportional_classes(classes, 100, 0)
    assert first.equal(proportional_classes(classes, 100, 0))
    assert not first.equal(first.sort().values)
    assert not first.equal(proportional_classes(classes, 100, 1))


@pytest.mark.parametrize("shape", [(5, 8, 8), (5, 8, 8, 1), (5, 8, 8, 3), (5, 3, 8, 8)])
def test_files_of_images_are_read_in_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]
) -> None:
    monkeypatch.setattr(samples, "BLOCK", 2)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=images)
    stored = StoredSamples(tmp_path / "a.npz")
    channels = 1 if len(shape) == 3 or shape[3] == 1 else 3
    assert (stored.count, stored.channels, stored.image_size) == (5, channels, 8)
    used: list[int] = []
    blocks = list(stored.blocks(used.append))
    assert used == [2, 4, 5]
    assert [tuple(block.shape) for block in blocks] == [(n, channels, 8, 8) for n in (2, 2, 1)]
    wanted = images if shape[1] == 3 else np.moveaxis(images.reshape(5, 8, 8, channels), 3, 1)
    assert np.array_equal(torch.cat(blocks).numpy(), wanted)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((1, 8, 8), np.uint8), "holds one image"),
        (np.zeros((4, 8, 9), np.uint8), "images of 9x8 pixels; give square ones"),
        (np.zeros((4, 8, 8), np.float32), "needs uint8 images"),
    ],
)
def test_files_of_something_else_are_named(tmp_path: Path, images: np.ndarray, message: str) -> None:
    np.savez(tmp_path / "a.npz", images=images)
    with pytest.raises(DataError, match=f"--samples .*{message}"):
        StoredSamples(tmp_path / "a.npz")
    with pytest.raises(DataError, match="--samples"):
        StoredSamples(tmp_path)
