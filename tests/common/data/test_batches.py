"""Batches come from the packed file and continue where they stopped."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from maskdm.data.batches import batch_rows, batches, class_numbers
from maskdm.data.corpus import in_memory


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
