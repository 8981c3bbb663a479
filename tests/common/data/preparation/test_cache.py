"""A source is packed once, and again when it changed."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskdm.data.pixels import PixelPolicy
from maskdm.data.preparation.cache import load_corpus
from maskdm.data.preparation.pack import pack
from maskdm.data.sources.source import open_source
from maskdm.errors import DataError

POLICY = PixelPolicy(image_size=8, channels=1)


def put(path: Path, count: int, start: int = 0) -> None:
    path.mkdir(parents=True, exist_ok=True)
    for i in range(start, start + count):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(path / f"{i:03}.png")


def test_a_source_is_packed_once_into_the_cache_and_the_user_is_told_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path / "images", 6)
    first = load_corpus(open_source(tmp_path / "images"), POLICY, cache=tmp_path / "cache")
    assert f"once into {first.path}" in capsys.readouterr().err
    again = load_corpus(open_source(tmp_path / "images"), POLICY, cache=tmp_path / "cache")
    assert capsys.readouterr().err == ""
    assert again.manifest == first.manifest
    assert again.path == first.path


def test_a_source_that_changed_is_packed_again_in_the_place_of_the_old_one(tmp_path: Path) -> None:
    put(tmp_path / "images", 6)
    old = load_corpus(open_source(tmp_path / "images"), POLICY, cache=tmp_path / "cache")
    before = np.array(old.pixels)
    put(tmp_path / "images", 2, start=6)
    new = load_corpus(open_source(tmp_path / "images"), POLICY, cache=tmp_path / "cache")
    assert (len(old), len(new)) == (6, 8)
    assert new.path == old.path
    assert np.array_equal(old.pixels, before)  # whoever still trains on the old one keeps it


def test_a_damaged_cache_is_packed_again(tmp_path: Path) -> None:
    put(tmp_path / "images", 6)
    first = load_corpus(open_source(tmp_path / "images"), POLICY, cache=tmp_path / "cache")
    assert first.path
    wanted, file = np.array(first.pixels), first.path / "images.npy"
    file.write_bytes(file.read_bytes()[:-9])
    again = load_corpus(open_source(tmp_path / "images"), POLICY, cache=tmp_path / "cache")
    assert np.array_equal(again.pixels, wanted)


def test_a_packed_corpus_of_another_size_names_the_remedy(tmp_path: Path) -> None:
    put(tmp_path / "images", 4)
    pack(open_source(tmp_path / "images"), tmp_path / "corpus", POLICY)
    source = open_source(tmp_path / "corpus")
    assert load_corpus(source, POLICY).path == tmp_path / "corpus"
    with pytest.raises(DataError, match=r"packed at 8x8 pixels with 1 channels.*prepare --image-size 4 --channels 1"):
        load_corpus(source, PixelPolicy(image_size=4, channels=1))


def test_a_cache_that_cannot_be_written_names_the_remedy(tmp_path: Path) -> None:
    put(tmp_path / "images", 2)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="set MASKDM_CACHE to another folder"):
        load_corpus(open_source(tmp_path / "images"), POLICY, cache=tmp_path / "file" / "cache")


def test_training_images_are_those_of_no_test_or_validation_part(tmp_path: Path) -> None:
    put(tmp_path / "images" / "train" / "cat", 4)
    put(tmp_path / "images" / "test" / "cat", 3, start=10)
    corpus = load_corpus(open_source(tmp_path / "images"), POLICY, cache=tmp_path / "cache")
    assert len(corpus.training_rows) == 4
    assert {corpus.split(int(row)) for row in corpus.training_rows} == {"train"}
    assert "3 left out: test" in corpus.summary()


def test_a_corpus_of_test_images_alone_cannot_be_trained_on(tmp_path: Path) -> None:
    put(tmp_path / "images" / "test" / "cat", 3)
    corpus = load_corpus(open_source(tmp_path / "images"), POLICY, cache=tmp_path / "cache")
    with pytest.raises(DataError, match="every image lies in a folder named test"):
        _ = corpus.training_rows
