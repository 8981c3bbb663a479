"""Any source → a packed corpus, once: in parallel, in the source's order, resumable, in flat memory.

Worker processes read, hash and decode; this process appends in order, so the result does not depend on their number.
What is not finished lies in `.packing/` with a journal; a corpus has its manifest only when it is whole.
"""

import errno
import hashlib
import json
import os
import shutil
import signal
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import IO, Any, Self

import numpy as np

from maskdm import guard
from maskdm.corpus import (
    IMAGES,
    INDEX,
    MANIFEST,
    RECORD,
    SKIPPED,
    SPLITS,
    Corpus,
    Index,
    Manifest,
    Tally,
    corpus_sha256,
    is_corpus,
    mark_verified,
    open_corpus,
)
from maskdm.errors import DataError, MaskDMError
from maskdm.images import IsColour, PixelPolicy, Pixels, decode, from_array
from maskdm.interruption import Interruption
from maskdm.reporting import WorkBar
from maskdm.runfolder import atomic_write, write_json
from maskdm.sources import Entry, Source

COMMIT_SECONDS = 5.0  # between two states that a crash falls back to
ALONE_SECONDS = 1.0  # work that is done sooner starts no other process
CHUNK_BYTES = 1 << 21
COLOUR = "colour, but the model has one channel"


@dataclass(frozen=True)
class Packed:
    """Some entries, decoded."""

    entries: int
    pixels: Pixels  # (n, C, S, S)
    index: Index  # (n,), its labels not yet numbered
    labels: list[str]
    skipped: list[tuple[str, str]]  # name, reason
    tally: Tally


def decode_entries(entries: list[Entry], policy: PixelPolicy) -> Packed:
    """What one worker does with one part of the source."""
    size, channels = policy.image_size, policy.channels
    pixels = np.empty((len(entries), channels, size, size), np.uint8)
    index = np.zeros(len(entries), RECORD)
    labels: list[str] = []
    skipped: list[tuple[str, str]] = []
    for entry in entries:
        try:
            digest, content = entry.read()
            found = decode(content, policy, entry.box) if isinstance(content, bytes) else from_array(content, policy)
        except DataError as error:
            skipped.append((entry.name, str(error)))
            continue
        row = len(labels)
        pixels[row] = found.pixels
        index[row] = (
            np.frombuffer(digest, np.uint8),
            -1,
            entry.group,
            SPLITS.index(entry.split),
            found.grey,
            found.width,
            found.height,
        )
        labels.append(entry.label)
    tally = Tally(channels)
    tally.add(pixels[: len(labels)])
    return Packed(len(entries), pixels[: len(labels)], index[: len(labels)], labels, skipped, tally)


def pack(
    source: Source,
    out: Path,
    policy: PixelPolicy,
    *,
    workers: int = 0,
    option: str = "--out",
    replace: bool = False,
) -> Corpus:
    """Pack a source into the folder `out`, or continue or just open what an earlier call left there.

    Args:
        workers: processes; 0 takes one for each core.
        option: what the user chose `out` with.
        replace: pack again where `out` holds a corpus of other data.

    Raises:
        DataError: nothing usable in the source, another corpus in `out`, or no room for it.
        Interrupted: asked to stop; the same call continues.
    """
    job = hashlib.sha256(source.fingerprint() + policy.model_dump_json().encode()).hexdigest()
    if is_corpus(out) and (corpus := _packed_before(out, job, option, replace)):
        return corpus
    try:
        with Interruption() as interruption, Writer(out, job, policy) as writer:
            total = source.count()
            _check_room(out, option, policy, (total or 0) - writer.entries)
            with WorkBar("prepare", total or 0, writer.entries) as bar:
                for part in _decoded(islice(source.entries(), writer.entries, None), policy, workers):
                    writer.add(part)
                    bar.update(writer.entries, f"{writer.skipped.total():,} skipped" if writer.skipped else "")
                    if interruption.requested():
                        writer.commit()
                        interruption.check()
            writer.finish(source)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DataError(f"{option} {out} cannot be written: {error.strerror}") from error
        raise DataError(
            f"{option} {out}: the disk is full: free some space and run the same command again, which continues"
        ) from error
    return open_corpus(out, option)


