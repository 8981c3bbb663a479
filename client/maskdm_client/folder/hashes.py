"""Hashes of the local images, so that a file that stays as it is need not be hashed at every join.

As private as the slice that is made of them: in the site's folder, for this user alone, and never sent.
"""

import hashlib
import os
import time
from pathlib import Path

from maskdm.data.archives import Part
from maskdm.data.sources.source import Entry
from maskdm.run.runfolder import atomic_write

HASHES = ".hashes"
STAMP, DIGEST = 16, 32  # bytes of each record: what a file was known by, and its sha256
# A file that was written so lately can be written again without a change of its time: FAT counts 2 s.
SETTLED_NS = 2_000_000_000


class Hashes:
    """sha256 by name, size, times and place of the file; images that come within other files are none of these."""

    def __init__(self, folder: Path) -> None:
        """What an earlier join left in a site's folder; nothing where that is damaged."""
        self._path = folder / HASHES
        self._before = _read(self._path)
        self._known, self._kept = dict(self._before), dict[bytes, bytes]()

    def of(self, entry: Entry) -> bytes:
        """sha256 of an image, which is read only where it is new, or its file has changed.

        Raises:
            DataError: it cannot be read.
        """
        now, status = time.time_ns(), _status(entry)
        stamp = status and _stamp(entry, status)
        digest = (stamp and self._known.get(stamp)) or entry.digest()
        if stamp and status:
            self._known[stamp] = digest
            if status.st_mtime_ns < now - SETTLED_NS:
                self._kept[stamp] = digest
        return digest

    def known(self, entry: Entry) -> bytes | None:
        """sha256 of an image, where that is known and its file has not changed since."""
        status = _status(entry)
        return self._known.get(_stamp(entry, status)) if status else None

    def keep(self) -> None:
        """Write down what was asked for, and nothing else, for the next join."""
        if self._kept != self._before:
            records = b"".join(stamp + digest for stamp, digest in self._kept.items())
            atomic_write(self._path, hashlib.sha256(records).digest() + records, private=True)


def _read(path: Path) -> dict[bytes, bytes]:
    try:
        content = path.read_bytes()
    except OSError:
        return {}
    records, size = content[DIGEST:], STAMP + DIGEST
    if hashlib.sha256(records).digest() != content[:DIGEST] or len(records) % size:
        return {}
    return {records[at : at + STAMP]: records[at + STAMP : at + size] for at in range(0, len(records), size)}


def _status(entry: Entry) -> os.stat_result | None:
    """Of the file that an image lies in; None where it came with its entry."""
    try:
        return Path(entry.content.path).stat() if isinstance(entry.content, Part) else None
    except OSError:
        return None


def _stamp(entry: Entry, status: os.stat_result) -> bytes:
    assert isinstance(entry.content, Part)
    # The last two: a copy in its place may keep size and time, e.g. one from which a name was taken out.
    times = f"{status.st_mtime_ns}\0{status.st_ctime_ns}\0{status.st_ino}"
    known_by = f"{entry.name}\0{entry.content.offset}\0{status.st_size}\0{times}"
    return hashlib.blake2b(known_by.encode(errors="backslashreplace"), digest_size=STAMP).digest()
