"""Packed corpus → batches, with no per-image Python: an epoch is a seeded permutation that a resumed run continues."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..seeding import derive_seed
from .corpus import Corpus
from .pixels import Pixels

Batch = tuple[Tensor, Tensor | None]
# Share of an accelerator's free memory that a corpus may take; the rest is for the network.
DEVICE_SHARE = 0.25


def class_numbers(corpus: Corpus, names: Sequence[str]) -> Tensor | None:
    """Labels as numbers of the model's classes, (N,) int64, −1 for any other; None for an unconditional model."""
    if not names:
        return None
    number = {name: i for i, name in enumerate(names)}
    numbers = np.array([number.get(label, -1) for label in corpus.labels] + [-1], np.int64)  # −1 is the last
    return torch.from_numpy(numbers[corpus.index["label"]])


def batch_rows(count: int, batch_size: int, images_seen: int, seed: int) -> NDArray[np.int64]:
    """Rows of the next batch in an endless sequence of seeded permutations (epochs), from `images_seen` on.

    A pure function of its arguments, so that a resumed run sees what an uninterrupted one sees. (batch_size,)
    """
    rows = []
    position = images_seen
    while (missing := images_seen + batch_size - position) > 0:
        epoch, start = divmod(position, count)
        rows.append(_permutation(count, seed, epoch)[start : start + missing])
        position += len(rows[-1])
    return np.concatenate(rows)


def batches(
    images: Pixels | Tensor,
    batch_size: int,
    images_seen: int,
    seed: int,
    *,
    rows: NDArray[np.int64] | None = None,
    classes: Tensor | None = None,
    share: tuple[int, int] = (0, 1),
    device: torch.device | str = "cpu",
) -> Iterator[Batch]:
    """Endless batches after `images_seen`: uint8 images (batch, C, S, S) and classes (batch,) or None.

    A corpus that fits is kept on an accelerator; otherwise the next batch is gathered from the mapped file while the
    present one is trained on.

    Args:
        images: uint8 (N, C, S, S), perhaps mapped from a file.
        rows: which of them to use; all where None.
        classes: of every one of them, (N,).
        share: this process's number and how many there are; each gets its part of every batch.
    """
    device = torch.device(device)
    pixels = torch.as_tensor(images)
    rows = np.arange(len(pixels)) if rows is None else rows
    number, processes = share
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if len(rows) * pixels[0].nbytes < DEVICE_SHARE * free:
            pixels = pixels[torch.from_numpy(rows)].to(device)
            classes = None if classes is None else classes[torch.from_numpy(rows)].to(device)
            rows = np.arange(len(rows))

    def gather(seen: int) -> Batch:
        assert rows is not None
        chosen = torch.from_numpy(rows[batch_rows(len(rows), batch_size, seen, seed)[number::processes]])
        chosen = chosen.to(pixels.device, non_blocking=True)
        found = pixels.index_select(0, chosen)  # copies whole images, where indexing goes byte by byte
        if device.type == "cuda" and not found.is_cuda:
            found = found.pin_memory()
        return found, None if classes is None else classes[chosen]

    with ThreadPoolExecutor(1, "batches") as ahead:
        following = ahead.submit(gather, images_seen)
        while True:
            batch = following.result()
            images_seen += batch_size
            following = ahead.submit(gather, images_seen)
            yield batch


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of one epoch; kept, since a run asks for the same one again and again."""
    return np.random.default_rng(derive_seed("epoch", seed, epoch)).permutation(count)