def _packed_before(out: Path, job: str, option: str, replace: bool) -> Corpus | None:
    try:
        corpus = open_corpus(out, option)
    except DataError:
        if replace:
            return None
        raise
    if corpus.manifest.source == job:
        return corpus
    if replace:
        return None
    raise DataError(
        f"{option} {out} holds a corpus packed from other data or in another way: choose another folder, or delete it "
        f"to pack it again"
    )


class Writer:
    """The unfinished corpus on disk: what was appended, and how far it is safe."""

    def __init__(self, out: Path, job: str, policy: PixelPolicy) -> None:
        self.folder, self.out, self.job, self.policy = out / ".packing", out, job, policy
        self.entries = self.rows = 0
        self.labels: dict[str, int] = {}
        self.skipped: Counter[str] = Counter()
        self.tally = Tally(policy.channels)
        self._hashers = [hashlib.sha256(), hashlib.sha256()]
        self._next_commit = time.monotonic() + COMMIT_SECONDS

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = self._kept_bytes() if self._journal() else [0, 0, 0]
        with ExitStack() as stack:
            names = (IMAGES, INDEX, SKIPPED)
            self._files: list[IO[bytes]] = []
            for name, length in zip(names, kept, strict=True):
                path = self.folder / name
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
        if colour > max(self.rows, 64):
            raise too_much_colour(colour)
        if time.monotonic() > self._next_commit:
            self.commit()

    def commit(self) -> None:
        """Make everything appended so far survive a crash."""
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
        write_json(
            self.folder / "journal.json",
            {
                "job": self.job,
                "entries": self.entries,
                "rows": self.rows,
                "skipped_bytes": self._files[2].tell(),
                "skipped": self.skipped,
                "labels": list(self.labels),
                "counts": self.tally.counts.tolist(),
            },
        )
        self._next_commit = time.monotonic() + COMMIT_SECONDS

    def finish(self, source: Source) -> None:
        """Put the whole corpus in its place; the manifest last."""
        colour = self.skipped[COLOUR]
        if colour > self.rows:
            raise too_much_colour(colour)
        if not self.rows:
            raise nothing_left(self.skipped, self.policy.image_size)
        self._write_headers()
        self.commit()
        index = np.load(self.folder / INDEX, mmap_mode="r", allow_pickle=False)
        images_sha256, index_sha256 = (hasher.hexdigest() for hasher in self._hashers)
        keys = np.sort(index["sha256"][:, :8].copy().view("<u8")[:, 0])
        groups = np.unique(index["group"])
        manifest = Manifest(
            images=self.rows,
            policy=self.policy,
            sha256=corpus_sha256(self._shape(), images_sha256, index_sha256, list(self.labels)),
            images_sha256=images_sha256,
            index_sha256=index_sha256,
            labels=tuple(self.labels),
            splits={split: int(np.sum(index["split"] == number)) for number, split in enumerate(SPLITS)},
            groups=int(np.count_nonzero(groups)),
            skipped=dict(self.skipped.most_common()),
            duplicates=int(np.sum(keys[1:] == keys[:-1])),
            statistics=self.tally.statistics(index),
            source=self.job,
        )
        (self.out / MANIFEST).unlink(missing_ok=True)  # of an older corpus
        for name in (IMAGES, INDEX, SKIPPED):
            (self.folder / name).replace(self.out / name)
        atomic_write(self.out / MANIFEST, manifest.model_dump_json(indent=2) + "\n")
        mark_verified(self.out)
        shutil.rmtree(self.folder)

    def _shape(self) -> tuple[int, int, int, int]:
        return self.rows, self.policy.channels, self.policy.image_size, self.policy.image_size

    def _journal(self) -> bool:
        """Take up what an earlier call of the same job left."""
        try:
            journal = json.loads((self.folder / "journal.json").read_text())
            if journal["job"] != self.job:
                return False
            self.entries, self.rows = int(journal["entries"]), int(journal["rows"])
            self.skipped = Counter(journal["skipped"])
            self.labels = {label: number for number, label in enumerate(journal["labels"])}
            self.tally.counts += np.array(journal["counts"], np.int64)
            self._skipped_bytes = int(journal["skipped_bytes"])
            lengths = [(self.folder / name).stat().st_size for name in (IMAGES, INDEX, SKIPPED)]
            if any(length < kept for length, kept in zip(lengths, self._kept_bytes(), strict=True)):
                raise ValueError("shorter than the journal says")
        except (OSError, ValueError, KeyError, TypeError):
            self.__init__(self.out, self.job, self.policy)  # type: ignore[misc]
            return False
        return True

    def _kept_bytes(self) -> list[int]:
        rows = self.rows
        image = int(np.prod(self._shape()[1:]))
        return [HEADER + rows * image, HEADER_INDEX + rows * RECORD.itemsize, self._skipped_bytes]

    def _write_headers(self) -> None:
        """NumPy's headers, whose length does not depend on the number of rows."""
        for file, shape, kind, length in (
            (self._files[0], self._shape(), np.dtype(np.uint8), HEADER),
            (self._files[1], (self.rows,), RECORD, HEADER_INDEX),
        ):
            file.seek(0)
            np.lib.format.write_array_header_1_0(
                file,
                {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": shape},
            )
            assert file.tell() == length
        for file in self._files:
            file.seek(0, os.SEEK_END)

    def _rehash(self) -> None:
        """Hashes over what an earlier call had written."""
        for file, hasher, header in zip(self._files, self._hashers, (HEADER, HEADER_INDEX), strict=False):
            file.seek(header)
            while piece := file.read(1 << 24):
                hasher.update(piece)


def _header_length(shape: tuple[int, ...], kind: np.dtype[Any]) -> int:
    from io import BytesIO

    buffer = BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": shape}
    )
    return buffer.tell()


