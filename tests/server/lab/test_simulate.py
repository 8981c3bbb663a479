"""How a simulation shares out images among its clients."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskdm.data.corpus import in_memory
from maskdm.data.sources.source import open_source
from maskdm.errors import UsageError
from maskdm_server.lab.simulate import Rows, split_by_label, split_iid, write_shares


def assert_partition(shares: list[Rows], count: int, clients: int) -> None:
    assert len(shares) == clients
    assert np.array_equal(np.sort(np.concatenate(shares)), np.arange(count))


@given(count=st.integers(1, 200), clients=st.integers(1, 12), seed=st.integers(0, 1000))
def test_equal_shares_give_every_image_to_one_client(count: int, clients: int, seed: int) -> None:
    shares = split_iid(count, clients, seed)
    assert_partition(shares, count, clients)
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


@given(
    labels=st.lists(st.sampled_from(["a", "b", "c", ""]), min_size=20, max_size=200),
    clients=st.integers(1, 6),
    alpha=st.floats(0.05, 100),
    seed=st.integers(0, 1000),
)
def test_shares_by_label_give_every_image_to_one_client_or_are_refused(
    labels: list[str], clients: int, alpha: float, seed: int
) -> None:
    try:
        shares = split_by_label(labels, clients, alpha, seed)
    except UsageError:
        return
    assert_partition(shares, len(labels), clients)
    assert min(len(share) for share in shares) >= 2


def skew(alpha: float) -> float:
    """How far the labels of the clients are from those of all: mean total variation over a few seeds."""
    labels = [str(i % 10) for i in range(5000)]
    found = []
    for seed in range(5):
        for share in split_by_label(labels, 4, alpha, seed):
            frequencies = np.bincount([int(labels[i]) for i in share], minlength=10) / len(share)
            found.append(np.abs(frequencies - 0.1).sum() / 2)
    return float(np.mean(found))


def test_a_smaller_alpha_skews_labels_more() -> None:
    skews = [skew(alpha) for alpha in (0.1, 1.0, 10.0, 1000.0)]
    assert all(before > after for before, after in pairwise(skews))
    assert skews[0] > 0.4
    assert skews[-1] < 0.05


def test_the_same_seed_shares_out_alike_and_another_one_differently() -> None:
    labels = ["a", "b"] * 50
    for first, again, other in (
        [split_iid(100, 3, seed) for seed in (0, 0, 1)],
        [split_by_label(labels, 3, 5.0, seed) for seed in (0, 0, 1)],
    ):
        assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
        assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_a_client_left_without_images_is_refused_with_a_remedy() -> None:
    with pytest.raises(UsageError, match=r"--alpha 0\.5 leaves a client with .* images: raise it"):
        split_by_label(["a", "b", "c"], 3, 0.5, 0)


@pytest.mark.parametrize("channels", [1, 3])
def test_shares_are_files_that_a_client_can_read(tmp_path: Path, channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, channels, 8, 8), dtype=np.uint8)
    shares = [np.array([0, 3, 5]), np.array([1, 2, 4])]
    paths = write_shares(in_memory(pixels, list("abcabc")), shares, tmp_path)
    for path, rows in zip(paths, shares, strict=True):
        entries = list(open_source(path).entries())
        found = np.stack([np.asarray(entry.content).reshape(8, 8, channels) for entry in entries])
        assert np.array_equal(np.moveaxis(found, 3, 1), pixels[rows])
        assert [entry.label for entry in entries] == ["abcabc"[i] for i in rows]


def test_shares_of_an_earlier_start_are_kept(tmp_path: Path) -> None:
    corpus = in_memory(np.zeros((4, 1, 8, 8), np.uint8))
    write_shares(corpus, [np.array([0]), np.array([1, 2, 3])], tmp_path)
    paths = write_shares(corpus, [np.array([0, 1]), np.array([2, 3])], tmp_path)
    assert [open_source(path).count() for path in paths] == [1, 3]
