"""A packed corpus while it is written: appended in order, journaled, and put in its place when it is whole."""

import hashlib
import io
import json
import os
import shutil
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

import numpy as np

from ..errors import DataError
from ..run.runfolder import atomic_write, write_json
from .corpus import (
    IMAGES,
    INDEX,
    MANIFEST,
    RECORD,
    SKIPPED,
    SPLITS,
    Index,
    Manifest,
    Tally,
    corpus_sha256,
    mark_verified,
    repeated,
)
from .pixels import IsColour, PixelPolicy, Pixels

COMMIT_SECONDS = 5.0  # between two states that a crash falls back to
COLOUR = "colour, but the model has one channel"
FILES = (IMAGES, INDEX, SKIPPED)


@dataclass(frozen=True)
class Packed:
    """Some entries, decoded."""

    entries: int
    pixels: Pixels  # (n, C, S, S)
    index: Index  # (n,), its labels not yet numbered
    labels: list[str]
    skipped: list[tuple[str, str]]  # name, reason
    tally: Tally


class CorpusWriter:
    """The unfinished corpus on disk: what was appended, and how far it is safe."""

    def __init__(self, out: Path, job: str, policy: PixelPolicy) -> None:
        self.entries = self.rows = 0
        self.labels: dict[str, int] = {}
        self.skipped: Counter[str] = Counter()
        self.tally = Tally(policy.channels)
        self._folder, self._out, self._job, self._policy = out / ".packing", out, job, policy
        self._hashers = [hashlib.sha256(), hashlib.sha256()]
        self._next_commit = time.monotonic() + COMMIT_SECONDS

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        lengths = self._take_up()
        with ExitStack() as stack:
            self._files: list[IO[bytes]] = []
            for name, length in zip(FILES, lengths, strict=True):
                path = self._folder / name
                path.touch()
                file = stack.enter_context(path.open("r+b"))
                file.truncate(length)
                self._files.append(file)
            self._write_headers()
            self._rehash()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def add(self, part: Packed) -> None:
        """Append decoded entries."""
        part.index["label"] = [
            self.labels.setdefault(label, len(self.labels)) if label else -1 for label in part.labels
        ]
        for file, hasher, array in zip(self._files, self._hashers, (part.pixels, part.index), strict=False):
            data = np.ascontiguousarray(array).view(np.uint8).data
            file.write(data)
            hasher.update(data)
        for name, reason in part.skipped:
            self._files[2].write(json.dumps({"name": name, "reason": reason}).encode() + b"\n")
            self.skipped[reason] += 1
        self.tally.counts += part.tally.counts
        self.entries += part.entries
        self.rows += len(part.index)
        colour = self.skipped[COLOUR]
        if colour > max(self.rows, 1024):
            raise too_much_colour(colour)
        if time.monotonic() > self._next_commit:
            self.commit()

    def commit(self) -> None:
        """Make everything appended so far survive a crash."""
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
        write_json(
            self._folder / "journal.json",
            {
                "job": self._job,
                "entries": self.entries,
                "rows": self.rows,
                "skipped_bytes": self._files[2].tell(),
                "skipped": self.skipped,
                "labels": list(self.labels),
                "counts": self.tally.counts.tolist(),
            },
        )
        self._next_commit = time.monotonic() + COMMIT_SECONDS

    def finish(self) -> None:
        """Put the whole corpus in its place; the manifest last."""
        colour = self.skipped[COLOUR]
        if colour > self.rows:
            raise too_much_colour(colour)
        if not self.rows:
            raise nothing_left(self.skipped, self._policy.image_size)
        self._write_headers()
        self.commit()
        index = np.load(self._folder / INDEX, mmap_mode="r", allow_pickle=False)
        images_sha256, index_sha256 = (hasher.hexdigest() for hasher in self._hashers)
        groups = np.unique(index["group"])
        manifest = Manifest(
            images=self.rows,
            policy=self._policy,
            sha256=corpus_sha256(self._shape(), images_sha256, index_sha256, list(self.labels)),
            images_sha256=images_sha256,
            index_sha256=index_sha256,
            labels=tuple(self.labels),
            splits={split: int(np.sum(index["split"] == number)) for number, split in enumerate(SPLITS)},
            groups=int(np.count_nonzero(groups)),
            skipped=dict(self.skipped.most_common()),
            duplicates=repeated(index),
            statistics=self.tally.statistics(index),
            source=self._job,
        )
        (self._out / MANIFEST).unlink(missing_ok=True)  # of an older corpus
        for name in FILES:
            (self._folder / name).replace(self._out / name)
        atomic_write(self._out / MANIFEST, manifest.model_dump_json(indent=2) + "\n")
        mark_verified(self._out)
        shutil.rmtree(self._folder)

    def _shape(self) -> tuple[int, int, int, int]:
        return self.rows, self._policy.channels, self._policy.image_size, self._policy.image_size

    def _take_up(self) -> tuple[int, int, int]:
        """Take up what an earlier call of the same job left; returns how many bytes of each file that is."""
        try:
            journal = json.loads((self._folder / "journal.json").read_text())
            entries, rows, skipped_bytes = (int(journal[name]) for name in ("entries", "rows", "skipped_bytes"))
            skipped, labels = Counter({str(k): int(v) for k, v in journal["skipped"].items()}), journal["labels"]
            counts = np.array(journal["counts"], np.int64).reshape(self.tally.counts.shape)
            image = self._policy.channels * self._policy.image_size**2
            lengths = (HEADERS[0] + rows * image, HEADERS[1] + rows * RECORD.itemsize, skipped_bytes)
            present = [(self._folder / name).stat().st_size for name in FILES]
            if journal["job"] != self._job or any(have < kept for have, kept in zip(present, lengths, strict=True)):
                return 0, 0, 0
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return 0, 0, 0
        self.entries, self.rows, self.skipped = entries, rows, skipped
        self.labels = {str(label): number for number, label in enumerate(labels)}
        self.tally.counts += counts
        return lengths

    def _write_headers(self) -> None:
        """NumPy's headers, whose length does not depend on the number of rows."""
        headers = (_header(self._shape(), np.dtype(np.uint8)), _header((self.rows,), RECORD))
        assert tuple(map(len, headers)) == HEADERS
        for file, header in zip(self._files, headers, strict=False):
            file.seek(0)
            file.write(header)
        for file in self._files:
            file.seek(0, os.SEEK_END)

    def _rehash(self) -> None:
        """Hashes over what an earlier call had written."""
        for number, header in enumerate(HEADERS):
            self._files[number].seek(header)
            self._hashers[number] = hashlib.file_digest(self._files[number], "sha256")  # type: ignore[arg-type]


def _header(shape: tuple[int, ...], kind: np.dtype[Any]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": shape}
    )
    return buffer.getvalue()


# Bytes before the first row of each.
HEADERS = (len(_header((1, 1, 2048, 2048), np.dtype(np.uint8))), len(_header((1,), RECORD)))


def too_much_colour(colour: int) -> IsColour:
    """The error where most images do not fit a model of one channel."""
    return IsColour(
        f"--data holds {colour} colour images, but the model has one channel: convert them to grey, or use a model "
        f"of three channels (--channels 3)"
    )


def nothing_left(skipped: Counter[str], size: int) -> DataError:
    """The error where no image can be used."""
    reason, count = skipped.most_common(1)[0] if skipped else ("no images", 0)
    remedy = (
        "give images of that size, allow --upscale, or use a smaller --image-size"
        if "smaller" in reason
        else "check the files"
    )
    return DataError(f"--data: none of {skipped.total()} images can be used ({count}: {reason}): {remedy}")
