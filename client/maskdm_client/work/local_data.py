"""The site's own images: which of them take part, and their pixels. Nothing here is ever sent."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from maskdm.config import ModelConfig
from maskdm.data.corpus import Corpus, is_corpus
from maskdm.data.duplicates import SIDE
from maskdm.data.pixels import PixelPolicy
from maskdm.data.preparation.pack import pack
from maskdm.data.preparation.slices import (
    Found,
    Slice,
    choose,
    divide,
    look_alike,
    look_alike_as_packed,
    survey,
)
from maskdm.data.sources.groups import with_groups
from maskdm.data.sources.source import Entry, Source, listed, open_source
from maskdm.errors import DataError
from maskdm.metadata import first_problem
from maskdm.run.reporting import WorkBar, say
from maskdm.run.runfolder import atomic_write, write_json

from ..folder.hashes import Hashes
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
    """Those entries of a source that were chosen, with their hashes where their files have not changed."""

    def __init__(self, source: Source, images: Mapping[str, str], hashes: Hashes) -> None:
        self.path = source.path
        self._source, self._hashes = source, hashes
        self._digests = {name: digest for digest, name in images.items()}

    def entries(self) -> Iterator[Entry]:
        return (replace(entry, sha256=entry.sha256 or self._hashes.known(entry)) for entry in self._chosen())

    def count(self) -> int:
        return len(self._digests)

    def fingerprint(self) -> bytes:
        """Over what is there now, in its order: an interrupted packing goes on only where both are the same."""
        chosen = (f"{entry.name}\0{self._digests[entry.name]}\0" for entry in self._chosen())
        return hashlib.sha256("".join(chosen).encode()).digest()

    def _chosen(self) -> Iterator[Entry]:
        return (entry for entry in self._source.entries() if entry.name in self._digests)


def choose_slice(
    source: Source,
    settings: SiteSettings,
    folder: Path,
    model: ModelConfig | None = None,
    check: Callable[[], None] = lambda: None,
) -> tuple[Slice, Found]:
    """Choose the images that take part, keep what was chosen and parted before, and record it in `slice.json`.

    Args:
        source: of `settings.data`.
        model: what will be trained, where that is known: then pixels are packed here, and near-duplicates are looked
            for on these, so that every image is decoded once. Else they are packed when the first plan comes.
        check: called now and then; raises where the user wants to stop.

    Raises:
        DataError: there are too few images, to part them or for the site's policy, or none that the model can use.
    """
    plain, hashes = listed(source), Hashes(folder)
    source = with_groups(plain, settings.group_regex, settings.group_csv)
    before = read_slice(folder) if (folder / SLICE).exists() else Slice({}, {})
    sides = asdict(before)
    earlier = {bytes.fromhex(digest): side for side, images in sides.items() for digest in images}
    with WorkBar("reading the local images", source.count()) as bar:

        def tick(done: int) -> None:
            check()
            bar.update(done)

        found = survey(source, tick, hashes.of)
        hashes.keep()
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
        packs = model is not None and model.image_size >= SIDE
        alike = [] if packs else look_alike(source, chosen, found, window=settings.window, tick=tick)
    seen = {digest.hex() for digest in found.names}
    # What is absent stays in the record: it may come back, and must not change sides then.
    kept = {side: {d: name for d, name in images.items() if d not in seen} for side, images in sides.items()}
    if model and packs:
        images = _together(Slice(**kept)) | {digest.hex(): found.names[digest] for digest in chosen}
        policy = _pixel_policy(settings, model.image_size, model.channels)
        corpus = _packed(lambda: SliceSource(plain, images, hashes), images, folder, policy, settings.threads)
        alike = look_alike_as_packed(corpus, chosen)
    try:
        parted = divide(chosen, found, held_out=settings.held_out, seed=settings.seed, alike=alike, earlier=earlier)
        problem = settings.policy.problem_of_slice(len(parted.train))
        if problem:
            raise DataError(f"--data: {problem}: give more images, or a larger --fraction and another --out")
    except DataError:
        forget_pixels(folder)  # of a federation that the site does not join
        raise
    if absent:
        say(f"WARNING: {absent:,} images of the recorded slice are not there now; their places are kept")
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
    chosen, policy = read_slice(folder), _pixel_policy(settings, image_size, channels)
    images = _together(chosen)

    def source() -> SliceSource:
        return SliceSource(listed(open_source(settings.data)), images, Hashes(folder))

    corpus = _packed(source, images, folder, policy, settings.threads)
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


def _together(parted: Slice) -> dict[str, str]:
    """All images of a slice; those left out may come to a side again."""
    return {**parted.train, **parted.held_out, **parted.left_out}


def _pixel_policy(settings: SiteSettings, image_size: int, channels: int) -> PixelPolicy:
    shape = {"image_size": image_size, "channels": channels}
    try:
        return PixelPolicy.model_validate({**shape, "upscale": settings.upscale, "window": settings.window})
    except ValidationError as error:
        raise DataError(f"--data: no images for a model of {channels} channels: {first_problem(error)}") from error


def _packed(
    source: Callable[[], SliceSource], images: Mapping[str, str], folder: Path, policy: PixelPolicy, threads: int
) -> Corpus:
    """Packed before, so that the images themselves are needed no more, or packed now."""
    out, mark = folder / CORPUS, folder / CORPUS / ".slice"
    wanted = hashlib.sha256(json.dumps([sorted(images.items()), policy.model_dump()]).encode()).hexdigest()
    if is_corpus(out) and mark.exists() and mark.read_text() == wanted:
        return Corpus.open(out, "--out")
    out.mkdir(mode=0o700, parents=True, exist_ok=True)  # decoded images are as private as the originals
    corpus = pack(source(), out, policy, workers=threads, replace=True)
    atomic_write(mark, wanted)
    return corpus
