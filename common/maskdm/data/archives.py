"""Zips and tars as streams of members: flat memory however many there are, and no member larger than it may be.

The standard library's zip reader keeps about a kilobyte a member; a corpus of millions is listed here from the central
directory piece by piece (PKWARE APPNOTE 4.3), and any process can read any member by its place in the file.
"""

import os
import struct
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Self

from ..errors import DataError

# No picture file is larger; a member that claims or turns out to be so is refused (zip bombs).
MAX_FILE_BYTES = 1 << 30

_END, _END64, _LOCATOR64 = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
_CENTRAL, _LOCAL = struct.Struct("<4s4B4HL2L5H2L"), struct.Struct("<4s5HL2L2H")
_PIECE = 1 << 20
_TAR_TEXTS = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)


class Part(NamedTuple):
    """Where some bytes lie: a whole file, or a member of an archive."""

    path: str
    offset: int = -1  # −1: the whole file
    size: int = 0  # of the stored bytes
    method: int = -1  # of zips: 0 stored, 8 deflated; −1: plain bytes
    length: int = 0  # of the decompressed bytes
    checksum: int = 0  # CRC-32


def read(part: Part) -> bytes:
    """The bytes of a part.

    Raises:
        DataError: unreadable, damaged, encrypted, compressed in an unknown way, or too large.
    """
    try:
        if part.offset < 0:
            with open(part.path, "rb", buffering=0) as file:
                if os.fstat(file.fileno()).st_size > MAX_FILE_BYTES:
                    raise DataError("larger than a picture can be")
                return file.read()
        if max(part.size, part.length) > MAX_FILE_BYTES:
            raise DataError("larger than a picture can be")
        archive = _opened(part.path)
        if part.offset + part.size > os.fstat(archive).st_size:
            raise DataError("cut off")
        if part.method < 0:
            return _whole(os.pread(archive, part.size, part.offset), part.size)
        header = _LOCAL.unpack(_whole(os.pread(archive, _LOCAL.size, part.offset), _LOCAL.size))
        if header[0] != b"PK\x03\x04":
            raise DataError("a damaged member of the zip")
        # Name and extra field, whose lengths may differ from the directory's.
        stored = _whole(os.pread(archive, part.size, part.offset + _LOCAL.size + header[-2] + header[-1]), part.size)
    except (OSError, struct.error) as error:
        raise DataError("not readable") from error
    if header[2] & 1:
        raise DataError("encrypted")
    data = stored if part.method == 0 else _inflate(stored, part)
    if len(data) != part.length or zlib.crc32(data) != part.checksum:
        raise DataError("a damaged member of the zip")
    return data


def _inflate(stored: bytes, part: Part) -> bytes:
    if part.method != 8:
        raise DataError(f"zip compression {part.method}, which is not read: use deflate or none")
    try:
        return zlib.decompressobj(-15).decompress(stored, part.length + 1)  # never more than what was claimed
    except zlib.error as error:
        raise DataError("a damaged member of the zip") from error


def _opened(path: str) -> int:
    """Descriptor of an archive, which is read again and again; one stays open until another is asked for."""
    key = (path, os.stat(path).st_ino)
    if key not in _open_archive:
        for old in _open_archive.values():
            os.close(old)
        _open_archive.clear()
        _open_archive[key] = os.open(path, os.O_RDONLY)
    return _open_archive[key]


_open_archive: dict[tuple[str, int], int] = {}


def _whole(data: bytes, size: int) -> bytes:
    if len(data) != size:
        raise DataError("cut off")
    return data


def is_zip(path: Path) -> bool:
    """Whether a file is a zip. Its end tells, but a tar whose last member is a zip ends like one."""
    with path.open("rb") as file:
        head = file.read(262)
    if head[257:] == b"ustar" or head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ")):
        return False
    try:
        _directory(path)
    except DataError:
        return False
    return True


def is_tar(path: Path) -> bool:
    """Whether a file begins like a tar, compressed or not."""
    try:
        return tarfile.is_tarfile(path)
    except Exception:  # of a damaged compression
        return False


def zip_members(path: Path) -> Iterator[tuple[str, Part]]:
    """Names and places of a zip's files, in the order of its directory.

    Raises:
        DataError: not a whole zip.
    """
    try:
        yield from _zip_members(path)
    except (OSError, OverflowError, struct.error) as error:
        raise _torn(path) from error


