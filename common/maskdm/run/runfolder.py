"""Folders that runs leave: atomic files, append-only JSON lines, and one owner at a time."""

import errno
import fcntl
import json
import os
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import file_digest
from importlib.metadata import version
from io import FileIO
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import UsageError


def atomic_write(path: Path, content: bytes | str | Iterable[bytes | memoryview], *, private: bool = False) -> None:
    """Write under a temporary name, flush, rename, flush that too: readers see the old file or the whole new one.

    Args:
        content: all of it, or its pieces, of which only one is in memory at a time.
        private: only this user can read it, from its first byte on.
    """
    if isinstance(content, str):
        content = content.encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if private:
            temporary.unlink(missing_ok=True)
            temporary.touch(mode=0o600)
        with temporary.open("wb") as file:
            file.writelines([content] if isinstance(content, bytes) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_names(path.parent)


def _sync_names(folder: Path) -> None:
    """Have what a folder's files are called survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that know no such thing
            raise
    finally:
        os.close(descriptor)


def write_json(path: Path, document: Any) -> None:
    """A readable JSON file, written atomically."""
    atomic_write(path, json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append one JSON object as one line, whole or not at all; NaN is refused because it is not JSON.

    Raises:
        OSError: e.g. a full disk; what was written of the line is taken back.
    """
    line = (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode()
    with path.open("ab", buffering=0) as file:
        append_whole(file, line)


def append_whole(file: FileIO, line: bytes, *, synced: bool = False) -> None:
    """Append bytes to an open file, all of them or none.

    Args:
        synced: return only when they are on the disk.

    Raises:
        OSError: e.g. a full disk; what was written is taken back.
    """
    before = os.fstat(file.fileno()).st_size
    try:
        if file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file.name))
        if synced:
            os.fsync(file.fileno())
    except OSError:
        with suppress(OSError):  # what stays is a torn line
            os.ftruncate(file.fileno(), before)
        raise


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a JSON-lines file; a last line torn by a crash is left out."""
    if not path.exists():
        return []
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    return [json.loads(line) for line in whole.split(b"\n") if line]


def keep_lines(path: Path, keep: list[dict[str, Any]]) -> None:
    """Replace the file by the given records, e.g. to drop what a crash made obsolete."""
    atomic_write(path, "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in keep))


class LineReader:
    """Reads what another process appends to a JSON-lines file, from the end of what is there now."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position = path.stat().st_size if path.exists() else 0

    def new(self) -> list[dict[str, Any]]:
        """Whole lines since the last call."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self.position)
            whole, newline, _ = file.read().rpartition(b"\n")
        self.position += len(whole) + len(newline)
        return [json.loads(line) for line in whole.splitlines() if line]


def open_lock(path: Path, flags: int = os.O_RDWR | os.O_CREAT) -> FileIO:
    """A file to be locked, made if needed: never what a link leads to, which might be any file that is ours to write.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    file = FileIO(descriptor, "r" if flags == os.O_RDONLY else "r+")
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "its lock is no regular file", str(path))
    return file


def close_to_others(folder: Path) -> None:
    """Keep other users out of a folder, where it belongs to this one: not where it is, e.g. a volume of a container."""
    if folder.stat().st_uid == os.geteuid():
        folder.chmod(0o700)


@contextmanager
def owned(folder: Path, option: str = "--out") -> Iterator[None]:
    """Create the folder if needed and hold it for this process; the lock dies with the process.

    Raises:
        UsageError: it cannot be written, or another running process holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = open_lock(folder / ".lock")
    except OSError as error:
        raise UsageError(f"{option} {folder} cannot be written ({error.strerror}): choose another folder") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UsageError(f"{option} {folder} is in use by a running process: stop it or choose another") from error
        yield


def record_versions(folder: Path, *packages: str) -> None:
    """Append a line to versions.jsonl: what a run was started, or continued, with."""
    append_line(
        folder / "versions.jsonl",
        {"time": time.time(), "maskdm": __version__, **{name: version(name) for name in packages}},
    )


def is_owned(folder: Path) -> bool:
    """Whether a running process holds the folder. Whoever looks holds it for a moment, too short to be noticed."""
    try:
        with open_lock(folder / ".lock", os.O_RDONLY) as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # it never ran here, or is not ours to look at
        return False
    return False


def claim(folder: Path, kind: str, config: Mapping[str, Any], *, may_change: tuple[str, ...] = ()) -> bool:
    """Record `config` in a new folder, or check that the folder holds this very run; close it to other users.

    Args:
        kind: what the folder holds, e.g. "pretrain"; kept as `kind` in config.json.
        config: JSON-ready; dotted names of nested keys appear in the error.
        may_change: dotted names that may differ when a run is continued.

    Returns:
        True where the run is being continued.

    Raises:
        UsageError: the folder holds something else; the message names the first difference.
    """
    path = folder / "config.json"
    wanted = {"kind": kind, **config}
    if not path.exists():
        foreign = [p.name for p in folder.iterdir() if not p.name.startswith(".")]
        if foreign:
            raise UsageError(
                f"--out {folder} already holds {sorted(foreign)[0]!r}, which is no MaskDM run: choose another"
            )
        close_to_others(folder)
        write_json(path, wanted)
        return False
    try:
        found = json.loads(path.read_text())
        before, now = flatten(found), flatten(json.loads(json.dumps(wanted)))
    except (ValueError, AttributeError, UnicodeDecodeError) as error:
        raise UsageError(f"--out {folder}: config.json is not readable: choose another folder") from error
    for name in sorted(before.keys() | now.keys()):
        if name not in may_change and before.get(name) != now.get(name):
            raise UsageError(
                f"--out {folder} holds another run: {name} is {before.get(name)!r} there and {now.get(name)!r} here; "
                f"choose another folder, or give the same options to continue it"
            )
    close_to_others(folder)
    write_json(path, wanted)
    return True


def flatten(document: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mapping → one level with dotted names."""
    flat: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def sha256_of(path: Path) -> str:
    """Hash of a file, streamed."""
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()
