"""Well-known corpora: what their folders and annotation files say of labels, identities, splits and crops."""

import re
from array import array
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from ...errors import DataError
from ..archives import is_zip, zip_members
from ..corpus import SPLITS
from ..pixels import Box
from .external import LmdbSource, TorchvisionSource, scene_of
from .source import (
    SPLIT_FOLDERS,
    ArchiveSource,
    Entry,
    FolderSource,
    MappedSource,
    Source,
    Split,
    group_of,
    open_source,
)
from .tables import Table, read_table

LAYOUTS = ("auto", "vggface2", "celeba", "celebahq", "lsun", "torchvision:NAME")

CELEBA_FACE: Box = (25, 57, 153, 185)  # the usual 128x128 about the centre of an aligned picture of 178x218
VGGFACE2_MARGIN = 0.15  # on each side: the boxes were enlarged by 30 % for training
VGGFACE2_IDENTITY = re.compile(r"n\d+")
CELEBAHQ_NUMBER = re.compile(r"[0-9]{1,9}")


def with_layout(path: Path, layout: str, boxes: Path | None = None) -> Source:
    """Open a corpus that is laid out in a well-known way, one of `LAYOUTS`.

    Args:
        boxes: VGGFace2's `loose_bb_….csv`; an image that is not in it is used whole.

    Raises:
        DataError: an unknown layout, images or annotations that do not fit it, or `boxes` with another layout.
    """
    if boxes is not None and layout != "vggface2":
        raise DataError(f"--boxes {boxes} goes with --layout vggface2, not with {layout}: leave it out")
    match layout.split(":", 1):
        case ["auto"]:
            return open_source(path)
        case ["vggface2"]:
            return _vggface2(path, boxes)
        case ["celeba"]:
            return _celeba(path)
        case ["celebahq"]:
            return _celebahq(path)
        case ["lsun"]:
            return _lsun(path)
        case ["torchvision", name] if name:
            return TorchvisionSource(path, name)
    raise DataError(f"--layout {layout}: choose from {', '.join(LAYOUTS)}")


def _open(path: Path, layout: str) -> Source:
    source = open_source(path)
    if not isinstance(source, FolderSource | ArchiveSource):
        raise DataError(f"--layout {layout}: {path} is not a folder, zip or tar of picture files: use --layout auto")
    return source


def _stem(entry: Entry) -> str:
    return PurePosixPath(entry.name).stem


def _vggface2(path: Path, boxes: Path | None) -> Source:
    source, table, key = _open(path, "vggface2"), Table(array("Q"), array("i")), b"vggface2"

    def identity(entry: Entry) -> str:
        folder = PurePosixPath(entry.name).parent.name
        return folder if VGGFACE2_IDENTITY.fullmatch(folder) else ""

    def box(entry: Entry) -> Box | None:
        found = table.get(group_of(f"{identity(entry)}/{_stem(entry)}"))
        return (found[0], found[1], found[2], found[3]) if found else None

    def rule(entry: Entry) -> Entry:
        if not (label := identity(entry)):
            return entry
        split = SPLIT_FOLDERS.get(PurePosixPath(entry.name).parent.parent.name.lower(), "train")
        return replace(entry, label=label, group=group_of(label), split=split, box=box(entry))

    if not any(identity(entry) for entry in source.entries()):
        raise DataError(
            f"--layout vggface2: no image of {path} lies in an identity's folder, such as train/n000001: use "
            f"--layout auto"
        )
    if boxes is not None:
        table = read_table(boxes, "--boxes", "i", '"NAME_ID",X,Y,W,H', _box)
        if not any(box(entry) for entry in source.entries()):
            raise DataError(f"--boxes {boxes} names none of the images of {path}: give the file that belongs to them")
        key += table.digest()
    return MappedSource(source, rule, key)


def _box(fields: Sequence[str]) -> tuple[str, Sequence[int]]:
    name, (left, top, width, height) = fields[0], map(int, fields[1:])
    if min(width, height) < 1:
        raise ValueError("an empty box")
    across, down = VGGFACE2_MARGIN * width, VGGFACE2_MARGIN * height
    return name, [round(v) for v in (left - across, top - down, left + width + across, top + height + down)]


class CelebAFiles:
    """Split and identity of CelebA's images, as far as the files that say so lie beside them."""

    def __init__(self, path: Path) -> None:
        self.splits = self.groups = Table(array("Q"), array("B"))
        self.found: list[tuple[Path, Table]] = []
        if file := _beside(path, "list_eval_partition.txt", "list_eval_partition.csv"):
            self.splits = read_table(file, "--data", "B", "an image's name and 0, 1 or 2", _partition)
            self.found.append((file, self.splits))
        if file := _beside(path, "identity_CelebA.txt", "identity_CelebA.csv"):
            self.groups = read_table(file, "--data", "Q", "an image's name and a number", _identity)
            self.found.append((file, self.groups))

    def place(self, entry: Entry, key: int) -> Entry:
        """The entry with split and group of the image whose name without suffix has this `group_of`."""
        (split,), (group,) = self.splits.get(key, (0,)), self.groups.get(key, (0,))
        return replace(entry, label="", group=group, split=SPLITS[split])

    def digest(self) -> bytes:
        """Changes with the files' content."""
        return self.splits.digest() + self.groups.digest()


