"""A source is packed once; batches come from the packed file and continue where they stopped."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from maskdm.corpus import in_memory
from maskdm.data import batch_rows, batches, class_numbers, load_corpus
from maskdm.errors import DataError
from maskdm.images import PixelPolicy
from maskdm.packing import pack
from maskdm.sources import open_source

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


@given(count=st.integers(1, 40), epochs=st.integers(1, 4), seed=st.integers(0, 1000))
def test_every_epoch_is_a_permutation(count: int, epochs: int, seed: int) -> None:
    rows = batch_rows(count, count * epochs, 0, seed).reshape(epochs, count)
    assert (np.sort(rows, axis=1) == np.arange(count)).all()


@given(count=st.integers(1, 30), sizes=st.lists(st.integers(1, 50), min_size=1, max_size=8), start=st.integers(0, 99))
def test_any_division_into_batches_gives_the_same_sequence(count: int, sizes: list[int], start: int) -> None:
    whole = batch_rows(count, sum(sizes), start, 3)
    parts, seen = [], start
    for size in sizes:
        parts.append(batch_rows(count, size, seen, 3))
        assert len(parts[-1]) == size
        seen += size
    assert np.array_equal(np.concatenate(parts), whole)
    assert np.array_equal(whole, batch_rows(count, start + sum(sizes), 0, 3)[start:])


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    first, second = batch_rows(50, 100, 0, 0).reshape(2, 50)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, batch_rows(50, 50, 0, 1))


def test_batches_hold_the_rows_of_the_sequence() -> None:
    pixels = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 1, 8, 8)
    order = batches(pixels, 4, 8, 1)
    found = [row for _ in range(3) for row in next(order)[0][:, 0, 0, 0].tolist()]
    assert found == batch_rows(10, 12, 8, 1).tolist()


def test_classes_come_with_their_images_and_processes_share_each_batch() -> None:
    pixels = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1)
    whole, _ = next(batches(pixels, 6, 0, 1))
    parts = [next(batches(pixels, 6, 0, 1, classes=torch.arange(10) * 7, share=(i, 3))) for i in range(3)]
    assert all(len(images) == 2 for images, _ in parts)
    assert sorted(torch.cat([images for images, _ in parts]).flatten().tolist()) == sorted(whole.flatten().tolist())
    for images, kinds in parts:
        assert kinds is not None
        assert kinds.tolist() == [7 * value for value in images.flatten().tolist()]


def test_labels_become_the_numbers_of_the_models_classes() -> None:
    corpus = in_memory(np.zeros((4, 1, 8, 8), np.uint8), ["dog", "cat", "bird", "cat"])
    found = class_numbers(corpus, ("cat", "dog"))
    assert found is not None
    assert found.tolist() == [1, 0, -1, 0]
    assert class_numbers(corpus, ()) is None
    unlabelled = class_numbers(in_memory(np.zeros((2, 1, 8, 8), np.uint8)), ("cat",))
    assert unlabelled is not None
    assert unlabelled.tolist() == [-1, -1]


def test_only_the_wanted_rows_are_seen_each_once_an_epoch() -> None:
    pixels = np.arange(10, dtype=np.uint8).reshape(10, 1, 1, 1)
    order = batches(pixels, 2, 0, 1, rows=np.array([1, 4, 5, 9]), classes=torch.arange(10) * 3)
    for _ in range(3):
        epoch = [next(order) for _ in range(2)]
        assert sorted(int(v) for images, _ in epoch for v in images.flatten()) == [1, 4, 5, 9]
        assert all(torch.equal(kinds, images.flatten() * 3) for images, kinds in epoch if kinds is not None)
