"""Any source → a packed corpus, once: in parallel, in the source's order, resumable, in flat memory.

Worker processes read, hash and decode; this process appends in order, so the result does not depend on their number.
What is not finished lies in `.packing/` with a journal; a corpus has its manifest only when it is whole.
"""

import errno
import hashlib
import os
import shutil
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType

import numpy as np

from ...errors import DataError, MaskDMError
from ...run import guard
from ...run.interruption import Interruption
from ...run.reporting import WorkBar
from ..archives import Part
from ..corpus import RECORD, SPLITS, Corpus, Tally, is_corpus
from ..pixels import IsColour, PixelPolicy, to_pixels
from ..sources.source import Entry, Source
from ..writer import CorpusWriter, Packed

ALONE_SECONDS = 0.5  # work that is done sooner starts no other process
CHUNK_BYTES = 1 << 21  # of decoded images
CARRIED_BYTES = 1 << 24  # of files that entries carry, as those of compressed tars do


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
            found = to_pixels(content, policy, entry.box)
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
    check_apart(source.path, out, option)
    job, total = _examined(source, policy)
    if is_corpus(out) and (corpus := _packed_before(out, job, option, replace)):
        return corpus
    try:
        with Interruption() as interruption, CorpusWriter(out, job, policy) as writer:
            _check_room(out, option, policy, (total or 0) - writer.entries)
            with WorkBar("prepare", total, writer.entries) as bar:
                for part in _decoded(islice(_listed(source), writer.entries, None), policy, workers):
                    writer.add(part)
                    bar.update(writer.entries, f"{writer.skipped.total():,} skipped" if writer.skipped else "")
                    if interruption.requested():
                        writer.commit()
                        interruption.check()
            writer.finish()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DataError(f"{option} {out} cannot be written: {error.strerror}") from error
        raise DataError(
            f"{option} {out}: the disk is full: free some space and run the same command again, which continues"
        ) from error
    return Corpus.open(out, option)


def check_apart(data: Path, out: Path, option: str = "--out") -> None:
    """Raises DataError where what is written would become part of what is read."""
    inner, outer = out.resolve(), data.resolve()
    if data.is_dir() and not is_corpus(data) and inner.is_relative_to(outer):
        raise DataError(f"{option} {out} lies inside of --data {data}: choose a folder outside of it")
    if outer != inner and outer.is_relative_to(inner):
        raise DataError(
            f"--data {data} lies inside of {option} {out}: choose another folder, so that it stays as it is"
        )


def _examined(source: Source, policy: PixelPolicy) -> tuple[str, int | None]:
    """What makes this packing job this one, and how many entries it has."""
    try:
        fingerprint, count = source.fingerprint(), source.count()
    except OSError as error:
        raise DataError(f"--data {source.path} cannot be read: {error.strerror}") from error
    return hashlib.sha256(fingerprint + policy.model_dump_json().encode()).hexdigest(), count


def _listed(source: Source) -> Iterator[Entry]:
    try:
        yield from source.entries()
    except OSError as error:
        raise DataError(
            f"--data {source.path} cannot be read ({error.strerror}): run the same command again"
        ) from error


def _packed_before(out: Path, job: str, option: str, replace: bool) -> Corpus | None:
    try:
        corpus = Corpus.open(out, option)
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


def _decoded(entries: Iterator[Entry], policy: PixelPolicy, workers: int) -> Iterator[Packed]:
    """Decode entries in their order: here at first, and by worker processes where that takes longer."""
    workers = workers or os.cpu_count() or 1
    image_bytes = policy.channels * policy.image_size**2
    size = min(512, max(8, CHUNK_BYTES // image_bytes))
    chunks = iter(lambda: _chunk(entries, size), [])
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
                with _no_main_module():  # a submit may start another process
                    waiting.append(pool.submit(decode_entries, chunk, policy))
                if len(waiting) >= 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise MaskDMError(
                "a process that decodes images died, perhaps for want of memory: run the same command again, which "
                "continues; if it happens again, pack with prepare --workers 1"
            ) from error
        finally:
            for future in waiting:
                future.cancel()


def _chunk(entries: Iterator[Entry], size: int) -> list[Entry]:
    """Up to `size` entries, fewer where they carry their files or pixels with them."""
    chunk, carried = [], 0
    for entry in entries:
        chunk.append(entry)
        if not isinstance(entry.content, Part):
            carried += len(entry.content) if isinstance(entry.content, bytes) else entry.content.nbytes
        if len(chunk) == size or carried > CARRIED_BYTES:
            break
    return chunk


@contextmanager
def _no_main_module() -> Iterator[None]:
    """Processes started here need nothing of the program's main module, which they would import: PyTorch, mostly, and
    whatever a script without a guard does."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _begin_worker(parent: int) -> None:
    guard.die_with_parent(parent)
    for number in (signal.SIGINT, signal.SIGTERM):  # they reach the whole group; the parent ends the work in order
        signal.signal(number, signal.SIG_IGN)


def _check_room(out: Path, option: str, policy: PixelPolicy, images: int) -> None:
    needed = images * (policy.channels * policy.image_size**2 + RECORD.itemsize)
    free = shutil.disk_usage(out).free
    if needed > free:
        raise DataError(
            f"{option} {out}: {images:,} images need {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free: free some "
            f"space or choose another folder"
        )


def guess_channels(source: Source) -> int:
    """1 if pictures from all over the source are grey, else 3."""
    policy = PixelPolicy(image_size=64, channels=1, upscale=True)
    first = next(iter(source.entries()), None)
    spread = first is not None and isinstance(first.content, Part)  # others would all be read to get to the last
    step = max(1, (source.count() or 0) // 64) if spread else 1
    for entry in islice(source.entries(), 0, 64 * step, step):
        try:
            _, content = entry.read()
            to_pixels(content, policy, entry.box)
        except IsColour:
            return 3
        except DataError:
            continue
    return 1