def _zip_members(path: Path) -> Iterator[tuple[str, Part]]:
    start, left, count, before = _directory(path)
    seen = 0
    with path.open("rb") as file:
        file.seek(start)
        buffer, position = b"", 0
        while left or position < len(buffer):
            if left and len(buffer) - position < 1 << 18:  # a record with its three texts is below 200 kB
                buffer, position = buffer[position:] + file.read(min(left, _PIECE)), 0
                left = max(0, left - _PIECE)
            fields = _CENTRAL.unpack_from(buffer, position)
            signature, method, checksum = fields[0], fields[6], fields[9]
            stored, length, name_size, extra_size, comment_size, offset = *fields[10:15], fields[18]
            begin = position + _CENTRAL.size
            position = begin + name_size + extra_size + comment_size
            if signature != b"PK\x01\x02" or position > len(buffer):
                raise _torn(path)
            seen += 1
            name = buffer[begin : begin + name_size]
            if name.endswith(b"/"):
                continue
            if 0xFFFFFFFF in (stored, length, offset):
                extra = buffer[begin + name_size : begin + name_size + extra_size]
                length, stored, offset = _wide(extra, length, stored, offset, path)
            text = name.decode("utf-8" if fields[5] & 0x800 else "cp437", errors="replace")
            yield text, Part(str(path), offset + before, stored, method, length, checksum)
    if count & 0xFFFF not in (0xFFFF, seen & 0xFFFF):  # many writers keep its last 16 bits alone
        raise _torn(path)


def _directory(path: Path) -> tuple[int, int, int, int]:
    """Start, size and number of entries of a zip's central directory, and how much stands before the archive."""
    with path.open("rb") as file:
        end = file.seek(0, 2)
        file.seek(max(0, end - (1 << 16) - 22))
        tail = file.read()
        place = tail.rfind(_END)
        if place < 0 or len(tail) - place < 22:
            raise _torn(path)
        count, size, start = struct.unpack_from("<H2L", tail, place + 10)
        place += end - len(tail)
        file.seek(max(0, place - 20))
        locator = file.read(20)
        if locator[:4] == _LOCATOR64:
            written, place = struct.unpack_from("<Q", locator, 8)[0], max(0, place - 76)
            if place != written:  # in most archives the record stands right before its locator
                file.seek(min(written, end))
                place = written if file.read(4) == _END64 else place
            file.seek(place)
            record = file.read(56)
            if len(record) < 56 or record[:4] != _END64:
                raise _torn(path)
            count, size, start = struct.unpack_from("<3Q", record, 32)
    before = place - size - start
    if before < 0:
        raise _torn(path)
    return start + before, size, count, before


def _wide(extra: bytes, length: int, stored: int, offset: int, path: Path) -> tuple[int, int, int]:
    """64-bit values of a zip64 extra field, in place of those that are full."""
    position = 0
    while position + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, position)
        if kind == 1:
            values = iter(struct.unpack_from(f"<{min(size, len(extra) - position - 4) // 8}Q", extra, position + 4))
            try:
                return tuple(next(values) if v == 0xFFFFFFFF else v for v in (length, stored, offset))  # type: ignore[return-value]
            except (StopIteration, RuntimeError) as error:
                raise _torn(path) from error
        position += 4 + size
    return length, stored, offset


class _Header(tarfile.TarInfo):
    """A member of a tar. A damaged header is an error, which the standard library takes for the end of the tar."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        try:
            header = super().fromtarfile(archive)
        except tarfile.HeaderError as error:
            if isinstance(error, tarfile.EOFHeaderError):  # type: ignore[attr-defined]
                raise
            raise tarfile.ReadError("a damaged header") from error
        if header.size < 0:  # in the extended header
            raise tarfile.ReadError("a damaged header")
        return header

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        """Long names and the like are read into memory at once; a negative size leads back to where we were."""
        if self.size < 0 or (self.type in _TAR_TEXTS and self.size > _PIECE):
            raise tarfile.ReadError("a damaged header")
        member: tarfile.TarInfo = super()._proc_member(archive)  # type: ignore[misc]
        return member


def tar_members(path: Path) -> Iterator[tuple[str, Part | bytes]]:
    """Names and places of a tar's files in their order; of a compressed tar their bytes.

    Raises:
        DataError: not a whole tar.
    """
    try:
        plain = _is_plain(path)
        with tarfile.open(path, "r:" if plain else "r:*", tarinfo=_Header) as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # which otherwise grows with every member
                name = member.name.encode(errors="backslashreplace").decode()
                if not member.isreg():
                    continue
                if member.size > MAX_FILE_BYTES or (plain and not member.issparse()):
                    yield name, Part(str(path), member.offset_data, member.size)
                elif file := archive.extractfile(member):
                    yield name, file.read()
            while not plain and archive.fileobj and archive.fileobj.read(_PIECE):  # to the checksum
                pass
    except Exception as error:  # whatever a damaged file leads the reader to
        raise _torn(path) from error


def _is_plain(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(257)
        return file.read(5) == b"ustar"


def _torn(path: Path) -> DataError:
    return DataError(f"--data {path} is not a whole archive: copy it again")
