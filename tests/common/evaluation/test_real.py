"""Which real images generated ones are compared with."""

from pathlib import Path

import numpy as np
import pytest

from maskdm.data.corpus import in_both
from maskdm.data.pixels import PixelPolicy
from maskdm.errors import DataError
from maskdm.evaluation.extractors.features import Extractor
from maskdm.evaluation.real import Real, load_real

POLICY = PixelPolicy(image_size=8, channels=1)


def source(folder: Path, train: int, test: int, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (train + test, 8, 8), dtype=np.uint8)
    folder.mkdir(exist_ok=True)
    if test:
        labels = np.arange(train + test) % 2
        np.savez(
            folder / "images.npz",
            x_train=images[:train],
            y_train=labels[:train],
            x_test=images[train:],
            y_test=labels[train:],
        )
    else:
        np.savez(folder / "images.npz", images=images)
    return folder / "images.npz"


def load(path: Path, extractor: Extractor, part: str = "auto", labels: tuple[str, ...] = ()) -> Real:
    return load_real(path, POLICY, extractor, option="--reference", part=part, labels=labels)  # type: ignore[arg-type]


def test_held_out_images_are_the_reference_where_there_are_any(tmp_path: Path, extractor: Extractor) -> None:
    path = source(tmp_path / "a", 12, 6)
    found = load(path, extractor)
    assert (found.part, len(found.rows)) == ("test", 6)
    assert {found.corpus.split(int(row)) for row in found.rows} == {"test"}
    assert (load(path, extractor, "train").part, len(load(path, extractor, "train").rows)) == ("train", 12)
    assert len(load(path, extractor, "all").rows) == 18
    plain = load(source(tmp_path / "b", 12, 0), extractor)
    assert (plain.part, len(plain.rows)) == ("all", 12)


def test_with_labels_only_images_of_these_are_compared(tmp_path: Path, extractor: Extractor) -> None:
    found = load(source(tmp_path / "a", 12, 6), extractor, labels=("1",))
    assert {found.corpus.label(int(row)) for row in found.rows} == {"1"}
    assert len(found.rows) == 3
    unlabelled = load(source(tmp_path / "b", 12, 0), extractor, labels=("1",))
    assert len(unlabelled.rows) == 12
    with pytest.raises(DataError, match="has no images of class 7: it has"):
        load(source(tmp_path / "c", 12, 6), extractor, labels=("7",))


def test_images_that_both_have_are_counted(tmp_path: Path, extractor: Extractor) -> None:
    path = source(tmp_path / "a", 12, 6)
    held, everything, train = (load(path, extractor, part) for part in ("test", "all", "train"))
    assert in_both(held.records, everything.records) == 6
    assert in_both(held.records, train.records) == 0


def test_too_few_images_and_images_of_another_size_are_named(tmp_path: Path, extractor: Extractor) -> None:
    path = source(tmp_path / "a", 12, 1)
    with pytest.raises(DataError, match=r"--reference .* has 1 images in its part test \(of 13 in all\)"):
        load(path, extractor)
    with pytest.raises(DataError, match=r"--reference .* has 0 images in its part validation"):
        load(path, extractor, "validation")
    corpus = load(path, extractor, "train").corpus.path
    assert corpus
    with pytest.raises(DataError, match=r"--reference .* was packed at 8x8 pixels with 1 channels"):
        load_real(corpus, PixelPolicy(image_size=4, channels=1), extractor, option="--reference", part="all")