HEADER = _header_length((1, 1, 2048, 2048), np.dtype(np.uint8))
HEADER_INDEX = _header_length((1,), RECORD)


def _decoded(entries: Iterator[Entry], policy: PixelPolicy, workers: int) -> Iterator[Packed]:
    """Decode entries in their order: here at first, and by worker processes where that takes longer."""
    workers = workers or os.cpu_count() or 1
    image_bytes = policy.channels * policy.image_size**2
    size = min(512, max(8, CHUNK_BYTES // image_bytes))
    chunks = iter(lambda: list(islice(entries, size)), [])
    alone_until = time.monotonic() + ALONE_SECONDS
    for chunk in chunks:
        yield decode_entries(chunk, policy)
        if workers > 1 and time.monotonic() > alone_until:
            break
    else:
        return
    waiting: deque[Future[Packed]] = deque()
    with ProcessPoolExecutor(workers, get_context("spawn"), _begin_worker, (os.getpid(),)) as pool:
        try:
            for chunk in chunks:
                waiting.append(pool.submit(decode_entries, chunk, policy))
                if len(waiting) >= 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise MaskDMError(
                "a process that decodes images died, perhaps for want of memory: run the same command again, which "
                "continues; with --workers 1 if it happens again"
            ) from error
        finally:
            for future in waiting:
                future.cancel()


def _begin_worker(parent: int) -> None:
    guard.die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent ends the work in order


def _check_room(out: Path, option: str, policy: PixelPolicy, images: int) -> None:
    needed = images * (policy.channels * policy.image_size**2 + RECORD.itemsize)
    free = shutil.disk_usage(out).free
    if needed > free:
        raise DataError(
            f"{option} {out}: {images:,} images need {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free: free some "
            f"space or choose another folder"
        )


def guess_channels(source: Source) -> int:
    """1 if the first pictures are all grey, else 3."""
    policy = PixelPolicy(image_size=8, channels=1, upscale=True)
    for entry in islice(source.entries(), 64):
        try:
            _, content = entry.read()
            if isinstance(content, bytes):
                decode(content, policy, entry.box)
            else:
                from_array(content, policy)
        except IsColour:
            return 3
        except DataError:
            continue
    return 1


def too_much_colour(colour: int) -> IsColour:
    """The error where most images do not fit a model of one channel."""
    return IsColour(
        f"--data holds {colour} colour images, but the model has one channel: convert them to grey, or use a prior "
        f"of three channels"
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