def _partition(fields: Sequence[str]) -> tuple[str, Sequence[int]]:
    name, part = fields
    return PurePosixPath(name).stem, [("0", "1", "2").index(part)]


def _identity(fields: Sequence[str]) -> tuple[str, Sequence[int]]:
    name, identity = fields
    return PurePosixPath(name).stem, [group_of(str(int(identity)))]


def _original(fields: Sequence[str]) -> tuple[str, Sequence[int]]:
    number, _, name = fields
    return str(int(number)), [group_of(PurePosixPath(name).stem)]


def _beside(path: Path, *names: str) -> Path | None:
    """An annotation file in the folder of images, or where CelebA's own tree has it from that folder or archive."""
    above = path.absolute()
    folders = [folder / below for folder in (above, *above.parents[:2]) for below in ("", "Anno", "Eval")]
    return next((folder / name for folder in folders for name in names if (folder / name).is_file()), None)


def _celeba(path: Path) -> Source:
    source, known = _open(path, "celeba"), CelebAFiles(path)
    for file, table in known.found:
        if not any(table.get(group_of(_stem(entry))) for entry in source.entries()):
            raise DataError(
                f"--data {path}: {file} lists none of its images: give them their own names again, or move it away"
            )

    def rule(entry: Entry) -> Entry:
        folder = PurePosixPath(entry.name).parent.name or path.absolute().name
        box = CELEBA_FACE if "align" in folder.lower() else None
        return replace(known.place(entry, group_of(_stem(entry))), box=box)

    return MappedSource(source, rule, b"celeba" + known.digest())


def _celebahq(path: Path) -> Source:
    source, known = _open(path, "celebahq"), CelebAFiles(path)
    file = _beside(path, "CelebA-HQ-to-CelebA-mapping.txt") if known.found else None
    if file is None:
        return MappedSource(source, lambda entry: replace(entry, label="", split="train"), b"celebahq")
    table = read_table(file, "--data", "Q", "idx, orig_idx and orig_file", _original)
    first = _first_number(source, table, file)

    def rule(entry: Entry) -> Entry:
        stem = _stem(entry)
        number = int(stem) - first if CELEBAHQ_NUMBER.fullmatch(stem) else -1
        return known.place(entry, *table.get(group_of(str(number)), (0,)))

    return MappedSource(source, rule, b"celebahq" + bytes([first]) + table.digest() + known.digest())


def _first_number(source: Source, table: Table, file: Path) -> int:
    """0 or 1: `CelebA-HQ-img/0.jpg` and `data256x256/00001.jpg` are the same face, the first of the mapping."""
    stems = {stem for entry in source.entries() if CELEBAHQ_NUMBER.fullmatch(stem := _stem(entry))}
    if any(stem.strip("0") == "" or (len(stem) < 5 and stem[0] != "0") for stem in stems):
        return 0
    if any(not table.get(group_of(str(int(stem)))) and table.get(group_of(str(int(stem) - 1))) for stem in stems):
        return 1
    raise DataError(
        f"--data {source.path}: which of its images is which in {file} cannot be told, for neither the first nor the "
        f"last is there: give all images, or move that file away"
    )


def _lsun(path: Path) -> Source:
    folders = sorted(file.parent for file in (path / "data.mdb", *path.glob("*/data.mdb")) if file.is_file())
    if folders:
        return LmdbSource(path, folders)
    if path.is_file() and is_zip(path) and any(n.endswith("data.mdb") for n, _ in zip_members(path)):
        raise DataError(f"--data {path} holds an LMDB, which cannot be read inside of a zip: unpack it")
    source, own = _open(path, "lsun"), path.absolute().name.partition(".")[0]

    def scene(entry: Entry) -> tuple[str, Split] | None:
        return next(filter(None, map(scene_of, (*PurePosixPath(entry.name).parts[:-1], own))), None)

    def rule(entry: Entry) -> Entry:
        label, split = scene(entry) or (entry.label, entry.split)
        return replace(entry, label=label, split=split)

    if not any(scene(entry) for entry in source.entries()):
        raise DataError(
            f"--layout lsun: {path} holds no data.mdb and no folder such as bedroom_train: use --layout auto"
        )
    return MappedSource(source, rule, b"lsun" + own.encode(errors="surrogateescape"))
