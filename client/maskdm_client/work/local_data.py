"""The site's own images: which of them take part, and their pixels. Nothing here is ever sent."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from maskdm.data.corpus import Corpus, is_corpus
from maskdm.data.pixels import PixelPolicy
from maskdm.data.preparation.pack import pack
from maskdm.data.preparation.slices import Found, Slice, choose, divide, look_alike, survey
from maskdm.data.sources.groups import with_groups
from maskdm.data.sources.source import Entry, Source, open_source
from maskdm.errors import DataError
from maskdm.run.reporting import WorkBar, say
from maskdm.run.runfolder import atomic_write, write_json

from ..folder.settings import SiteSettings

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

    def entries(self) -> Iterator[Entry]:
        return (entry for entry in self._source.entries() if entry.name in self._names)

    def count(self) -> int:
        return len(self._names)

    def fingerprint(self) -> bytes:
        """Over what is there now, in its order: an interrupted packing goes on only where both are the same."""
        return hashlib.sha256("\0".join(entry.name for entry in self.entries()).encode()).digest()


def choose_slice(settings: SiteSettings, folder: Path, check: Callable[[], None] = lambda: None) -> tuple[Slice, Found]:
    """Choose the images that take part, keep what was chosen and parted before, and record it in `slice.json`.

    Args:
        check: called now and then; raises where the user wants to stop.

    Raises:
        DataError: there are too few images, to part them or for the site's policy.
    """
    source = with_groups(open_source(settings.data), settings.group_regex, settings.group_csv)
    before = read_slice(folder) if (folder / SLICE).exists() else Slice({}, {})
    sides = asdict(before)
    earlier = {bytes.fromhex(digest): side for side, images in sides.items() for digest in images}
    with WorkBar("reading the local images", source.count()) as bar:

        def tick(done: int) -> None:
            check()
            bar.update(done)

        found = survey(source, tick)
        absent = sum(digest not in found.names for digest in earlier)
        chosen = choose(
            found,
            settings.fraction,
            max_images=settings.max_images,
            stratify=settings.stratify,
            seed=settings.seed,
            earlier=earlier,
            absent=absent,
        )
        alike = look_alike(source, chosen, found, window=settings.window, tick=tick)
    parted = divide(chosen, found, held_out=settings.held_out, seed=settings.seed, alike=alike, earlier=earlier)
    problem = settings.policy.problem_of_slice(len(parted.train))
    if problem:
        raise DataError(f"--data: {problem}: give more images, or a larger --fraction and another --out")
    if absent:
        say(f"WARNING: {absent:,} images of the recorded slice are not there now; their places are kept")
    seen = {digest.hex() for digest in found.names}
    # What is absent stays in the record: it may come back, and must not change sides then.
    kept = {side: {d: name for d, name in images.items() if d not in seen} for side, images in sides.items()}
    write_json(folder / SLICE, {side: kept[side] | now for side, now in asdict(parted).items()})
    return parted, found


def read_slice(folder: Path) -> Slice:
    """The slice that was recorded in a site's folder."""
    try:
        document = json.loads((folder / SLICE).read_text())
        sides = [dict(document.get(side.name, {})) for side in fields(Slice)]
        for digest in (digest for side in sides for digest in side):
            bytes.fromhex(digest)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise DataError(f"--out {folder}: {SLICE} is damaged: delete it to choose the images anew") from error
    return Slice(*sides)


def forget_pixels(folder: Path) -> None:
    """Remove the decoded copies of the images when they are needed no more."""
    if (folder / CORPUS).exists():
        shutil.rmtree(folder / CORPUS)


def local_images(settings: SiteSettings, folder: Path, image_size: int, channels: int) -> LocalImages:
    """The slice's pixels as the model sees them, packed once in the site's folder and mapped from then on.

    Raises:
        DataError: nothing usable on one of the sides.
    """
    chosen = read_slice(folder)
    policy = PixelPolicy.model_validate(
        {"image_size": image_size, "channels": channels, "upscale": settings.upscale, "window": settings.window}
    )
    corpus = _packed_slice(settings, folder, chosen, policy)
    row_of = {bytes(digest).hex(): row for row, digest in enumerate(corpus.index["sha256"])}
    # In the slice's own order, a random one: whoever takes the first few takes them from everywhere.
    train, held_out = (
        np.array([row_of[digest] for digest in side if digest in row_of], np.int64)
        for side in (chosen.train, chosen.held_out)
    )
    if not len(train) or not len(held_out):
        side = "trained on" if not len(train) else "held out"
        raise DataError(
            f"--data: none of the images to be {side} can be used ({corpus.summary()}): see maskdm-client doctor"
        )
    return LocalImages(corpus, train, held_out)


def _packed_slice(settings: SiteSettings, folder: Path, chosen: Slice, policy: PixelPolicy) -> Corpus:
    """Packed before, so that the images themselves are needed no more, or packed now."""
    out, mark = folder / CORPUS, folder / CORPUS / ".slice"
    wanted = hashlib.sha256(json.dumps([chosen.train, chosen.held_out, policy.model_dump()]).encode()).hexdigest()
    if is_corpus(out) and mark.exists() and mark.read_text() == wanted:
        return Corpus.open(out, "--out")
    out.mkdir(mode=0o700, parents=True, exist_ok=True)  # decoded images are as private as the originals
    corpus = pack(SliceSource(open_source(settings.data), chosen), out, policy, workers=settings.threads, replace=True)
    atomic_write(mark, wanted)
    return corpus
