"""A federation on one machine: real clients on loopback, each with its share of the images."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from maskdm.data.corpus import Corpus
from maskdm.errors import UsageError
from maskdm.run.processes import Child, script
from maskdm.seeding import derive_seed

Rows = NDArray[np.int64]


def split_iid(count: int, clients: int, seed: int) -> list[Rows]:
    """Equal random shares of `count` images; every image goes to one client."""
    order = np.random.default_rng(derive_seed("iid split", seed)).permutation(count)
    return [np.sort(share) for share in np.array_split(order, clients)]


def split_by_label(labels: Sequence[str], clients: int, alpha: float, seed: int) -> list[Rows]:
    """Dirichlet label skew (Hsu et al. 2019, arXiv 1909.06335): each label is shared out by Dir(alpha).

    A small alpha gives each client few labels, a large one nears IID. Every image goes to one client.

    Raises:
        UsageError: some client would be left with fewer than two images.
    """
    rng = np.random.default_rng(derive_seed("label split", seed))
    shares: list[list[int]] = [[] for _ in range(clients)]
    for label in sorted(set(labels)):
        rows = rng.permutation([i for i, found in enumerate(labels) if found == label])
        edges = (np.cumsum(rng.dirichlet([alpha] * clients))[:-1] * len(rows)).round().astype(int)
        for share, part in zip(shares, np.split(rows, edges), strict=True):
            share.extend(part.tolist())
    smallest = min(len(share) for share in shares)
    if smallest < 2:
        raise UsageError(f"--alpha {alpha} leaves a client with {smallest} images: raise it, or use fewer --clients")
    return [np.sort(np.array(share, dtype=np.int64)) for share in shares]


def write_shares(corpus: Corpus, shares: Sequence[Rows], folder: Path) -> list[Path]:
    """One `.npz` of images and labels for each client; existing ones of an earlier start are kept.

    Args:
        shares: places in `corpus.training_rows`.
    """
    paths = []
    for number, share in enumerate(shares, start=1):
        path = folder / f"site-{number}" / "images.npz"
        if not path.exists():
            rows = corpus.training_rows[share]
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name("images.tmp.npz")
            pixels = np.moveaxis(corpus.pixels[rows], 1, 3)  # (n, H, W, C)
            np.savez(temporary, images=pixels, labels=np.array([corpus.label(row) for row in rows]))
            temporary.replace(path)
        paths.append(path)
    return paths


def start_clients(data: Sequence[Path], folder: Path, server: str, options: Sequence[str]) -> list[Child]:
    """Start a real `maskdm-client` for each path, sharing out the machine's cores."""
    threads = max(1, (os.cpu_count() or 1) // len(data))
    return [
        Child(
            [
                *(script("maskdm-client"), "--data", str(path), "--server", server),
                *("--out", str(folder / f"site-{number}" / "client"), "--threads", str(threads), *options),
            ],
            log=folder / f"site-{number}" / "client.log",
        )
        for number, path in enumerate(data, start=1)
    ]
