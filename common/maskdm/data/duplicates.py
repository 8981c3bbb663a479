"""Near-duplicates by perceptual hash: candidates whose difference hashes nearly agree, confirmed on thumbnails.

A hash alone would tie all chest X-rays of a hospital together, since their gross structure is the same.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 16
BITS = 64
BANDS = 8  # candidates agree in at least one; two hashes that differ in less than 8 bits always do
MAX_BITS = 12
# Correlation of two thumbnails, each with mean 0 and length 1. Found on real pictures (blood cells, X-rays, portraits):
# 98 % and more of copies at JPEG quality 50, at half size, 10 % brighter; two pairs among 11,571 pictures themselves.
LEAST_CORRELATION = 0.985


def thumbnail(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """uint8 (C, S, S) → grey (16, 16) with mean 0 and length 1; all 0 for a flat picture."""
    grey = Image.fromarray(pixels.mean(axis=0).round().astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.BOX)
    values = np.asarray(grey, np.float32)
    values = values - values.mean()
    found: NDArray[np.float32] = values / np.float32(max(float(np.linalg.norm(values)), 1e-6))
    return found


def difference_hash(thumbnails: NDArray[np.float32]) -> NDArray[np.uint64]:
    """(N, 16, 16) → (N,): whether each of 8×8 cells is brighter than its right neighbour (after N. Krawetz's dHash)."""
    cells = thumbnails.reshape(-1, 8, 2, SIDE).mean(axis=2)  # (N, 8, 16)
    columns = np.stack([cells[:, :, i : i + 2].mean(axis=2) for i in range(0, 14, 2)] + [cells[:, :, 13:15].mean(2)])
    columns = np.concatenate([columns, cells[None, :, :, 15]])  # (9, N, 8)
    bits = np.moveaxis(columns[1:] > columns[:-1], 0, 2).reshape(len(thumbnails), BITS)  # (N, 64)
    return np.packbits(bits, axis=1).view(np.uint64)[:, 0]


def near_duplicates(thumbnails: NDArray[np.float32]) -> list[tuple[int, int]]:
    """Pairs of rows (first < second) whose hashes differ in at most MAX_BITS bits and whose thumbnails correlate.

    Memory grows with the largest set of equal bands, not with the square of the number of images.
    """
    hashes = difference_hash(thumbnails)
    flat = thumbnails.reshape(len(thumbnails), -1)
    bands = hashes.view(np.uint8).reshape(-1, BANDS)
    pairs: set[tuple[int, int]] = set()
    for band in range(BANDS):
        order = np.argsort(bands[:, band], kind="stable")
        edges = np.flatnonzero(np.diff(bands[order, band])) + 1
        for rows in np.split(order, edges):
            for start in range(0, len(rows), 1024):
                some = rows[start : start + 1024]
                alike = flat[some] @ flat[rows].T >= LEAST_CORRELATION  # (s, r)
                near = np.bitwise_count(hashes[some][:, None] ^ hashes[rows][None]) <= MAX_BITS
                first, second = np.nonzero(alike & near)
                found = zip(some[first].tolist(), rows[second].tolist(), strict=True)
                pairs |= {pair for pair in found if pair[0] < pair[1]}
    return sorted(pairs)
