"""Who has which images: held-out references that no arm sees, and sites of which each uses a slice.

The slice is the one that a real client would take, so that pooled and federated arms train on the same images.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from maskdm.data.corpus import Corpus
from maskdm.data.pixels import Pixels
from maskdm.errors import UsageError
from maskdm.seeding import derive_seed
from maskdm_server.experiment.arms import Sites
from maskdm_server.experiment.budget import ExperimentConfig
from maskdm_server.inline import CLIENT, write_settings
from maskdm_server.simulate import Rows, split_by_label, split_iid, write_shares

MOST_TRIES = 100  # a small concentration may leave a site with next to nothing


@dataclass(frozen=True)
class LocalImages:
    """The local corpus, parted once for all arms and seeds. Rows of the corpus."""

    corpus: Corpus
    local: Rows  # of the sites, all together
    validation: Rows  # to choose rates and the best point by
    test: Rows  # to report

    def pixels(self, rows: Rows) -> Tensor:
        """uint8 (n, C, S, S)."""
        return torch.from_numpy(np.ascontiguousarray(self.corpus.pixels[rows]))


def part(corpus: Corpus, references: int) -> LocalImages:
    """Hold out `references` images to choose by, and as many to report.

    Raises:
        UsageError: too few would be left.
    """
    rows = corpus.training_rows
    if 2 * references > len(rows) // 2:
        raise UsageError(
            f"--references {references}: twice as many are held out, but --local holds {len(rows):,} images: give at "
            f"most {len(rows) // 4:,}"
        )
    order = np.random.default_rng(derive_seed("references")).permutation(rows)
    return LocalImages(
        corpus,
        np.sort(order[2 * references :]),
        np.sort(order[:references]),
        np.sort(order[references : 2 * references]),
    )


def make_sites(images: LocalImages, config: ExperimentConfig, sites: Sites, folder: Path, seed: int) -> list[Path]:
    """Folders of the sites' clients, with settings and chosen slices.

    Raises:
        UsageError: skew is wanted without labels, or leaves sites without images.
    """
    paths = write_shares(images.corpus, _shares(images, config, sites, seed), folder)
    settings = {"fraction": config.fraction, "seed": seed, "held_out": 0.1, "precision": config.precision, "threads": 0}
    folders = write_settings(paths, folder, settings)
    join: Callable[[Path], None] = import_module(CLIENT).join
    for site in folders:
        join(site)
    return folders


def pool(folders: list[Path]) -> Pixels:
    """Pixels that the sites of these folders train on, all together (n, C, S, S)."""
    found = []
    for folder in folders:
        chosen = json.loads((folder / "slice.json").read_text())["train"]
        with np.load(folder.parent / "images.npz", allow_pickle=False) as stored:
            found += [image for image in stored["images"] if hashlib.sha256(image.tobytes()).hexdigest() in chosen]
    return np.ascontiguousarray(np.moveaxis(np.stack(found), 3, 1))


def _shares(images: LocalImages, config: ExperimentConfig, sites: Sites, seed: int) -> list[Rows]:
    """Places in `corpus.training_rows`."""
    place = {row: i for i, row in enumerate(images.corpus.training_rows.tolist())}
    local = images.local
    if sites == "skewed":
        labels = [images.corpus.label(row) for row in local]
        if len(set(labels)) < 2:
            raise UsageError("--arms federated-skewed needs labels: sub-folders, or an .npz with an array 'labels'")
        parts = _skewed(labels, config, seed)
    else:
        parts = split_iid(len(local), config.clients, seed)
    return [np.array([place[row] for row in local[rows].tolist()], np.int64) for rows in parts]


def _skewed(labels: list[str], config: ExperimentConfig, seed: int) -> list[Rows]:
    """The first draw that leaves every site with images to use."""
    least = 20 / config.fraction
    for attempt in range(MOST_TRIES):
        parts = split_by_label(labels, config.clients, config.alpha, derive_seed("skew", seed, attempt))
        if min(len(rows) for rows in parts) >= least:
            return parts
    raise UsageError(f"--alpha {config.alpha} leaves a site with next to no images: raise it, or use fewer --clients")
