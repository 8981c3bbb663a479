"""The site's own images: which of them take part, and their pixels. Nothing here is ever sent."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from maskdm.data.corpus import Corpus
from maskdm.data.groups import with_groups
from maskdm.data.packing import pack
from maskdm.data.pixels import PixelPolicy
from maskdm.data.slices import Found, Slice, choose, divide, look_alike, survey
from maskdm.data.sources import Entry, Source, open_source
from maskdm.errors import DataError
from maskdm.runfolder import write_json
from maskdm_client.settings import SiteSettings

Rows = NDArray[np.int64]
SLICE, CORPUS = "slice.json", "corpus"


@dataclass(frozen=True)
class LocalImages:
    """What a site trains on and what it measures on."""

    corpus: Corpus
    train: Rows
    held_out: Rows


class SliceSource:
    """Those entries of a source that were chosen."""

    def __init__(self, source: Source, chosen: Slice) -> None:
        self.path = source.path
        self._source = source
        self._names = {*chosen.train.values(), *chosen.held_out.values()}
        self._chosen = json.dumps([sorted(chosen.train), sorted(chosen.held_out)])

    def entries(self) -> Iterator[Entry]:
        return (entry for entry in self._source.entries() if entry.name in self._names)

    def count(self) -> int:
        return len(self._names)

    def fingerprint(self) -> bytes:
        return hashlib.sha256(self._chosen.encode()).digest()


def site_source(settings: SiteSettings) -> Source:
    """The images of the site as its options describe them."""
    return with_groups(open_source(settings.data), settings.group_regex, settings.group_csv)


def choose_slice(settings: SiteSettings, folder: Path) -> tuple[Slice, Found]:
    """Choose the images that take part, keep what was chosen and parted before, and record it in `slice.json`."""
    source = site_source(settings)
    before = read_slice(folder) if (folder / SLICE).exists() else Slice({}, {})
    earlier = {
        bytes.fromhex(digest): side
        for side, images in (("train", before.train), ("held_out", before.held_out))
        for digest in images
    }
    found = survey(source)
    chosen = choose(
        found,
        settings.fraction,
        max_images=settings.max_images,
        stratify=settings.stratify,
        seed=settings.seed,
        earlier=earlier,
    )
    alike = look_alike(source, chosen, found)
    parted = divide(chosen, found, held_out=settings.held_out, seed=settings.seed, alike=alike, earlier=earlier)
    write_json(folder / SLICE, {"train": parted.train, "held_out": parted.held_out})
    return parted, found


def read_slice(folder: Path) -> Slice:
    """The slice that was recorded in a site's folder."""
    try:
        document = json.loads((folder / SLICE).read_text())
        sides = [dict(document[side]) for side in ("train", "held_out")]
        for digest in (digest for side in sides for digest in side):
            bytes.fromhex(digest)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"--out {folder}: {SLICE} is damaged: delete it to choose the images anew") from error
    return Slice(sides[0], sides[1])


def forget_pixels(folder: Path) -> None:
    """Remove the decoded copies of the images when they are needed no more."""
    shutil.rmtree(folder / CORPUS, ignore_errors=True)


def local_images(settings: SiteSettings, folder: Path, image_size: int, channels: int) -> LocalImages:
    """The slice's pixels as the model sees them, packed once in the site's folder and mapped from then on.

    Raises:
        DataError: nothing usable on one of the sides.
    """
    chosen = read_slice(folder)
    policy = PixelPolicy.model_validate(
        {"image_size": image_size, "channels": channels, "upscale": settings.upscale, "window": settings.window}
    )
    source = SliceSource(site_source(settings), chosen)
    corpus = pack(source, folder / CORPUS, policy, workers=settings.threads, replace=True)
    digests = [bytes(row).hex() for row in corpus.index["sha256"]]
    train, held_out = (
        np.array([row for row, digest in enumerate(digests) if digest in side], np.int64)
        for side in (chosen.train, chosen.held_out)
    )
    if not len(train) or not len(held_out):
        side = "trained on" if not len(train) else "held out"
        raise DataError(f"--data: none of the images to be {side} can be used ({corpus.summary()}): see preflight")
    return LocalImages(corpus, train, held_out)
