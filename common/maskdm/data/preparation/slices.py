"""The slice of its images that a site uses: stable under renaming, moving and adding; held out by patient, not by file.

An image is in because of a keyed hash of its content, on its side because of a keyed hash of what it belongs with:
its group, or its near-duplicates. What was recorded once is kept, so that nothing ever changes sides.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from ...errors import DataError
from ...seeding import derive_seed
from ..corpus import Corpus
from ..duplicates import near_duplicates, thumbnail
from ..pixels import PixelPolicy, to_pixels
from ..sources.source import Entry, Source

TOP = 2.0**63  # of `derive_seed`
# What near-duplicates are looked for on; DICOM, colour and small pictures included.
LOOK = PixelPolicy(image_size=32, channels=3, upscale=True)


@dataclass(frozen=True)
class Found:
    """What a site has, image by image; equal images are one. Stays on this machine."""

    names: dict[bytes, str]  # sha256 → name, of every different image that may be trained on
    labels: dict[bytes, str]
    groups: dict[bytes, set[int]]  # equal files may belong to several
    total: int  # files
    other_splits: int = 0  # files in folders named test or validation, which are left out
    unreadable: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Slice:
    """The images a site uses, by sha256 and local name: trained on, and held out to measure."""

    train: dict[str, str]  # sha256 in hex → name
    held_out: dict[str, str]
    left_out: dict[str, str] = field(default_factory=dict)  # belong with images of both sides, so they stand on neither


def survey(
    source: Source,
    tick: Callable[[int], None] = lambda done: None,
    digest: Callable[[Entry], bytes] = Entry.digest,
) -> Found:
    """Hash everything that may be trained on; `tick` hears of each file."""
    found = Found({}, {}, {}, 0)
    total = other_splits = 0
    for number, entry in enumerate(source.entries(), start=1):
        tick(number)
        if entry.split != "train":
            other_splits += 1
            continue
        total += 1
        try:
            content = digest(entry)
        except DataError:
            found.unreadable.append(entry.name)
            continue
        found.names.setdefault(content, entry.name)
        found.labels.setdefault(content, entry.label)
        found.groups.setdefault(content, set()).update({entry.group} - {0})
    return replace(found, total=total, other_splits=other_splits)


def choose(
    found: Found,
    fraction: float,
    *,
    max_images: int | None = None,
    stratify: bool = False,
    seed: int = 0,
    earlier: Iterable[bytes] = (),
    absent: int = 0,
) -> list[bytes]:
    """About `fraction` of the images, by a keyed hash of their content; those chosen earlier stay.

    Whether an image is in depends on nothing but its content, the key and the fraction. `stratify` takes exactly the
    fraction of each label and at least one image; `max_images` ends the list. Both depend on what else is there, so
    they are stable through `earlier`. `absent` images chosen earlier are not here now, and keep their places.

    Raises:
        DataError: fewer than two different images can be read.
    """
    assert 0 < fraction <= 1
    if len(found.names) < 2:
        raise DataError(f"--data holds {len(found.names)} readable different images: at least two are needed")
    kept = [digest for digest in dict.fromkeys(earlier) if digest in found.names]
    rank = {digest: derive_seed("slice", seed, digest) for digest in found.names}
    ordered = sorted(found.names, key=rank.__getitem__)
    if stratify:
        chosen = []
        for label in sorted(set(found.labels.values())):
            of_label = [digest for digest in ordered if found.labels[digest] == label]
            chosen += of_label[: max(1, round(fraction * len(of_label)))]
        chosen.sort(key=rank.__getitem__)
    else:
        chosen = [digest for digest in ordered if rank[digest] < fraction * TOP]
    chosen = list(dict.fromkeys([*kept, *(chosen if len(chosen) > 1 else ordered[:2])]))
    if max_images is not None:
        chosen = chosen[: max(max_images - absent, len(kept), 2)]
    return chosen


def divide(
    chosen: Iterable[bytes],
    found: Found,
    *,
    held_out: float = 0.2,
    seed: int = 0,
    alike: Iterable[tuple[bytes, bytes]] = (),
    earlier: Mapping[bytes, str] | None = None,
) -> Slice:
    """Part the chosen images into those trained on and those held out, keeping together what belongs together.

    Args:
        alike: pairs of near-duplicates.
        earlier: sides taken before, "train", "held_out" or "left_out"; they are kept. An image that joins both sides
            is left out; where images of both sides turn out to belong together, those held out are left out from now.

    Raises:
        DataError: all images belong together, so that no side can be held out.
    """
    earlier, alike = earlier or {}, list(alike)
    chosen = list(chosen)
    sides = {digest: "left_out" for digest in chosen if earlier.get(digest) == "left_out"}
    free: list[tuple[float, list[bytes]]] = []
    for members in units([digest for digest in chosen if digest not in sides], found.groups, alike):
        old = [digest for digest in members if digest in earlier]
        if len({earlier[digest] for digest in old}) > 1:
            sides |= dict.fromkeys(members, "left_out")  # but for those that are not tied to the other side directly
            for part in units(old, found.groups, alike):
                both = len({earlier[digest] for digest in part}) > 1
                sides |= {d: earlier[d] for d in part if not both or earlier[d] == "train"}
        elif old:
            sides |= dict.fromkeys(members, earlier[old[0]])
        else:
            free.append((_place(members, found.groups, seed), members))
    present = set(sides.values())
    edge = sorted(key for key, _ in free)
    cut = held_out
    if edge and "held_out" not in present:
        cut = max(cut, edge[0])
    if edge and "train" not in present and cut >= edge[-1]:
        cut = (edge[-2] + edge[-1]) / 2 if len(edge) > 1 else -1.0
    for key, members in free:
        sides |= dict.fromkeys(members, "held_out" if key <= cut else "train")
    if not {"train", "held_out"} <= set(sides.values()):
        raise DataError(
            "--data: all chosen images belong to one group or are near-duplicates of one another, so none can be held "
            "out: give more images, or a larger --fraction"
        )
    train, out, left = (
        {digest.hex(): found.names[digest] for digest in chosen if sides[digest] == side}
        for side in ("train", "held_out", "left_out")
    )
    return Slice(train, out, left)


def _place(members: list[bytes], groups: Mapping[bytes, set[int]], seed: int) -> float:
    """Where in [0, 1) a unit lies: by one of its members or groups, whatever their number, so that large units are
    held out no more often than small ones."""
    keys: set[int | bytes] = set()
    for digest in members:
        keys |= groups[digest] or {digest}
    first = min(keys, key=lambda key: derive_seed("unit", seed, key))
    return derive_seed("held out", seed, first) / TOP


def look_alike(
    source: Source,
    chosen: Iterable[bytes],
    found: Found,
    *,
    window: tuple[float, float] | None = None,
    tick: Callable[[int], None] = lambda done: None,
) -> list[tuple[bytes, bytes]]:
    """Links between near-duplicates among the chosen images: copies and re-compressions of one another.

    Args:
        window: as in the policy that training uses.
    """
    policy = LOOK.model_copy(update={"window": window})
    wanted = {found.names[digest]: digest for digest in chosen}
    digests: list[bytes] = []
    thumbnails: list[NDArray[np.float32]] = []
    for number, entry in enumerate(source.entries(), start=1):
        tick(number)
        if entry.name in wanted:
            try:
                _, content = replace(entry, sha256=wanted[entry.name]).read()
                thumbnails.append(thumbnail(to_pixels(content, policy, entry.box).pixels))
            except DataError:  # what cannot be decoded is reported when it is packed
                continue
            digests.append(wanted[entry.name])
    return _pairs(digests, thumbnails)


def look_alike_as_packed(corpus: Corpus, chosen: Collection[bytes]) -> list[tuple[bytes, bytes]]:
    """The same links, found on pixels that are decoded already, of at least `duplicates.SIDE` a side."""
    rows = [row for row, digest in enumerate(corpus.index["sha256"]) if bytes(digest) in chosen]
    digests = [bytes(corpus.index["sha256"][row]) for row in rows]
    return _pairs(digests, [thumbnail(corpus.pixels[row]) for row in rows])


def _pairs(digests: list[bytes], thumbnails: list[NDArray[np.float32]]) -> list[tuple[bytes, bytes]]:
    pairs = near_duplicates(np.stack(thumbnails)) if thumbnails else []
    return [(digests[first], digests[second]) for first, second in pairs]


def units(
    chosen: list[bytes], groups: Mapping[bytes, set[int]], alike: Iterable[tuple[bytes, bytes]] = ()
) -> list[list[bytes]]:
    """Images that must stand on one side, by union of groups and pairs."""
    parent = {digest: digest for digest in chosen}

    def root(digest: bytes) -> bytes:
        while parent[digest] != digest:
            parent[digest] = digest = parent[parent[digest]]
        return digest

    first_of: dict[int, bytes] = {}
    for digest in chosen:
        for group in groups[digest]:
            parent[root(digest)] = root(first_of.setdefault(group, digest))
    for first, second in alike:
        if first in parent and second in parent:
            parent[root(first)] = root(second)
    found: dict[bytes, list[bytes]] = {}
    for digest in chosen:
        found.setdefault(root(digest), []).append(digest)
    return list(found.values())
