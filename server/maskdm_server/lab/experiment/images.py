"""Who has which images: held-out references that no arm sees, and sites of which each uses a slice.

The slice is the one that a real client would take, so that pooled arms and equal sites train on the same images; with
label skew other images come to the sites, and as many of them.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskdm.data.corpus import Corpus, in_both
from maskdm.data.pixels import Pixels
from maskdm.data.preparation.slices import units
from maskdm.errors import UsageError
from maskdm.federated.policy import SIMULATED
from maskdm.federated.virtual import virtual_site
from maskdm.seeding import derive_seed

from ..in_process import prepare_folders
from ..simulate import Rows, split_by_label, split_iid, write_shares
from .arms import Arm, Sites
from .budget import ExperimentConfig

MOST_TRIES = 1000  # a small concentration may leave a site with next to nothing


@dataclass(frozen=True)
class PartedImages:
    """The local corpus, parted once for all arms and seeds. Rows of the corpus."""

    corpus: Corpus
    local: Rows  # of the sites, all together
    validation: Rows  # to choose rates and the best point by
    test: Rows  # to report

    def pixels(self, rows: Rows) -> Tensor:
        """uint8 (n, C, S, S)."""
        return torch.from_numpy(np.ascontiguousarray(self.corpus.pixels[rows]))


def part(corpus: Corpus, references: int) -> PartedImages:
    """Hold out `references` images to choose by, and as many to report.

    What belongs together (images of one group, equal images) stands on one side only; the rest of a group of which the
    last references are is used nowhere.

    Raises:
        UsageError: too few would be left.
    """
    rows = corpus.training_rows
    if 2 * references > len(rows) // 2:
        raise UsageError(
            f"--references {references}: twice as many are held out, but --local holds {len(rows):,} images: give at "
            f"most {len(rows) // 4:,}"
        )
    unit = _units(corpus, rows)  # (n,)
    place = np.random.default_rng(derive_seed("references")).permutation(unit.max() + 1)[unit]
    order = np.argsort(place, kind="stable")
    ends = np.flatnonzero(np.diff(place[order], append=-1)) + 1  # where a unit ends
    second = ends[np.searchsorted(ends, references)]  # the first image of the images to report
    if second + references > ends[-1] * 3 // 4:
        raise UsageError(f"--references {references}: groups of --local are too large to hold out as many: lower it")
    rest = ends[np.searchsorted(ends, second + references)]
    return PartedImages(
        corpus,
        np.sort(rows[order[rest:]]),
        np.sort(rows[order[:references]]),
        np.sort(rows[order[second : second + references]]),
    )


def check(images: PartedImages, public: Corpus, config: ExperimentConfig, arms: Sequence[Arm]) -> None:
    """Find out before anything is trained what would end the experiment later, or make its numbers worthless.

    Raises:
        UsageError: priors would see images that are held out, or an arm's sites cannot be made.
    """
    held_out = images.corpus.index[np.concatenate([images.validation, images.test])]
    if shared := in_both(public.index, held_out):
        raise UsageError(f"--public holds {shared:,} of the images that --local holds out: remove what both have")
    for sites in {arm.sites for arm in arms}:
        for seed in range(config.seeds):
            _shares(images, config, sites, seed)


def make_sites(images: PartedImages, config: ExperimentConfig, sites: Sites, folder: Path, seed: int) -> list[Path]:
    """Folders of the sites' clients, with settings and chosen slices.

    Raises:
        UsageError: skew is wanted without labels, or leaves sites without images.
    """
    paths = write_shares(images.corpus, _shares(images, config, sites, seed), folder)
    settings: dict[str, Any] = {
        "fraction": config.fraction,
        "seed": seed,
        "held_out": 0.1,
        "precision": config.precision,
        "threads": 0,
    }
    settings |= {"policy": SIMULATED.model_dump(mode="json")}
    folders = prepare_folders(paths, folder, settings)
    for site in folders:
        virtual_site().join(site)
    return folders


def pool(folders: list[Path]) -> Pixels:
    """Pixels that the sites of these folders train on, all together (n, C, S, S)."""
    found = []
    for folder in folders:
        chosen = virtual_site().join(folder)
        with np.load(folder.parent / "images.npz", allow_pickle=False) as stored:
            found += [image for image in stored["images"] if hashlib.sha256(image.tobytes()).hexdigest() in chosen]
    return np.ascontiguousarray(np.moveaxis(np.stack(found), 3, 1))


def _shares(images: PartedImages, config: ExperimentConfig, sites: Sites, seed: int) -> list[Rows]:
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


def _units(corpus: Corpus, rows: Rows) -> Rows:
    """What belongs together has the same number, from 0 on, (n,)."""
    digests = [digest.tobytes() for digest in corpus.index["sha256"][rows]]
    groups: dict[bytes, set[int]] = {digest: set() for digest in digests}
    for digest, group in zip(digests, corpus.index["group"][rows].tolist(), strict=True):
        groups[digest] |= {group} - {0}
    number = {digest: i for i, unit in enumerate(units(list(groups), groups)) for digest in unit}
    return np.array([number[digest] for digest in digests], np.int64)


def _skewed(labels: list[str], config: ExperimentConfig, seed: int) -> list[Rows]:
    """The first draw that leaves every site with images to use."""
    least = 20 / config.fraction
    for attempt in range(MOST_TRIES):
        try:
            parts = split_by_label(labels, config.clients, config.alpha, derive_seed("skew", seed, attempt))
        except UsageError:  # a site with none or one
            continue
        if min(len(rows) for rows in parts) >= least:
            return parts
    raise UsageError(f"--alpha {config.alpha} leaves a site with next to no images: raise it, or use fewer --clients")
